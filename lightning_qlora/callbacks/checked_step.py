"""An optimizer step as RunGuard sees it: whether it is sound, and what to say of it where it is not."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_qlora.ranks import add_up
from lightning_qlora.transfers import Readback

__all__ = ["CheckedStep", "Verdict", "Window", "describe", "has_scaler", "named"]

Window: TypeAlias = "list[tuple[Any, Tensor]]"
"""Micro-batches, and the loss of each."""

_NAMED_ROWS = 8
_ONE_OPTIMIZER = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy, FSDPStrategy)
"""Strategies that step torch's optimizer as it is."""


class Verdict(NamedTuple):
    """What all ranks' numbers say of a step.

    Attributes:
        is_sound: Losses and gradients are finite, or left to a loss scaler that can cope with them.
        loss: In nats a term, ``None`` of a step without terms.
        any_told: Whether a rank was told to stop.
    """

    is_sound: bool
    loss: float | None
    any_told: bool


class CheckedStep:
    """An optimizer step before its update, whose numbers are on their way to the host.

    The module has yet to divide the gradients by the step's token count, a finite number from 1, so they are finite
    then exactly if they are now.

    Args:
        trainer: Of the run.
        pl_module: Of the run.
        optimizer: Whose step it is.
        window: The step's micro-batches on this rank.
        told: Whether this rank was told to stop.

    Attributes:
        number: Steps before it.
        trained: The tensors that have a gradient in it.
        is_bad: () float32 on the device, 1 where a loss or gradient of any rank is not finite, else 0.
    """

    def __init__(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer, window: Window, told: bool
    ) -> None:
        self.trainer, self.pl_module, self.optimizer, self.window = trainer, pl_module, optimizer, window
        self.number = trainer.global_step
        self.trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._largest = _largest_magnitudes([p.grad for p in self.trained], pl_module.device)
        losses = [loss.float() for _, loss in window] or [self._largest.new_zeros(())]
        loss_sum = torch.stack(losses).sum()
        # new_full fills on the device; copying a number there would wait.
        num_terms = loss_sum.new_full((), sum(_num_targets(batch) for batch, _ in window))
        is_told = loss_sum.new_full((), told)
        sums = add_up(torch.stack([loss_sum, num_terms, (~torch.isfinite(self._largest).all()).float(), is_told]))
        self.is_bad = (~(torch.isfinite(sums[0]) & (sums[2] == 0))).float()
        self._sums = Readback(sums)

    def verdict(self) -> Verdict:
        """Wait for the numbers of all ranks, and say what they mean."""
        loss_sum, num_terms, num_bad, num_told = self._sums.wait().tolist()
        is_sound = math.isfinite(loss_sum) and not (num_bad and not _scaler_copes(self.trainer))
        loss = loss_sum * self.trainer.accumulate_grad_batches / num_terms if num_terms else None
        return Verdict(is_sound, loss, num_told > 0)

    def device_can_decide(self) -> bool:
        """Whether the optimizer itself leaves out an update that a number on its GPU speaks against."""
        return (
            all(parameter.is_cuda for parameter in self.trained)
            and isinstance(self.trainer.strategy, _ONE_OPTIMIZER)
            and getattr(self.optimizer, "_step_supports_amp_scaling", False)  # what torch's GradScaler asks
            and not has_scaler(self.trainer)
        )

    def rows(self) -> list[object]:
        """Where all its rows on this rank were read."""
        return [row for batch, _ in self.window for row in _rows_of(self.trainer, batch)]

    def account(self, folder: Path) -> dict[str, Any]:
        """Return what this rank has to say of a step that is not sound, for :func:`describe`; save its batches.

        Args:
            folder: For the batches, which ``torch.load(..., weights_only=True)`` reads.
        """
        suspects = [(batch, loss) for batch, loss in self.window if not math.isfinite(loss)] or self.window
        return {
            "rank": self.trainer.global_rank,
            "losses": [float(loss) for _, loss in self.window],
            "rows": [str(row) for batch, _ in suspects for row in _rows_of(self.trainer, batch)],
            "gradients": self._nonfinite_gradients(),
            "saved": self._save(suspects, folder),
        }

    def _nonfinite_gradients(self) -> list[str]:
        names = {id(parameter): name for name, parameter in self.pl_module.named_parameters()}
        largest = zip(self.trained, self._largest.tolist(), strict=True)
        return [names.get(id(each), "unnamed") for each, value in largest if not math.isfinite(value)]

    def _save(self, suspects: Window, folder: Path) -> str:
        """Save batches for a look; return the path."""
        path = folder / f"step={self.number}-rank={self.trainer.global_rank}.pt"
        rows = [
            {"loss": float(loss), "rows": [str(r) for r in _rows_of(self.trainer, batch)]} for batch, loss in suspects
        ]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save([_on_host(batch) for batch, _ in suspects], path)
            path.with_suffix(".json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        except OSError as error:  # what has to be told is more important than its record
            return f"nowhere ({error})"
        return str(path)


def _largest_magnitudes(gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Return the largest magnitude of each gradient's part on this rank, NaN if one is NaN, in one fused pass."""
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients if g is not None]
    # A part that is empty has none.
    norms = torch._foreach_norm([g.detach() if g.numel() else g.new_zeros(1) for g in local], float("inf"))
    return torch.stack([norm.float() for norm in norms]) if norms else torch.zeros(0, device=device)


def has_scaler(trainer: L.Trainer) -> bool:
    """Whether losses are scaled, and updates left out, by a loss scaler."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def _scaler_copes(trainer: L.Trainer) -> bool:
    """Whether a loss scaler can still halve its scale, which is its answer to a gradient that overflowed."""
    return has_scaler(trainer) and trainer.precision_plugin.scaler.get_scale() > 1.0  # type: ignore[attr-defined]


def _num_targets(batch: Any) -> int:
    """Supervised tokens of a batch, from its shape; 1 for batches of another kind, whose loss is a mean."""
    targets = batch.get("targets") if isinstance(batch, Mapping) else None
    return int(targets.numel()) if isinstance(targets, Tensor) else 1


# Naming


@runtime_checkable
class _NamesRows(Protocol):
    """What is asked of a data module (SFTDataModule)."""

    def origins(self, row_ids: Sequence[int]) -> Sequence[object]:
        """Return where training rows were read."""


def _rows_of(trainer: L.Trainer, batch: Any) -> list[object]:
    """Where the rows of a batch were read; their ids where the data module cannot say."""
    ids = batch.get("row_ids") if isinstance(batch, Mapping) else None
    if not ids:
        return []
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, _NamesRows):
        return list(data.origins(tuple(ids)))
    return [f"row {row}" for row in ids if row >= 0]


def named(rows: Sequence[object]) -> str:
    """Return the first rows in brackets, to end a sentence with; nothing where there are none."""
    if not rows:
        return ""
    more = f" and {len(rows) - _NAMED_ROWS} more" if len(rows) > _NAMED_ROWS else ""
    return f" (rows: {', '.join(map(str, rows[:_NAMED_ROWS]))}{more})"


def describe(step: int, ranks: list[dict[str, Any]]) -> str:
    """Say what was not finite, where, and in which rows, over all ranks."""
    bad_loss = [r for r in ranks if not all(map(math.isfinite, r["losses"]))]
    what = "The loss is" if bad_loss else "The loss is finite but the gradient is"
    lines = [f"{what} NaN or infinite in the optimizer step after step {step}."]
    for rank in bad_loss or ranks:
        where = f"rank {rank['rank']}: " if len(ranks) > 1 else ""
        bad = rank["gradients"]
        gradients = f"; gradients of {len(bad)} tensors, such as {bad[0]}" if bad else ""
        lines.append(
            f"  {where}micro-batch losses {', '.join(f'{loss:.4g}' for loss in rank['losses'])}{gradients}"
            f"{named(rank['rows'])}; batch saved to {rank['saved']}"
        )
    return "\n".join(lines)


def _on_host(batch: Any) -> Any:
    """Copy a batch's tensors to the host and drop what is neither tensor nor plain value."""
    if isinstance(batch, Tensor):
        return batch.detach().cpu()
    if isinstance(batch, Mapping):
        return {str(key): _on_host(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [_on_host(value) for value in batch]
    return batch if batch is None or type(batch) in (bool, int, float, str) else str(batch)
