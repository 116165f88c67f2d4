"""Whether the link between a GPU and its host carries what a plan moves, without a step waiting for it."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["link_keeps_up"]

_BYTES = 2**27
_SIDE = 4096
_REPEATS = 3
_BESIDES = 1.25
"""What a forward pass takes, in units of its products: norms, attention and dequantisation take time too, and what need
not be recomputed makes up for some waiting."""


def link_keeps_up(device: torch.device, nbytes: int, flops: float) -> bool:
    """Measure whether this many bytes are on the host when a forward pass has ended; takes a fifth of a second.

    Args:
        device: A GPU.
        nbytes: That a forward pass saves and moves; they come back in the backward pass, which takes longer.
        flops: Of the forward pass' products.
    """
    bytes_per_second, flops_per_second = _copy_rate(device), _product_rate(device)
    torch.cuda.empty_cache()
    return nbytes / bytes_per_second <= _BESIDES * flops / flops_per_second


def _copy_rate(device: torch.device) -> float:
    on_device = torch.empty(_BYTES, dtype=torch.uint8, device=device)
    on_host = torch.empty(_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
    return _BYTES / _seconds(lambda: on_host.copy_(on_device, non_blocking=True), device)


def _product_rate(device: torch.device) -> float:
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    one = torch.ones(_SIDE, _SIDE, dtype=dtype, device=device)
    return 2.0 * _SIDE**3 / _seconds(lambda: one @ one, device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the least time of a few, after one that does not count."""
    found: list[float] = []
    for _ in range(1 + _REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(torch.cuda.current_stream(device))
        work()
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1000)
    return min(found[1:])
