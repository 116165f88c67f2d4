"""What an optimizer will keep, from a step of it on the meta device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_qlora.memory.skeleton import META
from lightning_qlora.memory.tracking import MemoryTracker

__all__ = ["OptimizerMemory", "build_optimizer", "optimizer_memory"]

_PAGED_NUMEL = 1e5  # bitsandbytes pages the state of parameters from this size on


class OptimizerMemory(NamedTuple):
    """Bytes of an optimizer.

    Attributes:
        state: Kept between steps on the device.
        paged: Kept between steps where the driver moves it to the host when the device is full.
        scratch: Allocated during a step besides.
    """

    state: int
    paged: int = 0
    scratch: int = 0


def build_optimizer(builder: Callable[[Iterable[nn.Parameter]], Optimizer], model: nn.Module) -> Optimizer:
    """Build an optimizer over parameters of the same shapes and dtypes that take no memory."""
    trained = [p for p in model.parameters() if p.requires_grad]
    # On the CPU, because fused optimizers refuse the meta device; one element, shown as many.
    return builder([nn.Parameter(torch.zeros((), dtype=p.dtype).expand(p.shape)) for p in trained])


def optimizer_memory(optimizer: Optimizer, *, on_gpu: bool = True) -> OptimizerMemory:
    """Let a copy of an optimizer take one step on parameters without data, and count what it keeps.

    Args:
        optimizer: As configured; left as it is. One whose step needs numbers is taken to keep two moments in float32.
        on_gpu: Whether it runs on a GPU, where torch works on all parameters at once unless told otherwise.
    """
    if optimizer.state:  # some fill it when they are built
        return OptimizerMemory(_state_bytes(optimizer.state.values()))
    shadow: Any = object.__new__(type(optimizer))  # copy.copy would leave out what a subclass added
    vars(shadow).update(vars(optimizer))
    vars(shadow).pop("step", None)  # schedulers put one there that steps the original
    shadow.state = defaultdict(dict)
    shadow.param_groups = [_shadow_group(group, on_gpu) for group in optimizer.param_groups]
    parameters = [p for group in shadow.param_groups for p in group["params"]]
    is_paged = getattr(optimizer, "is_paged", False)
    try:
        with torch.no_grad(), MemoryTracker([*parameters, *(p.grad for p in parameters)]) as tracker:
            if hasattr(shadow, "init_state"):  # bitsandbytes: its step calls a library with addresses
                _fill_bitsandbytes_state(shadow)
            else:
                shadow.step()
            scratch = tracker.take_peak()
    except (RuntimeError, NotImplementedError):
        return OptimizerMemory(8 * sum(p.numel() for p in parameters))
    state = _state_bytes(shadow.state.values())
    large = [shadow.state[p] for p in parameters if p.numel() >= _PAGED_NUMEL]
    paged = _state_bytes(large) if is_paged and on_gpu else 0
    is_fused = any(group.get("fused") for group in optimizer.param_groups)
    return OptimizerMemory(state - paged, paged, 0 if is_fused else max(0, scratch - state))


def _shadow_group(group: dict[str, Any], on_gpu: bool) -> dict[str, Any]:
    parameters = []
    for parameter in group["params"]:
        shadow = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=META))
        shadow.grad = torch.empty_like(shadow)
        parameters.append(shadow)
    changed: dict[str, Any] = {"params": parameters}
    if "foreach" in group and group["foreach"] is None:
        changed["foreach"] = on_gpu
    if "fused" in group:
        changed["fused"] = False  # keeps the same, but only where there are devices
    return {**group, **changed}


def _fill_bitsandbytes_state(shadow: Any) -> None:
    shadow.is_paged = False  # paged buffers come from the driver
    shadow.name2qmap = dict(shadow.name2qmap)
    for index, group in enumerate(shadow.param_groups):
        for number, parameter in enumerate(group["params"]):
            shadow.init_state(group, parameter, index, number)


def _state_bytes(states: Iterable[dict[str, Any]]) -> int:
    """Add up storages, each once: bitsandbytes' parameters share their tables."""
    tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
