"""Loading of a base that no rank holds whole: of each matrix only a part is kept, as soon as the next one is read."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from bitsandbytes.nn import Int8Params
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import modeling_utils
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_qlora.environment import environment
from lightning_qlora.parts import Place, cut, cut_parameters, gather, put_back
from lightning_qlora.ranks import agree

__all__ = ["ShardedLoad", "laid_out"]

_WRAPPED = ("base_layer", "original_module")
"""The names under which PEFT's layers hold the module that they stand for."""


class ShardedLoad:
    """Keeps this rank's part of each matrix of the decoder layers while transformers loads them.

    Loading stays transformers' own: its readers, converters, quantisers and tied weights. It builds a model on the meta
    device and gives each module its parameters one by one, quantised already; here such a parameter is cut along its
    first dimension, as FSDP2 will, and replaced by a DTensor of the part. What stays whole: everything outside the
    layers, vectors, and the first layer of each kind, on which kernels are tried out.

    Until FSDP2 gathers layers, this does, on all ranks alike: those that run, and what PEFT wraps, whose weights it
    reads (their device always, their values for DoRA, PiSSA and others, of which some change them).

    Args:
        mesh: Of the ranks that share the base, in one dimension, with the kind of device where parts are kept.
        device: Where this rank computes.
    """

    def __init__(self, mesh: DeviceMesh, device: torch.device) -> None:
        self._mesh = mesh
        self._device = device
        self._parents: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()
        self._stays_whole: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
        self._kinds: set[Any] = set()
        self._wrapped: nn.Module | None = None
        self._of_wrapped: list[Place] = []
        self._of_running: dict[nn.Module, list[Place]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Cut up what is loaded, and gather what is read, for the length of the context.

        Raises:
            MisconfigurationException: Inside, if weights have 8 bits.
        """
        handles = (
            register_module_module_registration_hook(self._on_module),
            register_module_parameter_registration_hook(cast(Any, self._on_parameter)),  # torch's annotation: None
            register_module_forward_pre_hook(self._before_forward),
            register_module_forward_hook(self._after_forward, always_call=True),
        )
        try:
            with _loading_piece_by_piece():
                yield
        finally:
            for handle in handles:
                handle.remove()

    # Called by torch, for every module there is

    def _on_parameter(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if isinstance(parameter, Int8Params):  # still on the meta device: nothing has been read
            raise MisconfigurationException(
                "quantization asks for 8-bit weights (LLM.int8()), which cannot be cut up: bitsandbytes keeps a second "
                "reference to each and multiplies by that, which FSDP2 does not gather. Write "
                "--model.quantization=nf4, which takes half as much, or --trainer.strategy=ddp."
            )
        before = module._parameters.get(name)
        if before is None or parameter is None or not before.is_meta or parameter.is_meta:
            return None  # not loaded just now
        if parameter.ndim < 2 or isinstance(parameter, DTensor):
            return None
        layer = self._layer_of(module)
        return None if layer is None or self._is_first_of_its_kind(layer) else self._cut(parameter)

    def _on_module(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is None:
            return
        self._parents[child] = parent
        owners = (parent, self._parents.get(parent))  # an adapter added later comes into a dictionary of its layer
        inner = (owner._modules.get(key) for owner in owners if owner is not None for key in _WRAPPED)
        wrapped = child if name in _WRAPPED else next((module for module in inner if module is not None), None)
        if wrapped is None or wrapped is self._wrapped:
            return
        for place in self._of_wrapped:  # anew, since PEFT may have changed them
            place.module._parameters[place.name] = self._cut(place.parameter)
        self._wrapped, self._of_wrapped = wrapped, _gather(wrapped, self._device)

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        if isinstance(module, GradientCheckpointingLayer):
            self._of_running[module] = _gather(module, self._device)

    def _after_forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        put_back(self._of_running.pop(module, []))

    def _layer_of(self, module: nn.Module | None) -> nn.Module | None:
        while module is not None and not isinstance(module, GradientCheckpointingLayer):
            module = self._parents.get(module)
        return module

    def _is_first_of_its_kind(self, layer: nn.Module) -> bool:
        if layer not in self._stays_whole:
            kind = (type(layer), tuple((name, p.dtype, p.shape) for name, p in layer.named_parameters()))
            self._stays_whole[layer] = kind not in self._kinds
            self._kinds.add(kind)
        return self._stays_whole[layer]

    def _cut(self, parameter: Tensor) -> nn.Parameter:
        return cut(parameter, self._mesh)


def _gather(root: nn.Module, device: torch.device) -> list[Place]:
    """Make what is below a module whole, once all ranks have come so far."""
    if cut_parameters(root):
        agree()
    return gather(root, device)


@contextmanager
def laid_out(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Give fully_shard, inside the context, parameters without data, and what it makes of them the parts after it.

    Args:
        model: With parameters that :class:`ShardedLoad` has cut up, and others.
        device: Where the parts are to be.
    """
    parts = cut_parameters(model)
    empty = {parameter: _without_data(parameter) for _, _, parameter in parts}
    for module, name, parameter in parts:
        module._parameters[name] = empty[parameter]
    del empty
    yield
    filled: dict[Any, nn.Parameter] = {}
    while parts:
        module, name, parameter = parts.pop()  # so that of each part there is one copy at a time
        sharded = module._parameters[name]
        if sharded not in filled:
            filled[sharded] = _filled(sharded, parameter, device)
        module._parameters[name] = filled[sharded]


def _without_data(parameter: Tensor) -> nn.Parameter:
    data = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


@torch.no_grad()
def _filled(sharded: Any, part: DTensor, device: torch.device) -> nn.Parameter:
    data: Any = torch.empty_like(sharded, device=device)
    data.to_local().copy_(part.to_local())
    return nn.Parameter(data, requires_grad=sharded.requires_grad)


@contextmanager
def _loading_piece_by_piece() -> Iterator[None]:
    """Keep transformers from filling the device: by reading ahead, and by reserving what the whole model takes.

    It reads ahead in threads unless it quantises, as much as they find time for; and before it reads anything, it lets
    torch reserve the size of the model in one piece (caching_allocator_warmup), which fails where that does not fit.
    """
    name = "caching_allocator_warmup"
    warmup = getattr(modeling_utils, name)
    setattr(modeling_utils, name, lambda *_, **__: None)
    try:
        with environment(HF_DEACTIVATE_ASYNC_LOAD="1"):
            yield
    finally:
        setattr(modeling_utils, name, warmup)
