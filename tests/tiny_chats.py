"""Tiny chats in files, and a module that records which rows it is trained on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import tiny_tokenizer
from torch import nn

from lightning_qlora.checkpoints.loop_state import repair_loops
from lightning_qlora.data import SFTDataModule


def write_chats(path: Path, count: int, *, first: int = 0, seed: int = 0) -> Path:
    """Write ``count`` different chats of one to three exchanges as JSON lines."""
    rng = random.Random(seed)
    rows = []
    for number in range(first, first + count):
        turns = []
        for _ in range(rng.randint(1, 3)):
            turns.append({"role": "user", "content": f"Question {number}: " + "what " * rng.randint(0, 6)})
            turns.append({"role": "assistant", "content": f"Answer {number} " + "yes " * rng.randint(0, 4)})
        rows.append({"messages": turns})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Recorder(L.LightningModule):
    """Trains one number and remembers ``(epoch, batch_idx, row_ids)`` of every training batch."""

    def __init__(self, *, ask_for_steps: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.ask_for_steps = ask_for_steps
        self.seen: list[tuple[int, int, tuple[int, ...]]] = []
        self.optimizer_steps: list[int] = []
        self.validated_after: list[int] = []
        self.evaluated: list[tuple[int, ...]] = []

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        repair_loops(checkpoint)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.ask_for_steps:  # sets the loaders up before the checkpoint is restored
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD([self.weight], lr=0.1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch_idx, batch["row_ids"]))
        return (self.weight - sum(batch["row_ids"]) / 100) ** 2

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer_steps.append(len(self.seen))

    def on_validation_start(self) -> None:
        if not self.trainer.sanity_checking:
            self.validated_after.append(len(self.seen))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.evaluated.append(batch["row_ids"])

    test_step = validation_step


def make_data(source: Path, cache: Path, **options: Any) -> SFTDataModule:
    """Make a data module with few rows to a batch."""
    settings: dict[str, Any] = {"max_length": 192, "tokens_per_batch": 384, "batch_size": 4}
    settings["tokenizer"] = tiny_tokenizer()
    return SFTDataModule(str(source), cache_dir=str(cache), **{**settings, **options})


def fit(
    data: SFTDataModule, module: Recorder | None = None, *, ckpt_path: str | None = None, **trainer: Any
) -> Recorder:
    """Train quietly on the CPU and return the module."""
    module = module or Recorder()
    saves = any(isinstance(callback, ModelCheckpoint) for callback in trainer.get("callbacks", ()))
    defaults: dict[str, Any] = {"logger": False, "enable_checkpointing": saves}
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(**quiet, **{**defaults, **trainer}).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module
