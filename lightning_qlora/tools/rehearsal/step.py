"""Two steps of training on the longest batch, by the trainer of the run with everything taken away that writes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from lightning_qlora.tools.rehearsal.longest_batch import LongestBatch, find_longest_batch, repeating_loader

__all__ = ["Rehearsal", "rehearse"]

_NUM_STEPS = 2


@dataclass(slots=True)
class Rehearsal:
    """What the steps showed.

    Attributes:
        batch: That it was made on.
        batches_per_epoch: Of this rank; ``None`` for a stream.
        seconds: The second step took; the first one of a process is slower than all that follow.
        loss: What the first step returned.
        no_gradient: Trained parameters that received none.
        not_finite: Those whose gradient has a NaN or an infinity.
        all_zero: Those whose gradient is zero throughout.
        num_trained: Trained parameters.
        trained_bytes: Of them.
        optimizer_bytes: Of the optimizer's state after a step.
        peak_bytes: The most that tensors took on the GPU; ``None`` on a CPU.
        out_of_memory: What torch said when a step did not fit.
    """

    batch: LongestBatch | None = None
    batches_per_epoch: int | None = None
    seconds: float = math.nan
    loss: float = math.nan
    no_gradient: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)
    all_zero: list[str] = field(default_factory=list)
    num_trained: int = 0
    trained_bytes: int = 0
    optimizer_bytes: int = 0
    peak_bytes: int | None = None
    out_of_memory: str | None = None


def rehearse(model: L.LightningModule, datamodule: L.LightningDataModule, trainer: L.Trainer) -> Rehearsal:
    """Run one step and look at it, and a second one, which has the optimizer's state beside it as all others will.

    The trainer keeps its devices, strategy and precision, and loses its callbacks, loggers and profiler: it is not good
    for anything else afterwards, and neither is the module.
    """
    found = Rehearsal()
    make_loader = datamodule.train_dataloader

    def longest_only() -> Any:
        loader = make_loader()
        found.batches_per_epoch = _batches_of_a_rank(loader, trainer)
        found.batch = find_longest_batch(loader)
        return repeating_loader(found.batch.batch, _NUM_STEPS)

    datamodule.train_dataloader = longest_only  # type: ignore[method-assign]
    _take_away_what_writes(trainer)
    trainer.callbacks = [_Probe(found)]  # type: ignore[attr-defined]
    try:
        trainer.fit(model, datamodule=datamodule)
    except torch.OutOfMemoryError as error:
        found.out_of_memory = str(error).splitlines()[0]
    finally:
        del datamodule.train_dataloader
    return found


def _take_away_what_writes(trainer: L.Trainer) -> None:
    trainer.loggers = []
    trainer.profiler = PassThroughProfiler()  # type: ignore[attr-defined]
    trainer.limit_val_batches = 0
    trainer.num_sanity_val_steps = 0
    trainer.limit_train_batches = _NUM_STEPS
    trainer.accumulate_grad_batches = 1
    trainer.fit_loop.max_epochs = 1
    trainer.fit_loop.epoch_loop.max_steps = _NUM_STEPS


def _batches_of_a_rank(loader: Any, trainer: L.Trainer) -> int | None:
    """Count what Lightning would give each rank: our loaders hold a rank's share, others are shared out by it."""
    try:
        count = len(loader)
    except TypeError:
        return None
    shared = isinstance(getattr(loader, "sampler", None), DistributedSampler)
    return count if shared else math.ceil(count / trainer.world_size)


class _Probe(Callback):
    """Measures the steps and reads the gradients of the first before the optimizer uses them."""

    def __init__(self, found: Rehearsal) -> None:
        self.found = found
        self._start = 0.0

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._start = time.perf_counter()

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if trainer.global_step > 0:
            return
        for name, parameter in pl_module.named_parameters():
            if not parameter.requires_grad:
                continue
            self.found.num_trained += 1
            self.found.trained_bytes += parameter.nbytes
            gradient = parameter.grad
            if gradient is None:
                self.found.no_gradient.append(name)
                continue
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            if not torch.isfinite(local).all():
                self.found.not_finite.append(name)
            elif local.numel() and not local.any():
                self.found.all_zero.append(name)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        loss: Any = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        value = math.nan if loss is None else float(loss)  # waits for the device
        if batch_idx == 0:
            self.found.loss = value
        device = trainer.strategy.root_device
        self.found.seconds = time.perf_counter() - self._start
        if device.type == "cuda":
            self.found.peak_bytes = torch.cuda.max_memory_allocated(device)
        states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
        self.found.optimizer_bytes = sum(
            value.nbytes for state in states for value in state.values() if isinstance(value, torch.Tensor)
        )
