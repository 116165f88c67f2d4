"""Where the time of a step goes: what the device did, and how long it had nothing to do."""

from __future__ import annotations

import argparse
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import lightning as L
import torch
from cases import SHAPES, case_of
from fits import Batches, Clock, make_module, make_trainer
from torch.profiler import ProfilerActivity, profile, record_function
from typing_extensions import override

from lightning_qlora import PerformanceMonitor, RunGuard

TRACED = 4
"""Steps at the end of the fit that are traced; the last one has no end."""
_MARK = "beginning of a step"
_SPIN = "spin_kernel"  # torch.cuda._sleep's
_SHOWN = 12  # kernels, of those that take most
_START = 0.1  # of a step: idle there, the host was behind when it began

KINDS = {
    "attention": r"sdpa|flash|fmha|flex_attention|cudnn::fusion",
    "adapters' gradients": r"^_multiply|^_add_up",
    "products": r"nvjet|gemm|cutlass|splitk|addmm|::mm\b|linear|matmul",
    "dequantisation": r"dequant",
    "norms, activations, rotations": r"^_normalise|^_activate|^_rotate|silu|rsqrt",
    "the loss's softmax": r"softmax",
    "optimizer": r"optimizer|multi_tensor_apply|foreach|lpnorm|adam",
    "sums": r"functor_add|::add",
    "copies": r"memcpy|memset|copy|cat|fill",
}
"""Patterns for names of kernels, or of CPU operators; the first that fits counts."""


class Work(NamedTuple):
    """A kernel of a GPU or an operator of a CPU, in microseconds of the device's clock.

    Attributes:
        start: When it began.
        end: When it ended.
        name: Its name.
        own: What it took without the operators that it calls.
    """

    start: float
    end: float
    name: str
    own: float


class Tracer(L.Callback):
    """Traces the last steps of a fit, and marks where each of them begins on the device.

    Args:
        on_gpu: Whether the device is one.
        first: The first step that is traced.
    """

    def __init__(self, on_gpu: bool, first: int) -> None:
        self.on_gpu, self.first = on_gpu, first
        self.profiler = profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU])

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        if index == self.first:
            self.profiler.start()
        if index >= self.first:
            if self.on_gpu:
                torch.cuda._sleep(1)
            else:
                with record_function(_MARK):
                    pass

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
        self.profiler.stop()

    def steps(self) -> list[list[Work]]:
        """Return what was done in each step, in order of time, its mark first."""
        work = []
        for event in self.profiler.events() or ():
            start, end = event.time_range.start, event.time_range.end
            if self.on_gpu and event.device_type.name == "CUDA":
                work.append(Work(start, end, event.name, end - start))
            elif not self.on_gpu and ("::" in event.name or event.name == _MARK):  # others are whole parts of code
                work.append(Work(start, end, event.name, event.self_cpu_time_total))
        work.sort()
        marks = [i for i, each in enumerate(work) if _MARK in each.name or _SPIN in each.name]
        return [work[one:two] for one, two in pairwise(marks)]


def timeline(options: argparse.Namespace) -> dict[str, Any]:
    """Fit a case; return what a step is made of, in milliseconds: the medians of those that were traced."""
    on_gpu, steps = options.device == "cuda", options.warmup + options.steps + TRACED
    data = Batches(case_of(options), steps, SHAPES[options.shape]["vocab_size"])
    clock, tracer = Clock(on_gpu), Tracer(on_gpu, steps - TRACED)
    make_trainer(options, steps, [clock, tracer, PerformanceMonitor(), RunGuard()]).fit(make_module(options), data)
    seconds = clock.seconds()[options.warmup : steps - TRACED]
    return {
        "plan_used": str(clock.plan),
        "untraced_ms": round(1000 * statistics.median(seconds), 1),
        **found(tracer.steps()),
    }


def found(steps: Sequence[Sequence[Work]]) -> dict[str, Any]:
    """Return the medians of some steps, and the kernels that take most."""
    idle = [_idle(step) for step in steps]
    kinds = [_by_kind(step) for step in steps]
    times: defaultdict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    for step in steps:
        for work in step[1:]:
            times[work.name] += work.own / 1000 / len(steps)
            counts[work.name] += 1
    longest = sorted(times, key=times.__getitem__, reverse=True)[:_SHOWN]
    return {
        "traced_ms": _median([(step[-1].end - step[0].start) / 1000 for step in steps]),
        "kernels": round(statistics.median(len(step) - 1 for step in steps)),
        "busy_ms": _median([sum(each.values()) for each in kinds]),
        "idle_ms": _median([total for total, _ in idle]),
        "idle_at_start_ms": _median([at_start for _, at_start in idle]),
        "by_kind_ms": {kind: _median([each[kind] for each in kinds]) for kind in (*KINDS, "others")},
        "longest": [[name[:100], round(counts[name] / len(steps), 1), round(times[name], 2)] for name in longest],
    }


def _idle(step: Sequence[Work]) -> tuple[float, float]:
    """Return how many milliseconds of a step nothing ran, and how many of its beginning."""
    begun, busy_until, total, at_start = step[0].start, step[0].end, 0.0, 0.0
    soon = begun + _START * (step[-1].end - begun)
    for work in step[1:]:
        gap = max(0.0, work.start - busy_until) / 1000
        total += gap
        at_start += gap if busy_until < soon else 0.0
        busy_until = max(busy_until, work.end)
    return total, at_start


def _by_kind(step: Sequence[Work]) -> dict[str, float]:
    """Return the milliseconds of a step's work by kinds."""
    times = dict.fromkeys((*KINDS, "others"), 0.0)
    for work in step[1:]:
        kinds = (kind for kind, pattern in KINDS.items() if re.search(pattern, work.name, re.IGNORECASE))
        times[next(kinds, "others")] += work.own / 1000
    return times


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 2)
