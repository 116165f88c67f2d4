"""Writes the answers of ``predict`` to JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_qlora.evaluation.files import write_whole

__all__ = ["PredictionWriter"]


class PredictionWriter(BasePredictionWriter):
    """Write each question with its ``answer`` as one line of JSON, in the order of the questions.

    Every rank writes its own rows as they come, to ``FILE.rankN``; at the end rank 0 joins them. The file appears
    only when it is complete. Where Lightning does not know which rows a batch holds, as of an IterableDataset, rows are
    written as they came, those of several ranks in turn.

    Args:
        path: The JSONL file, relative to the run's default_root_dir.
    """

    def __init__(self, path: str = "predictions.jsonl") -> None:
        super().__init__(write_interval="batch")
        self.path = path
        self._seen_indices: Sequence[int] | None = None
        self._num_unplaced: dict[int, int] = {}  # rows whose place is not known, by loader

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "predict":
            self._seen_indices, self._num_unplaced = None, {}
            self._part(trainer, trainer.global_rank).parent.mkdir(parents=True, exist_ok=True)
            self._part(trainer, trainer.global_rank).write_text("", encoding="utf-8")

    @override
    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: list[dict[str, Any]],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        places = self._places(batch_indices, len(prediction), dataloader_idx, trainer.global_rank)
        with self._part(trainer, trainer.global_rank).open("a", encoding="utf-8") as file:
            for place, row in zip(places, prediction, strict=True):
                file.write(json.dumps([dataloader_idx, *place, row], ensure_ascii=False) + "\n")

    def _places(
        self, batch_indices: Sequence[int] | None, num_rows: int, dataloader_idx: int, rank: int
    ) -> list[tuple[int, int]]:
        """Return what a loader's rows are sorted by; rows of one place are the same row."""
        # Lightning goes on giving the last batch's list where a loader without indices follows one that has them.
        if batch_indices and batch_indices is not self._seen_indices:
            self._seen_indices = batch_indices
            return [(int(index), 0) for index in batch_indices]
        first = self._num_unplaced.get(dataloader_idx, 0)
        self._num_unplaced[dataloader_idx] = first + num_rows
        return [(index, rank) for index in range(first, first + num_rows)]

    @override
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.barrier("predictions written")
        if trainer.is_global_zero:
            self._join(trainer)

    def _join(self, trainer: L.Trainer) -> None:
        rows: dict[tuple[int, int, int], dict[str, Any]] = {}  # a sampler may give the last rows to two ranks
        parts = [self._part(trainer, rank) for rank in range(trainer.world_size)]
        for part in parts:
            with part.open(encoding="utf-8") as file:
                for line in file:  # not splitlines, which also splits at U+2028 and the like inside of a text
                    loader, index, rank, row = json.loads(line)
                    rows[loader, index, rank] = row
        target = Path(trainer.default_root_dir) / self.path
        text = "".join(json.dumps(rows[key], ensure_ascii=False) + "\n" for key in sorted(rows))
        write_whole(target, text)
        for part in parts:
            part.unlink()
        rank_zero_info(f"{len(rows)} answers written to {target}.")

    def _part(self, trainer: L.Trainer, rank: int) -> Path:
        target = Path(trainer.default_root_dir) / self.path
        return target.with_name(f".{target.name}.rank{rank}")
