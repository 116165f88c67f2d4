"""How many optimizer steps a run takes, also where Lightning's GradientAccumulationScheduler changes their size."""

from __future__ import annotations

import math

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler

__all__ = ["accumulations", "count_steps", "restore_accumulation"]


def count_steps(trainer: L.Trainer) -> int | float:
    """Return the optimizer steps of the whole run, infinity for one without an end.

    It is Lightning's ``estimated_stepping_batches``, which ignores GradientAccumulationScheduler. As there, loaders
    that do not exist yet are built.
    """
    estimate = trainer.estimated_stepping_batches
    schedule, batches, epochs = _accumulation_schedule(trainer), trainer.num_training_batches, trainer.max_epochs
    if schedule is None or epochs is None or epochs < 0 or not math.isfinite(batches):
        return estimate
    sizes = [schedule.get_accumulate_grad_batches(epoch) for epoch in range(max(1, epochs))]
    steps = sum(math.ceil(batches / size) for size in sizes)
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)


def accumulations(trainer: L.Trainer) -> list[int]:
    """Return how many micro-batches make an optimizer step: one number, or those that follow one another."""
    schedule = _accumulation_schedule(trainer)
    if schedule is None:
        return [trainer.accumulate_grad_batches]
    return [schedule.scheduling[epoch] for epoch in schedule.epochs]


def restore_accumulation(trainer: L.Trainer) -> None:
    """Give a run that is resumed within an epoch the accumulation of that epoch.

    GradientAccumulationScheduler sets it when an epoch starts; Lightning 2.6 leaves that hook out where it goes on in
    the middle of one.
    """
    schedule = _accumulation_schedule(trainer)
    if schedule is not None:
        trainer.accumulate_grad_batches = schedule.get_accumulate_grad_batches(trainer.current_epoch)


def _accumulation_schedule(trainer: L.Trainer) -> GradientAccumulationScheduler | None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((c for c in callbacks if isinstance(c, GradientAccumulationScheduler)), None)
