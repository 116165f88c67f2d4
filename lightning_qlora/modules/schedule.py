"""The learning rate schedule of a run: what it is built from, and when it is stepped."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import LRSchedulerConfigType
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_qlora.modules.steps import count_steps

__all__ = ["Schedule", "ScheduleCallable"]


class ScheduleCallable(Protocol):
    """Builds a schedule from the optimizer and, if it asks for them by one of these names, the run's optimizer steps.

    A protocol, because the command line leaves out by its names, not by place, what a schedule is given here.
    """

    def __call__(
        self,
        optimizer: Optimizer,
        /,
        total_steps: int,
        num_training_steps: int,
        T_max: int,  # noqa: N803  # as torch calls it
        total_iters: int,
    ) -> LRScheduler:
        """Build it; it is given one of the numbers, or none."""


_STEP_COUNTS = ("total_steps", "num_training_steps", "T_max", "total_iters")


class Schedule:
    """A schedule for an optimizer, built again where a tuner of Lightning has changed the rate or the steps.

    Attributes:
        scheduler: What Lightning steps.

    Args:
        build: What builds it.
        optimizer: The optimizer, with the rates that the schedule starts from.
        trainer: Says how many steps the run takes; asked only where the schedule wants to know.

    Raises:
        MisconfigurationException: If the schedule lacks an option, or wants to know the end of a run that has none.
    """

    def __init__(self, build: Callable[..., LRScheduler], optimizer: Optimizer, trainer: L.Trainer) -> None:
        self._build = build
        self._optimizer = optimizer
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._takes_steps, self._steps_name = _find_step_count(build)
        self._steps = self._count_steps(trainer)
        self.scheduler = self._make()

    def config(self, trainer: L.Trainer) -> LRSchedulerConfigType:
        """Return what Lightning's ``configure_optimizers`` returns of a schedule."""
        if not isinstance(self.scheduler, ReduceLROnPlateau):
            return {"scheduler": self.scheduler, "interval": "step"}
        monitor = getattr(self.scheduler, "monitor", None)
        if monitor is None:
            raise MisconfigurationException(
                "ReduceLROnPlateau follows a metric, and torch's does not say which. Write lr_scheduler: {class_path: "
                "lightning.pytorch.cli.ReduceLROnPlateau, init_args: {monitor: val_loss}}."
            )
        every = trainer.check_val_every_n_epoch or 1
        return {"scheduler": self.scheduler, "interval": "epoch", "frequency": every, "monitor": monitor}

    def renew(self, trainer: L.Trainer, lr: float | None) -> None:
        """Build the schedule again if the run's first step would not be that of the rate and the steps it now has.

        LearningRateFinder and BatchSizeFinder work when the optimizer is there already. A resumed run goes on with the
        rates of its checkpoint.
        """
        config = next((c for c in trainer.lr_scheduler_configs if c.scheduler is self.scheduler), None)
        if config is None or trainer.global_step > 0:
            return
        rates = self._rates if lr is None else [lr] * len(self._rates)
        steps = self._count_steps(trainer)
        if (rates, steps) == (self._rates, self._steps):
            return
        self._rates, self._steps = rates, steps
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
            group.pop("initial_lr", None)
        config.scheduler = self.scheduler = self._make()

    def _make(self) -> LRScheduler:
        if self._steps is None:
            return self._build(self._optimizer)
        if self._steps_name is None:
            return self._build(self._optimizer, self._steps)
        return self._build(self._optimizer, **{self._steps_name: self._steps})

    def _count_steps(self, trainer: L.Trainer) -> int | None:
        if not self._takes_steps:
            return None
        steps = count_steps(trainer)
        if not isinstance(steps, int):
            raise MisconfigurationException(
                "The learning rate schedule needs to know where it ends, and this run has no last step. Write "
                "--trainer.max_steps or --trainer.max_epochs, or --model.lr_scheduler=null."
            )
        return max(1, steps)


def _find_step_count(build: Callable[..., LRScheduler]) -> tuple[bool, str | None]:
    """Return whether a schedule is to be given the number of steps, and by which name; ``None`` for by position."""
    kind, given = _unwrap(build)
    if kind is None:
        return _takes_two(build), None
    parameters = list(inspect.signature(kind).parameters.values())
    if any(p.kind is p.VAR_POSITIONAL for p in parameters[:2]):  # hands on what it is given
        return True, None
    free = [p for p in parameters[1:] if given.get(p.name) is None and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    counts = [p.name for p in free if p.name in _STEP_COUNTS]
    missing = [p.name for p in free if p.default is p.empty and p.name not in counts]
    if missing:
        raise MisconfigurationException(
            f"lr_scheduler {kind.__name__} needs {', '.join(missing)}. By itself a schedule is given the optimizer, "
            f"and the steps of the run under one of the names {', '.join(_STEP_COUNTS)}. Write lr_scheduler: "
            f"{{class_path: {kind.__module__}.{kind.__qualname__}, init_args: {{{missing[0]}: ...}}}}."
        )
    return bool(counts), counts[0] if counts else None


def _unwrap(build: Any) -> tuple[type | None, dict[str, Any]]:
    """Return the class that is built and the options given to it already; ``None`` for a function's own choice."""
    given: dict[str, Any] = {}
    while isinstance(build, partial):
        given = {**build.keywords, **given}
        build = next(filter(inspect.isclass, build.args), build.func)  # jsonargparse hands the class to a function
    return (build if inspect.isclass(build) else None), given


def _takes_two(function: Callable[..., Any]) -> bool:
    """Whether a function takes the steps after the optimizer."""
    try:
        inspect.signature(function).bind(None, 1)
    except TypeError:
        return False
    return True
