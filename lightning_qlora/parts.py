"""Parameters of which each rank holds a part, and which are whole only while they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

__all__ = ["Place", "cut", "cut_parameters", "cut_until_used", "gather", "put_back", "whole"]

_CLASS = "class_when_whole"
_ATTRIBUTES = "attributes_when_whole"


@dataclass(slots=True)
class Place:
    """Where a parameter was cut up and is whole for a while."""

    module: nn.Module
    name: str
    cut: nn.Parameter

    @property
    def parameter(self) -> nn.Parameter:
        """What is there now."""
        parameter = self.module._parameters[self.name]
        assert parameter is not None
        return parameter


@torch.no_grad()
def cut(parameter: Tensor, mesh: DeviceMesh) -> nn.Parameter:
    """Return this rank's part of a parameter that is whole on all of them, cut along its first dimension as by FSDP2.

    Args:
        parameter: On the mesh's kind of device.
        mesh: Of the ranks, in one dimension.
    """
    whole = parameter.as_subclass(Tensor).contiguous()
    parts, rank = whole.chunk(mesh.size()), mesh.get_local_rank()
    part = (parts[rank] if rank < len(parts) else whole[:0]).clone()
    sharded = DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
    result = nn.Parameter(sharded, requires_grad=parameter.requires_grad)
    vars(result).update(vars(parameter))  # how a 4-bit weight was quantised, and that it has been loaded
    vars(result)[_CLASS] = type(parameter)
    return result


def cut_parameters(root: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """List modules, names and parameters below a module that :func:`cut` has made; FSDP2's are not among them."""
    return [
        (module, name, parameter)
        for module in root.modules()
        for name, parameter in module._parameters.items()
        if _attributes_when_whole(module, name, parameter) is not None
    ]


def _attributes_when_whole(module: nn.Module, name: str, parameter: Any) -> dict[str, Any] | None:
    if not isinstance(parameter, DTensor):
        return None
    attributes: dict[str, Any] = vars(module).get(_ATTRIBUTES, {}).get(name) or vars(parameter)
    return attributes if _CLASS in attributes else None


@torch.no_grad()
def gather(root: nn.Module, device: torch.device | None = None) -> list[Place]:
    """Make every parameter below a module whole; return where they are. All ranks must call it.

    Args:
        root: What is whole already stays as it is, and is not among the places.
        device: Where parameters are to be; ``None`` for where the ranks compute.
    """
    parameters = cut_parameters(root)
    wholes = [_whole(*each, device) for each in parameters]
    for (module, name, _), gathered in zip(parameters, wholes, strict=True):
        module._parameters[name] = gathered
    return [Place(*each) for each in parameters]


def _whole(module: nn.Module, name: str, part: Any, device: torch.device | None) -> nn.Parameter:
    attributes = dict(_attributes_when_whole(module, name, part) or {})
    kind = attributes.pop(_CLASS)
    # from_local takes a part that waits on the host to the mesh's kind of device.
    at_hand = DTensor.from_local(
        part.to_local(), part.device_mesh, part.placements, run_check=False, shape=part.shape, stride=part.stride()
    )
    data = at_hand.full_tensor()
    gathered: nn.Parameter = torch.Tensor._make_subclass(
        kind, data if device is None else data.to(device), part.requires_grad
    )
    vars(gathered).update(attributes)
    return gathered


def put_back(places: list[Place]) -> None:
    """Let what was gathered go; the list is empty then."""
    while places:
        place = places.pop()
        place.module._parameters[place.name] = place.cut


@contextmanager
def whole(root: object) -> Iterator[None]:
    """Make a module whole for the length of the context; it costs nothing where none of it is in parts.

    All ranks must enter it. They need not call the module as often as one another inside, nor at all.
    """
    places = gather(root) if isinstance(root, nn.Module) else []
    try:
        yield
    finally:
        put_back(places)


def cut_until_used(root: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Cut up every parameter below a module for good, except while it runs, or inside :func:`whole`.

    Args:
        root: Whole and the same on all ranks, which call it together or inside of :func:`whole`.
        mesh: Of the ranks, in one dimension.
        device: Where parts wait: where the ranks compute, or the host.
    """
    for module in root.modules():
        # Not with the parameter: module.to() puts another DTensor in its place, without them.
        attributes = vars(module)[_ATTRIBUTES] = {}
        for name, parameter in module._parameters.items():
            if parameter is not None:
                part = cut(parameter, mesh)
                attributes[name] = dict(vars(part))
                module._parameters[name] = _parked(part, device)
    places: list[Place] = []

    def before(*_: Any) -> None:
        places.extend(gather(root))

    def after(*_: Any) -> None:
        put_back(places)

    root.register_forward_pre_hook(before)
    root.register_forward_hook(after, always_call=True)


@torch.no_grad()
def _parked(part: Any, device: torch.device) -> nn.Parameter:
    """Let a part wait in host memory as FSDP2's do, from where it is copied without a stop."""
    if part.device_mesh.device_type == device.type:
        return part  # type: ignore[no-any-return]
    data: Any = torch.empty_like(part, device=device)
    data._local_tensor = data._local_tensor.pin_memory()
    data.to_local().copy_(part.to_local())
    return nn.Parameter(data, requires_grad=part.requires_grad)
