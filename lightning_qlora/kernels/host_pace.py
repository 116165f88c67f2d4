"""Who is slow: a GPU, or the host that launches its kernels."""

from __future__ import annotations

import math
import time
from typing import Self

import torch

__all__ = ["HostPace"]

_LESS = 0.95  # of the host's time
_LONGER = 2.0  # a sleep than the host needed before
_LONGEST_MS = 500.0
_CYCLES = 10_000_000  # of which nobody says how long they are: five milliseconds, beside which a slow launch is little
_MOST_TIMES = 3  # something else may have kept the host; or the queue is full each time


class HostPace:
    """Compares how long the current GPU takes for work with how long the host does that launches it.

    Entered at least twice around the same work, whose kernels are compiled. First for the host, with nothing before it
    on the GPU: otherwise that would be late, and the host has to wait where it is about a thousand kernels ahead. Then
    for the GPU, which sleeps until all is launched: otherwise it would wait for the host. Kernels that its
    queue has no room for then, all but about a thousand, are launched while it works.
    """

    def __init__(self) -> None:
        self.host_ms, self.gpu_ms = math.inf, math.inf
        self.times = 0
        self._was_asleep = False
        self._asleep, self._awake, self._done = (torch.cuda.Event(enable_timing=True) for _ in range(3))

    def __enter__(self) -> Self:
        torch.cuda.synchronize()
        if self.times:
            self._sleep(_CYCLES)
            torch.cuda.synchronize()
            longer = min(_LONGER * self.host_ms, _LONGEST_MS)
            self._sleep(int(_CYCLES * longer / self._asleep.elapsed_time(self._awake)))
        self._begun = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.record()
        self.host_ms = min(self.host_ms, 1000 * (time.perf_counter() - self._begun))
        self._was_asleep = self.times > 0 and not self._awake.query()
        self.times += 1

    @property
    def is_known(self) -> bool:
        """Whether the GPU slept until the host had launched all, or that is no longer expected of it."""
        return self._was_asleep or self.times >= _MOST_TIMES

    def host_is_slow(self) -> bool:
        """Whether the GPU needs less time."""
        self._done.synchronize()
        self.gpu_ms = float(self._awake.elapsed_time(self._done))
        return self.gpu_ms < _LESS * self.host_ms

    def __str__(self) -> str:
        return f"{self.gpu_ms:.0f} ms of a forward pass on the GPU, {self.host_ms:.0f} on the host that launches it"

    def _sleep(self, cycles: int) -> None:
        self._asleep.record()
        torch.cuda._sleep(cycles)
        self._awake.record()
