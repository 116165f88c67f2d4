"""Everything that can be found out about a run in a minute, before it takes a night."""

from __future__ import annotations

import json as json_format
import math
import sys
from contextlib import redirect_stdout
from typing import Any

import lightning as L
import torch
from peft import PeftModel

from lightning_qlora.memory import MemoryEstimate, MemoryModel, OptimizerMemory, SimulationError, skeleton_of
from lightning_qlora.tools.inspection.run_plan import length_of_run, limit_batches
from lightning_qlora.tools.rehearsal.checks import (
    Check,
    Places,
    check_disk,
    check_gradients,
    check_memory,
    check_places,
    check_stop_tokens,
)
from lightning_qlora.tools.rehearsal.step import Rehearsal, rehearse

__all__ = ["dry_run"]

_MARKS = {True: "ok", False: "FAILED", None: "-"}


def dry_run(
    model: L.LightningModule,
    datamodule: L.LightningDataModule,
    trainer: L.Trainer,
    *,
    ckpt_path: str | None = None,
    weights_only: bool | None = None,
    json: bool = False,
) -> None:
    """Try a step of fit on the longest batch, and check what would make the run fail later.

    Also spelt fit --dry_run. The base is loaded and the data are prepared as for the run itself; then the longest batch
    of the whole plan goes forward, backward and through the optimizer: once to look at every gradient, once more for
    the memory and the time that each further step takes. Nothing is written but the caches.

    Args:
        model: What would be trained. The steps change it.
        datamodule: The data of the run.
        trainer: That of the run; it is used up.
        ckpt_path: Accepted as fit accepts it, and not used: the steps start from the beginning.
        weights_only: Likewise.
        json: Write the outcome as JSON to standard output, and nothing else.

    Raises:
        ValueError: If a check failed.
    """
    places = Places.of(trainer)
    limit, accumulate = trainer.limit_train_batches, trainer.accumulate_grad_batches
    length = {"max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs}
    checks = check_places(places)
    with redirect_stdout(sys.stderr):
        found = rehearse(model, datamodule, trainer)
        estimate = _estimate(model, trainer, found)
    per_epoch = found.batches_per_epoch
    steps_per_epoch = None if per_epoch is None else math.ceil(limit_batches(per_epoch, limit) / accumulate)
    steps, epochs, _ = length_of_run(steps_per_epoch, **length)
    checks.insert(0, _describe_batch(found))
    if found.out_of_memory is None:
        checks[1:1] = [*check_gradients(found), check_stop_tokens(model, datamodule)]
        checks += check_disk(places, found, datamodule, math.ceil(epochs) if epochs else None)
    checks.insert(4, check_memory(found, estimate, trainer.strategy.root_device))
    checks.append(Check("length", None, _describe_length(found, steps, accumulate)))
    if trainer.is_global_zero:
        _print(checks, json)
    failed = [check for check in checks if check.passed is False]
    if failed:
        raise ValueError(f"The run is not ready: {'; '.join(f'{c.name}: {c.detail}' for c in failed)}.")


def _estimate(model: Any, trainer: L.Trainer, found: Rehearsal) -> MemoryEstimate | None:
    """Estimate the very step that was made."""
    adapted = getattr(model, "model", None)
    if not isinstance(adapted, PeftModel) or found.batch is None:
        return None
    try:
        memory = MemoryModel(
            skeleton_of(adapted),
            OptimizerMemory(found.optimizer_bytes),
            device="cuda" if trainer.strategy.root_device.type == "cuda" else "cpu",
            autocast={"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(trainer.precision)),
        )
        return memory.estimate(
            found.batch.num_positions,
            plan=getattr(model, "layer_plan", None) or "none",
            document_length=found.batch.longest_document,
            num_supervised=found.batch.num_supervised,
        )
    except SimulationError:
        return None


def _describe_batch(found: Rehearsal) -> Check:
    if found.batch is None:
        return Check("longest batch", False, "the data make no batch")
    batch = found.batch
    supervised = "" if batch.num_supervised is None else f", {batch.num_supervised:,} supervised"
    took = "" if math.isnan(found.seconds) else f"; the second step took {found.seconds:.3g} s"
    text = f"{batch.num_positions:,} tokens (longest document {batch.longest_document:,}{supervised})"
    return Check("longest batch", found.out_of_memory is None, f"{text}, of {batch.among} batches{took}")


def _describe_length(found: Rehearsal, steps: int | None, accumulate: int) -> str:
    if steps is None:
        return "the run has no last step that is known beforehand"
    text = f"{steps:,} optimizer steps of {accumulate} micro-batches"
    if math.isnan(found.seconds):
        return text
    return f"{text}: at most about {_duration(steps * accumulate * found.seconds)} at the pace of the longest batch"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _print(checks: list[Check], json: bool) -> None:
    if json:
        json_format.dump({"checks": [check._asdict() for check in checks]}, sys.stdout, indent=1)
        sys.stdout.write("\n")
        return
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{_MARKS[check.passed]:<7} {check.name.ljust(width)}  {check.detail}")
    sys.stdout.flush()
