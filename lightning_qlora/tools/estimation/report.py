"""An estimate as tables for the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, TextIO

from lightning_qlora.accounting import Storage
from lightning_qlora.memory import MemoryEstimate, Plan
from lightning_qlora.tools.estimation.speed import MEASURED, Measurement, Speed
from lightning_qlora.tools.inspection.terminal import write

__all__ = ["Budget", "Estimate", "as_dict", "duration", "print_estimate", "size"]

_GIB, _MIB = 2**30, 2**20
_ITEMS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "scratch", "workspaces", "peak")


class Budget(NamedTuple):
    """What fits a device.

    Attributes:
        gib: Its memory.
        plan: The fastest plan that fits the configured batch; ``None`` if none does.
        largest_batch: Most tokens of a micro-batch of the configured documents, with the leanest plan.
        longest_context: Most tokens of a single document, likewise.
        context_host: Bytes of that document's activations that wait in host memory.
        largest_model: The largest known shape whose training on the configured batch fits; ``None`` if not asked for.
    """

    gib: float
    plan: Plan | None
    largest_batch: int
    longest_context: int
    context_host: int
    largest_model: str | None


class Estimate(NamedTuple):
    """Everything that was estimated.

    Attributes:
        model_name: The base.
        device: Kind of device.
        sharding: What each rank holds.
        world_size: Ranks.
        storages: Parameters by how they are stored.
        plan: The configured one, or auto.
        offered: Plans that the module offers.
        num_tokens: Of a micro-batch.
        document_length: Of its documents.
        micro_batches: Of an optimizer step.
        num_steps: Of the run, if known.
        optimizer: Its class.
        memory: By plan.
        budgets: By memory.
        reserve_gib: What was left free in them.
        speeds: By device.
        measured: What the speeds were derived from.
    """

    model_name: str
    device: str
    sharding: str
    world_size: int
    storages: list[Storage]
    plan: str
    offered: tuple[Plan, ...]
    num_tokens: int
    document_length: int
    micro_batches: int
    num_steps: int | None
    optimizer: str
    memory: list[MemoryEstimate]
    budgets: list[Budget]
    reserve_gib: float
    speeds: list[Speed]
    measured: tuple[Measurement, ...] = MEASURED


def print_estimate(found: Estimate, stream: TextIO | None = None) -> None:
    """Print an estimate."""
    lines = [*_head(found), "", *_memory(found), "", *_budgets(found), "", *_speeds(found)]
    write("\n".join(lines), stream or sys.stdout)


def _head(found: Estimate) -> list[str]:
    numel = sum(storage.numel for storage in found.storages)
    trained = sum(storage.numel for storage in found.storages if storage.trainable)
    stored = ", ".join(f"{s.kind}{' (trained)' if s.trainable else ''} {size(s.nbytes)}" for s in found.storages)
    ranks = "" if found.world_size == 1 else f" on each of {found.world_size} ranks ({found.sharding})"
    return [
        f"{found.model_name}: {numel:,} parameters, {trained:,} trained: {stored}",
        f"Micro-batches of {found.num_tokens:,} tokens in documents of up to {found.document_length:,}, "
        f"{found.micro_batches} to an optimizer step of {found.optimizer}{ranks}",
    ]


def _memory(found: Estimate) -> list[str]:
    rows = [["activation_checkpointing", *_ITEMS[:-1], "PEAK", "at"]]
    notes = []
    for estimate in found.memory:
        mark = " <- configured" if estimate.plan == found.plan else ""
        star = "" if estimate.plan in found.offered else " *"
        rows.append(
            [f"{estimate.plan}{star}", *(size(getattr(estimate, item)) for item in _ITEMS), estimate.moment + mark]
        )
        if estimate.host:
            notes.append(f"{estimate.plan}: {size(estimate.host)} of activations wait in host memory.")
        if estimate.paged and not notes:
            notes.append(f"{size(estimate.paged)} of the optimizer's state are paged: the driver moves them as needed.")
    if any(estimate.plan not in found.offered for estimate in found.memory):
        notes.append("*: not a choice of this module yet.")
    return [
        *_table(rows),
        "Not all items are there at once. CUDA's context, libraries and gaps between tensors come on top.",
        *notes,
    ]


def _budgets(found: Estimate) -> list[str]:
    asked = any(budget.largest_model is not None for budget in found.budgets)
    head = ["memory", "for this batch", "largest batch", "longest context", "host memory for it"]
    head += ["largest model"] if asked else []
    rows = [head]
    for budget in found.budgets:
        chosen = "does not fit" if budget.plan is None else budget.plan
        row = [f"{budget.gib:g} GiB", chosen, _tokens(budget.largest_batch), _tokens(budget.longest_context)]
        row.append(size(budget.context_host) if budget.context_host else "none")
        rows.append(row + ([budget.largest_model or "none"] if asked else []))
    leanest = found.offered[-1]
    return [
        *_table(rows),
        f"By estimate, {found.reserve_gib:g} GiB left free. For this batch: the fastest activation_checkpointing that "
        f"fits. Largest batch (of these documents) and longest context (one document): with {leanest}.",
    ]


def _tokens(count: int) -> str:
    return f"{count:,} tokens" if count else "none"


_HOW_LONG = "The run's length: with --trainer.max_steps it is known here; inspect counts a run's batches."


def _speeds(found: Estimate) -> list[str]:
    rows = [["device", "tokens/s a rank", "s a step", "run"]]
    for speed in found.speeds:
        run = "length unknown" if speed.run_seconds is None else duration(speed.run_seconds)
        rows.append([speed.device, f"{speed.tokens_per_second:,.0f}", f"{speed.seconds_per_step:.3g}", run])
    kind = [m for m in found.measured if (m.peak_tflops is None) == (found.device == "cpu")]
    unknown = any(speed.run_seconds is None for speed in found.speeds)
    return [
        *_table(rows),
        *([_HOW_LONG] if unknown else []),
        "Derived by arithmetic and data sheets, not measured here, for work that keeps a device busy. Measured were:",
        *(f"  {m.tokens_per_second:,.0f} tokens/s on {m.device}, checkpointing {m.plan}: {m.what}" for m in kind),
    ]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    last = len(widths) - 1
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column in (0, last) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def size(nbytes: float) -> str:
    """Write bytes in GiB or MiB."""
    return f"{nbytes / _GIB:.2f} GiB" if nbytes >= 0.1 * _GIB else f"{nbytes / _MIB:.1f} MiB"


def duration(seconds: float) -> str:
    """Write a time in the unit that suits it."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def as_dict(found: Estimate) -> dict[str, Any]:
    """Return an estimate as plain values."""
    values = found._asdict()
    values["storages"] = [storage._asdict() for storage in found.storages]
    values["memory"] = [asdict(estimate) for estimate in found.memory]
    values["budgets"] = [budget._asdict() for budget in found.budgets]
    values["speeds"] = [asdict(speed) for speed in found.speeds]
    values["measured"] = [measurement._asdict() for measurement in found.measured]
    return values
