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
    only when it is complete.

    Args:
        path: The JSONL file, relative to the run's default_root_dir.
    """

    def __init__(self, path: str = "predictions.jsonl") -> None:
        super().__init__(write_interval="batch")
        self.path = path

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "predict":
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
        indices = batch_indices or [batch_idx * len(prediction) + i for i in range(len(prediction))]
        with self._part(trainer, trainer.global_rank).open("a", encoding="utf-8") as file:
            for index, row in zip(indices, prediction, strict=True):
                file.write(json.dumps([dataloader_idx, int(index), row], ensure_ascii=False) + "\n")

    @override
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.barrier("predictions written")
        if trainer.is_global_zero:
            self._join(trainer)

    def _join(self, trainer: L.Trainer) -> None:
        rows: dict[tuple[int, int], dict[str, Any]] = {}  # a sampler may give the last rows to two ranks
        parts = [self._part(trainer, rank) for rank in range(trainer.world_size)]
        for part in parts:
            for line in part.read_text(encoding="utf-8").splitlines():
                loader, index, row = json.loads(line)
                rows[loader, index] = row
        target = Path(trainer.default_root_dir) / self.path
        text = "".join(json.dumps(rows[key], ensure_ascii=False) + "\n" for key in sorted(rows))
        write_whole(target, text)
        for part in parts:
            part.unlink()
        rank_zero_info(f"{len(rows)} answers written to {target}.")

    def _part(self, trainer: L.Trainer, rank: int) -> Path:
        target = Path(trainer.default_root_dir) / self.path
        return target.with_name(f".{target.name}.rank{rank}")
