"""Speed and memory of training, measured without making the device wait."""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from typing_extensions import override

from lightning_qlora.accounting import StepFlops, step_flops
from lightning_qlora.ranks import add_up

__all__ = ["PerformanceMonitor"]

_GIB = 2**30
_WARMUP_BATCHES = 4  # left out of the closing rates where more follow: compilation, autotuning, caches
_KEPT_STEPS = 10_000  # step times behind the closing percentiles

# Dense bfloat16 TFLOP/s from the vendor's data sheets, where Lightning's own table has no entry or quotes sparse peaks.
_PEAK_TFLOPS = {"GB200": 2500.0, "B200": 2250.0, "H200": 989.5, "H100 NVL": 835.0, "RTX 5090": 209.5, "L40S": 362.0}

_Mark: TypeAlias = "float | torch.cuda.Event"


class _Batch(NamedTuple):
    """One micro-batch: when it ran, and what it held."""

    begin: _Mark
    end: _Mark
    num_tokens: int
    num_supervised: int
    flops: int
    closes_step: bool


class _Timed(NamedTuple):
    seconds: float
    num_tokens: int
    num_supervised: int
    flops: int
    closes_step: bool


class PerformanceMonitor(Callback):
    """Shows tokens per second while training, and logs speed, memory and utilisation.

    Logs, over a sliding window of micro-batches: ``tokens_per_second`` (real tokens, padding left out) and
    ``supervised_tokens_per_second`` of all ranks together (this rank's, times the ranks), ``step_seconds`` per
    optimizer step, ``peak_memory_gib`` (allocated on the GPU, or the process's on a CPU), ``peak_reserved_gib`` on a
    GPU, and ``mfu``, the share of the device's peak arithmetic that the model itself needed. Waiting for data counts;
    validation, checkpoints and the change of epochs do not. At the end of fit it prints one line.

    Tokens are counted on the host and GPU times come from events read once they have passed, so no step waits.

    Args:
        window: Micro-batches that the rates are smoothed over.
        peak_tflops: The device's peak in TFLOP/s at the dtype of training; null looks GPUs up by name and leaves
            ``mfu`` out for others.
    """

    def __init__(self, window: int = 20, peak_tflops: float | None = None) -> None:
        if window < 1:
            raise ValueError(f"window is {window}; write a number of micro-batches of at least 1.")
        if peak_tflops is not None and peak_tflops <= 0:
            raise ValueError(f"peak_tflops is {peak_tflops}; write TFLOP/s above 0, or null.")
        self.window = window
        self.peak_tflops = peak_tflops
        self._reset()

    def _reset(self) -> None:
        self._recent: deque[_Timed] = deque(maxlen=self.window)
        self._pending: deque[_Batch] = deque()
        self._step_seconds: deque[float] = deque(maxlen=_KEPT_STEPS)
        self._open_step_seconds = 0.0
        self._num_batches = 0
        self._totals = [0.0, 0.0, 0.0, 0.0]  # seconds, tokens, supervised tokens, FLOPs after the warm-up
        self._all_tokens = [0, 0]
        self._begin: _Mark | None = None
        self._previous_end: _Mark | None = None
        self._steps_before = 0
        self._flops: StepFlops | None = None
        self._peak_flops: float | None = None
        self._on_gpu = False
        self._report = ""

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._reset()
        device = trainer.strategy.root_device
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        self._peak_flops = self.peak_tflops * 1e12 if self.peak_tflops else _look_up_peak(device, trainer)
        model = getattr(pl_module, "model", None)
        if self._peak_flops is not None and hasattr(model, "get_output_embeddings"):
            self._flops = step_flops(model)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._steps_before = trainer.global_step
        self._begin = self._previous_end if self._previous_end is not None else self._mark()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        assert self._begin is not None
        lengths, num_supervised = _count(batch)
        flops = 0 if self._flops is None else self._flops(lengths, num_supervised)
        self._previous_end = self._mark()
        closes_step = trainer.global_step > self._steps_before
        self._pending.append(_Batch(self._begin, self._previous_end, sum(lengths), num_supervised, flops, closes_step))
        self._settle()
        if self._recent and not trainer.barebones:
            self._log(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._forget_gap()

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._forget_gap()

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._forget_gap()

    def _forget_gap(self) -> None:
        """Begin the next micro-batch when it begins, not when the last one ended: something else came between."""
        self._previous_end = None

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(trainer.strategy.root_device)
        self._settle()
        if not self._num_batches:
            return
        device = trainer.strategy.root_device
        dtype = torch.float32 if device.type == "mps" else torch.float64  # exact counts; Apple's GPUs have no float64
        counts = torch.tensor([*self._totals[1:], *self._all_tokens], device=device, dtype=dtype)
        tokens, supervised, flops, all_tokens, all_supervised = add_up(counts).tolist()
        seconds = self._totals[0]
        steps = sorted(self._step_seconds) or [seconds]
        parts = [
            f"{all_tokens:,.0f} tokens ({all_supervised:,.0f} supervised)",
            f"{tokens / seconds:,.0f} tokens/s ({supervised / seconds:,.0f} supervised)",
            f"{statistics.median(steps):.3g} s a step (p95 {steps[int(0.95 * (len(steps) - 1))]:.3g} s)",
            f"peak memory {self._memory(trainer)['peak_memory_gib']:.2f} GiB",
        ]
        if self._peak_flops is not None and flops:
            parts.append(f"MFU {100 * flops / seconds / self._peak_flops / trainer.world_size:.1f} %")
        self._report = f"Training: {', '.join(parts)}."

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._report and trainer.is_global_zero:
            print(self._report, flush=True)
        self._report = ""

    def _mark(self) -> _Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _settle(self) -> None:
        """Time the micro-batches that the device has finished, without waiting for the others."""
        while self._pending and (isinstance(self._pending[0].end, float) or self._pending[0].end.query()):
            batch = self._pending.popleft()
            timed = _Timed(_seconds(batch.begin, batch.end), *batch[2:])
            self._recent.append(timed)
            self._num_batches += 1
            self._all_tokens[0] += timed.num_tokens
            self._all_tokens[1] += timed.num_supervised
            if self._num_batches == _WARMUP_BATCHES + 1:
                self._totals = [0.0, 0.0, 0.0, 0.0]
                self._step_seconds.clear()
            for i, value in enumerate(timed[:4]):
                self._totals[i] += value
            self._open_step_seconds += timed.seconds
            if timed.closes_step:
                self._step_seconds.append(self._open_step_seconds)
                self._open_step_seconds = 0.0

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        seconds = sum(timed.seconds for timed in self._recent)
        num_steps = sum(timed.closes_step for timed in self._recent)
        rates = {"tokens_per_second": trainer.world_size * sum(t.num_tokens for t in self._recent) / seconds}
        others = {
            "supervised_tokens_per_second": trainer.world_size * sum(t.num_supervised for t in self._recent) / seconds,
            **self._memory(trainer),
        }
        if num_steps:
            others["step_seconds"] = seconds / num_steps
        if self._flops is not None and self._peak_flops is not None:
            others["mfu"] = sum(timed.flops for timed in self._recent) / seconds / self._peak_flops
        # Tensors on the host: Lightning would copy a Python number to the GPU and wait for it.
        arguments: dict[str, Any] = {
            "on_step": True,
            "on_epoch": False,
            "batch_size": 1,
            "logger": bool(trainer.loggers),
        }
        pl_module.log_dict({name: torch.tensor(value) for name, value in rates.items()}, prog_bar=True, **arguments)
        pl_module.log_dict({name: torch.tensor(value) for name, value in others.items()}, **arguments)

    def _memory(self, trainer: L.Trainer) -> dict[str, float]:
        if not self._on_gpu:
            return {"peak_memory_gib": _process_peak_bytes() / _GIB}
        device = trainer.strategy.root_device
        return {
            "peak_memory_gib": torch.cuda.max_memory_allocated(device) / _GIB,
            "peak_reserved_gib": torch.cuda.max_memory_reserved(device) / _GIB,
        }


def _seconds(begin: _Mark, end: _Mark) -> float:
    if isinstance(begin, float):
        assert isinstance(end, float)
        return end - begin
    return float(begin.elapsed_time(end)) / 1000  # type: ignore[arg-type]  # both marks are of one kind


def _count(batch: Any) -> tuple[list[int], int]:
    """Return the lengths of a micro-batch's documents and its supervised tokens, without asking the device."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"PerformanceMonitor counts the tokens of mappings such as SFTBatch; found {type(batch).__name__}."
        )
    targets = batch.get("targets")
    num_supervised = targets.numel() if isinstance(targets, Tensor) else 0
    if "document_lengths" in batch:
        rows = batch.get("row_ids") or (0,) * len(batch["document_lengths"])
        return [n for n, row in zip(batch["document_lengths"], rows, strict=True) if row >= 0], num_supervised
    num_rows, length = batch["input_ids"].shape
    return [length] * num_rows, num_supervised


def _look_up_peak(device: torch.device, trainer: L.Trainer) -> float | None:
    """Return the device's peak in FLOP/s for the run's precision, or ``None`` where no table knows it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).upper()
    for chip, tflops in _PEAK_TFLOPS.items():
        if chip in name:
            return tflops * 1e12
    dtype = torch.float16 if str(trainer.precision).startswith("16") else torch.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an unknown device is no news: mfu is left out
        known = get_available_flops(device, dtype)
    return None if known is None else float(known)


def _process_peak_bytes() -> int:
    """Return the most memory this process has held so far."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
