"""Means that are exact over batches, ranks and resumptions and never wait for the device.

Their states are replaced, never written to: what validation has left outside of training is read-only there
(``torch.inference_mode``), and what is kept for a checkpoint must stay as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from lightning_qlora.checkpoints.loop_state import count_batches
from lightning_qlora.ranks import gather_objects

__all__ = ["ExactMean", "MeanDifference", "MeanPerplexity", "Stage", "StageMetrics"]

Stage = Literal["train", "val", "test"]


class ExactMean(Metric):
    """A sum divided by the number of its terms.

    torchmetrics' own ``MeanMetric`` either looks for NaN, which waits for the device at every batch, or, told not to,
    ignores the weights it is given (torchmetrics 1.8 and 1.9, ``nan_strategy="disable"``).
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "count"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")

    @override
    def update(self, total: Tensor, count: Tensor | int) -> None:
        """Add the sum of ``count`` terms."""
        self.total = self.total + total
        self.count = self.count + count

    @override
    def compute(self) -> Tensor:
        return self.total / self.count


class MeanPerplexity(ExactMean):
    """``exp`` of the mean cross-entropy in nats."""

    @override
    def compute(self) -> Tensor:
        return super().compute().exp()


class MeanDifference(Metric):
    """The mean of some values less the mean of others; for pairs, the mean of their differences."""

    full_state_update = False
    minuend: Tensor
    subtrahend: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("minuend", "subtrahend"):
            self.add_state(name, torch.zeros(2), dist_reduce_fx="sum")  # sum, count

    @override
    def update(self, these: Tensor, those: Tensor) -> None:
        """Add (A,) and (B,) values."""
        self.minuend = self.minuend + _sum_and_count(these)
        self.subtrahend = self.subtrahend + _sum_and_count(those)

    @override
    def compute(self) -> Tensor:
        return self.minuend[0] / self.minuend[1] - self.subtrahend[0] / self.subtrahend[1]


def _sum_and_count(values: Tensor) -> Tensor:
    return torch.stack([values.sum(), values.new_full((), float(len(values)))])


class StageMetrics(nn.ModuleDict):
    """The metrics of each stage and data loader, and what those of training need to go on from a checkpoint.

    Lightning logs the loaders of a stage by themselves, so each has metrics of its own. Those of the first are given,
    those of the others made when their first batch comes.

    A checkpoint holds the sums of the training metrics, so that an epoch in which a run was resumed is measured whole.

    Args:
        first: The metrics of a stage by their names, those of training with states that are sums.
    """

    def __init__(self, first: Mapping[Stage, nn.ModuleDict]) -> None:
        super().__init__({_key(stage, 0): metrics for stage, metrics in first.items()})
        self._sums: dict[int, dict[str, Tensor]] = {}  # by how many batches of the epoch they are of
        self._saved: dict[str, Any] | None = None  # from a checkpoint, until training starts

    def of(self, stage: Stage, dataloader_idx: int = 0) -> nn.ModuleDict:
        """Return the metrics of a loader."""
        key = _key(stage, dataloader_idx)
        if key not in self:
            # On the same device; in training mode, for Lightning warns of what is not when it starts to train.
            self[key] = copy.deepcopy(self[_key(stage, 0)]).train()
            _reset(self.of(stage, dataloader_idx))
        metrics = self[key]
        assert isinstance(metrics, nn.ModuleDict)
        return metrics

    def log(self, module: L.LightningModule, stage: Stage, dataloader_idx: int, *, shown: frozenset[str]) -> None:
        """Have Lightning log a loader's metrics at the end of the epoch, under ``{stage}_{name}``.

        Args:
            module: Whose metrics they are.
            stage: The stage.
            dataloader_idx: The loader.
            shown: What the progress bar shows.
        """
        for name, metric in _metrics(self.of(stage, dataloader_idx)):
            module.log(
                f"{stage}_{name}",
                metric,
                on_step=False,
                on_epoch=True,
                prog_bar=f"{stage}_{name}" in shown,
                # Lightning looks for the attributes of metrics once, before the later loaders have theirs.
                metric_attribute=f"{_key(stage, dataloader_idx)}.{name}",
            )

    def start(self, stage: Stage) -> None:
        """Forget what an earlier pass that broke off has left."""
        for key, metrics in self.items():
            if key.startswith(f"{stage}_") and isinstance(metrics, nn.ModuleDict):
                _reset(metrics)

    # Checkpoints

    def keep_sums(self, batch_idx: int) -> None:
        """Remember what the training metrics have summed up after a batch, beside what they had before it.

        Lightning resets them when the epoch ends, which may be before the checkpoint is made; and an error may leave
        the batch unfinished, to be trained on again.
        """
        before = {count: sums for count, sums in self._sums.items() if count == batch_idx}
        after = {
            f"{name}.{state}": getattr(metric, state)
            for name, metric in _metrics(self.of("train"))
            for state in metric.metric_state
        }
        self._sums = {**before, batch_idx + 1: after}

    def sums_to_save(self, trainer: L.Trainer) -> dict[str, Any] | None:
        """Return what :meth:`load_sums` takes, of the epoch under way; all ranks must call it."""
        counts = count_batches(trainer)
        sums = self._sums.get(counts.done)
        if sums is None or counts.epoch_finished:
            return None
        if trainer.interrupted and trainer.world_size > 1:  # the error may be this rank's alone
            return None
        return {"batches": counts.done, "ranks": gather_objects({name: value.cpu() for name, value in sums.items()})}

    def load_sums(self, saved: dict[str, Any] | None) -> None:
        """Take what :meth:`sums_to_save` has returned; it takes effect when training starts."""
        self._saved = saved

    def start_training(self, trainer: L.Trainer) -> None:
        """Let the training metrics go on from the sums that were loaded, or begin with none."""
        saved, self._saved, self._sums = self._saved, None, {}
        _reset(self.of("train"))
        if saved is None or saved["batches"] != count_batches(trainer).done:  # a checkpoint for its weights alone
            return
        sums = _share(saved["ranks"], trainer.global_rank, trainer.world_size)
        for name, metric in _metrics(self.of("train")):
            for state in metric.metric_state:
                if (key := f"{name}.{state}") in sums:
                    setattr(metric, state, sums[key].to(metric.device))
        self.keep_sums(saved["batches"] - 1)


def _key(stage: Stage, dataloader_idx: int) -> str:
    return f"{stage}_{dataloader_idx}"


def _metrics(metrics: nn.ModuleDict) -> list[tuple[str, Metric]]:
    return [(name, metric) for name, metric in metrics.items() if isinstance(metric, Metric)]


def _reset(metrics: nn.ModuleDict) -> None:
    for _, metric in _metrics(metrics):
        metric.reset()


def _share(ranks: list[dict[str, Tensor]], rank: int, world_size: int) -> dict[str, Tensor]:
    """Return a rank's part of the sums of all ranks: its own, or all on rank 0 where there were other ranks."""
    if len(ranks) == world_size:
        return ranks[rank]
    if rank > 0:
        return {}
    return {name: torch.stack([sums[name] for sums in ranks]).sum(0) for name in ranks[0]}
