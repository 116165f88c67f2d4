"""What a model takes: parameters and bytes as they are stored, and arithmetic per step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    "StepFlops",
    "Storage",
    "count_storage",
    "logical_numel",
    "step_flops",
    "stored_bytes",
]


class Storage(NamedTuple):
    """Parameters that are stored alike.

    Attributes:
        kind: The dtype, or the 4-bit data type, such as ``"nf4"``.
        trainable: Whether they are trained.
        numel: How many there are, counted unpacked.
        nbytes: What they take, quantisation constants included.
    """

    kind: str
    trainable: bool
    numel: int
    nbytes: int


def logical_numel(parameter: Tensor) -> int:
    """Count the weights that a parameter stands for: 4-bit ones are packed two to a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())


def stored_bytes(parameter: Tensor) -> int:
    """Return the bytes of a parameter and of the constants that dequantise it."""
    state = getattr(parameter, "quant_state", None)
    constants = [getattr(parameter, "SCB", None)]
    if state is not None:
        nested = state.state2
        constants += [state.absmax, state.code, state.offset]
        constants += [] if nested is None else [nested.absmax, nested.code]
    return parameter.nbytes + sum(constant.nbytes for constant in constants if isinstance(constant, Tensor))


def count_storage(model: nn.Module) -> list[Storage]:
    """Group a model's parameters by how they are stored, frozen ones first, the largest first."""
    groups: dict[tuple[bool, str], list[int]] = {}
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        kind = str(parameter.dtype).removeprefix("torch.") if state is None else str(state.quant_type)
        totals = groups.setdefault((parameter.requires_grad, kind), [0, 0])
        totals[0] += logical_numel(parameter)
        totals[1] += stored_bytes(parameter)
    storages = [Storage(kind, trainable, *totals) for (trainable, kind), totals in groups.items()]
    return sorted(storages, key=lambda storage: (storage.trainable, -storage.nbytes))


@dataclass(frozen=True, slots=True)
class StepFlops:
    """Floating-point operations that one step of LoRA training cannot do without.

    A weight costs 2 operations a token forward and 2 for the gradient of its input; a trained one 2 more for its own
    gradient (Kaplan et al., arXiv:2001.08361, with the frozen weights' share left out). Causal attention over S tokens
    costs ``2 * S**2`` per layer and query dimension forward and twice that backward. Recomputed activations and
    dequantisation are not counted, as in the model FLOPs utilisation of PaLM (arXiv:2204.02311, appendix B). The head
    works on the supervised tokens only. Sliding windows are counted as full attention.

    Attributes:
        per_token: Of the layers, without attention.
        per_supervised_token: Of the head.
        per_squared_length: Of attention, for each document's squared length.
    """

    per_token: int
    per_supervised_token: int
    per_squared_length: int

    def __call__(self, document_lengths: Iterable[int], num_supervised: int) -> int:
        """Count one micro-batch."""
        lengths = list(document_lengths)
        squares = sum(length * length for length in lengths)
        tokens, supervised = sum(lengths) * self.per_token, num_supervised * self.per_supervised_token
        return tokens + supervised + squares * self.per_squared_length


def step_flops(model: Any) -> StepFlops:
    """Count the arithmetic of a causal language model of transformers, with or without PEFT adapters.

    Args:
        model: A ``PreTrainedModel`` or a ``PeftModel``.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings()
    apart = {id(p) for module in (base.get_input_embeddings(), head) for p in module.parameters()}
    config = base.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = [p for p in model.parameters() if id(p) not in apart and _is_matrix(p)]
    return StepFlops(
        per_token=sum(_weight_flops(p) for p in layers),
        per_supervised_token=sum(_weight_flops(p) for p in head.parameters() if _is_matrix(p)),
        per_squared_length=6 * config.num_hidden_layers * config.num_attention_heads * head_dim,
    )


def _is_matrix(parameter: Tensor) -> bool:
    state = getattr(parameter, "quant_state", None)
    return len(parameter.shape if state is None else state.shape) >= 2


def _weight_flops(parameter: Tensor) -> int:
    return (6 if parameter.requires_grad else 4) * logical_numel(parameter)
