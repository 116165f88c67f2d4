"""What a model takes: parameters and bytes as they are stored, arithmetic per step, and memory by item."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = [
    "MemoryEstimate",
    "StepFlops",
    "Storage",
    "count_storage",
    "estimate_memory",
    "logical_numel",
    "optimizer_state_bytes",
    "step_flops",
    "stored_bytes",
]

_LOSS_CHUNK = 1024  # positions whose logits exist at once in losses.cross_entropy.head_cross_entropy


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


class MemoryEstimate(NamedTuple):
    """A rough account of the peak of a training step, in bytes.

    Attributes:
        weights: The model as it is stored.
        gradients: Of the trained parameters.
        optimizer: Its state.
        activations: Kept for the backward pass of one micro-batch.
        logits: Of one chunk of supervised tokens, with their gradient.
        scratch: The largest layer, dequantised.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    scratch: int

    @property
    def total(self) -> int:
        """All items together."""
        return sum(self)


def estimate_memory(
    model: Any, *, num_tokens: int, optimizers: Sequence[Optimizer], dtype: torch.dtype, checkpointing: bool
) -> MemoryEstimate:
    """Estimate the memory of a training step from shapes alone.

    Activations of a decoder layer are counted as eager PEFT keeps them, in elements per token: two norms' inputs in
    float32, their outputs, queries, keys and values before and after rotation, the attention's output, and four times
    the MLP's width. Fused kernels need less; fragmentation and the libraries themselves come on top.

    Args:
        model: A ``PeftModel`` or ``PreTrainedModel``.
        num_tokens: Tokens of one micro-batch, padding included.
        optimizers: As configured, their state not yet allocated.
        dtype: That the layers compute in.
        checkpointing: Whether each layer keeps its input only and is recomputed.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads * head_dim
    keys = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_dim
    width = dtype.itemsize
    mlp = getattr(config, "intermediate_size", 4 * config.hidden_size)
    layer = 8 * config.hidden_size + width * (2 * config.hidden_size + 3 * queries + 3 * keys + 4 * mlp)
    kept = (
        config.num_hidden_layers * config.hidden_size * width + layer
        if checkpointing
        else config.num_hidden_layers * layer
    )
    trainable = [p for p in model.parameters() if p.requires_grad]
    quantised = [p for p in model.parameters() if logical_numel(p) != p.numel() or p.dtype == torch.int8]
    return MemoryEstimate(
        weights=sum(stored_bytes(p) for p in model.parameters()) + sum(b.nbytes for b in model.buffers()),
        gradients=sum(p.nbytes for p in trainable),
        optimizer=sum(optimizer_state_bytes(optimizer) for optimizer in optimizers),
        activations=num_tokens * kept,
        logits=2 * min(num_tokens, _LOSS_CHUNK) * config.vocab_size * 4,
        scratch=max((logical_numel(p) * width for p in quantised), default=0),
    )


def optimizer_state_bytes(optimizer: Optimizer) -> int:
    """Estimate what an optimizer will keep per parameter, from its kind: two moments unless known otherwise."""
    name = type(optimizer).__name__.lower()
    total = 0
    for group in optimizer.param_groups:
        numel = sum(p.numel() for p in group["params"])
        moments = 2.0
        if "sgd" in name or "rmsprop" in name:
            moments = float(bool(group.get("momentum"))) + float("rmsprop" in name)
        elif "lion" in name or "adagrad" in name:
            moments = 1.0
        elif "adafactor" in name:
            moments = 0.0  # row and column statistics only
        moments *= 0.25 if "8bit" in name else 1.0
        total += int(moments * 4 * numel)
    return total
