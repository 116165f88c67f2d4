"""Which of a model's layers are alike, so that simulating a few of them stands for all."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from torch import nn

from lightning_qlora.accounting import logical_numel, stored_bytes
from lightning_qlora.model import base_model

__all__ = ["decoder_layers", "embedding_alone", "head_alone", "layer_kinds", "only_layers"]


def decoder_layers(model: Any) -> nn.ModuleList:
    """Return the decoder layers of a model with adapters."""
    return getattr(*_place_of_layers(model))  # type: ignore[no-any-return]


def embedding_alone(model: Any) -> nn.Module | None:
    """Return the embedding if a strategy that cuts models up can gather it for its own use, and let it go after that.

    It can where the embedding is no head, and nothing of it is trained, so that no gradient comes back to it.
    """
    return _alone(model, base_model(model).get_input_embeddings())


def head_alone(model: Any) -> nn.Module | None:
    """Return the head if a strategy that cuts models up can gather it for the loss, and let it go before the gradients.

    It can where the head is no embedding, and nothing of it is trained: then the loss forms the gradient of the hidden
    states at once (:class:`lightning_qlora.losses.log_probs._FrozenHeadLogProbs`).
    """
    return _alone(model, base_model(model).get_output_embeddings())


def _alone(model: Any, module: Any) -> nn.Module | None:
    own = {id(p) for p in module.parameters()}
    elsewhere = {id(p) for each in {*model.modules()} - {*module.modules()} for p in each._parameters.values()}
    is_used_again = own & elsewhere or any(p.requires_grad for p in module.parameters())
    return None if is_used_again else module


def layer_kinds(model: Any) -> list[list[int]]:
    """Group the numbers of the layers by what they are made of, and by the attention they use."""
    types = getattr(base_model(model).config, "layer_types", None)
    groups: dict[Hashable, list[int]] = {}
    for index, layer in enumerate(decoder_layers(model)):
        parameters = tuple((name, logical_numel(p), stored_bytes(p)) for name, p in layer.named_parameters())
        groups.setdefault((type(layer), types[index] if types else None, parameters), []).append(index)
    return list(groups.values())


@contextlib.contextmanager
def only_layers(model: Any, indices: Sequence[int]) -> Iterator[None]:
    """Let a model have these layers only, for a while."""
    config: Any = base_model(model).config
    owner, name = _place_of_layers(model)
    layers = getattr(owner, name)
    before = {
        key: value for key, value in vars(config).items() if isinstance(value, list) and len(value) == len(layers)
    }
    before["num_hidden_layers"] = config.num_hidden_layers
    try:
        setattr(owner, name, nn.ModuleList([layers[i] for i in indices]))
        for key, value in before.items():
            vars(config)[key] = [value[i] for i in indices] if isinstance(value, list) else len(indices)
        yield
    finally:
        setattr(owner, name, layers)
        vars(config).update(before)


def _place_of_layers(model: Any) -> tuple[nn.Module, str]:
    """Return the module that holds the list of decoder layers, and the list's name there."""
    base: Any = base_model(model)
    decoder = base.get_decoder()
    for module in decoder.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == base.config.num_hidden_layers:
                return module, name
    raise ValueError(
        f"{type(base).__name__} keeps its {base.config.num_hidden_layers} layers in no list of that length, so its "
        "memory cannot be estimated layer by layer."
    )
