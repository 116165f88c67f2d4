"""How many optimizer steps and tokens a run will take, from the trainer's settings alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning as L

from lightning_qlora.tools.inspection.findings import RunPlan, StageFindings

__all__ = ["length_of_run", "limit_batches", "plan_run", "planning_settings"]


def planning_settings(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Return Trainer arguments with which the settings of a run can be read on any machine.

    A Trainer that is told to use GPUs, a precision or a strategy of theirs cannot even be made without them; one that
    only counts steps needs none of that.

    Args:
        trainer: The configured arguments.

    Returns:
        Those to override: a CPU in place of each device, nothing that logs or calls back.
    """
    return {
        "accelerator": "cpu",
        "devices": _num_devices(trainer.get("devices")),
        "strategy": "auto",
        "precision": "32-true",
        "plugins": None,
        "logger": False,
        "callbacks": [],
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }


def _num_devices(devices: object) -> int:
    """Count the devices asked for; those that depend on the machine (``auto``, ``-1``) as one."""
    if isinstance(devices, str):
        devices = [part for part in devices.split(",") if part.strip()] if "," in devices else devices.strip()
    if isinstance(devices, str):
        devices = int(devices) if devices.lstrip("-").isdigit() else 1
    if isinstance(devices, int):
        return devices if devices > 0 else 1
    return max(1, len(devices)) if isinstance(devices, list | tuple) else 1


def plan_run(
    trainer: L.Trainer, train: StageFindings, *, world_size: int | None = None, stream: bool = False
) -> RunPlan:
    """Work out the steps of a run.

    Args:
        trainer: Read, not used.
        train: The training rows.
        world_size: Data-parallel ranks; devices times nodes of the trainer by default.
        stream: Whether the rows are but the beginning of a stream, so that an epoch has no known end.
    """
    ranks = world_size or trainer.num_devices * trainer.num_nodes
    accumulate = trainer.accumulate_grad_batches
    per_rank = limit_batches(math.ceil(train.batches.num_batches / ranks), trainer.limit_train_batches)
    share = min(1.0, per_rank * ranks / train.batches.num_batches)  # of the epoch's batches that are trained on
    steps_per_epoch = math.ceil(per_rank / accumulate)
    full_step = accumulate * ranks / train.batches.num_batches
    per_step = full_step if stream else share / max(1, steps_per_epoch)  # the last of an epoch may not be full
    total, epochs, limited_by = length_of_run(
        None if stream else steps_per_epoch, max_steps=trainer.max_steps, max_epochs=trainer.max_epochs
    )

    def tokens_of_run(per_epoch: int) -> int | None:
        return None if total is None else round(per_epoch * per_step * total)

    return RunPlan(
        world_size=ranks,
        accumulate_grad_batches=accumulate,
        batches_per_epoch=None if stream else per_rank,
        steps_per_epoch=None if stream else steps_per_epoch,
        tokens_per_step=train.num_tokens * per_step,
        supervised_tokens_per_step=train.num_supervised_tokens * per_step,
        epochs=epochs,
        total_steps=total,
        total_tokens=tokens_of_run(train.num_tokens),
        total_supervised_tokens=tokens_of_run(train.num_supervised_tokens),
        limited_by=limited_by,
    )


def limit_batches(batches: int, limit: float) -> int:
    """Apply ``limit_train_batches``: a number of batches, or a share of them."""
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def length_of_run(
    steps_per_epoch: int | None, *, max_steps: int | None, max_epochs: int | None
) -> tuple[int | None, float | None, str | None]:
    """Return the optimizer steps, the epochs, and the setting that ends the run; negative settings are none."""
    max_steps = max_steps if max_steps is not None and max_steps >= 0 else None
    max_epochs = max_epochs if max_epochs is not None and max_epochs >= 0 else None
    if steps_per_epoch is None:
        return max_steps, None, "max_steps" if max_steps is not None else None
    by_epochs = None if max_epochs is None else max_epochs * steps_per_epoch
    if max_steps is not None and (by_epochs is None or max_steps < by_epochs):
        return max_steps, max_steps / max(1, steps_per_epoch), "max_steps"
    if by_epochs is not None and max_epochs is not None:
        return by_epochs, float(max_epochs), "max_epochs"
    return None, None, None
