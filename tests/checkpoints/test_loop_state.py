from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tiny_chats import fit, make_data, write_chats

from lightning_qlora.checkpoints.loop_state import BatchCounts, count_batches, repair_loops

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Counters(Callback):
    """Remembers every counter that other callbacks and loggers can see, before each batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.epochs: list[int] = []

    def on_train_epoch_start(self, trainer, module) -> None:
        self.epochs.append(trainer.current_epoch)

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        loop = trainer.fit_loop
        epoch = loop.epoch_progress.current
        self.seen.append(
            (
                trainer.current_epoch,
                trainer.global_step,
                batch_idx,
                loop.epoch_loop._batches_that_stepped,
                loop.epoch_loop.total_batch_idx,
                (epoch.ready, epoch.started, epoch.processed, epoch.completed),
            )
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loops")
    write_chats(folder / "train.jsonl", 12)
    return folder


@pytest.mark.parametrize(
    "trainer",
    [
        {"max_epochs": 3},
        {"max_epochs": 3, "max_steps": 1000},
        {"max_epochs": 3, "accumulate_grad_batches": 2},
    ],
    ids=["epochs", "steps", "accumulated"],
)
@pytest.mark.parametrize("saving", [{"every_n_train_steps": 1}, {"save_on_train_epoch_end": True}], ids=["step", "end"])
def test_every_counter_continues(folder, tmp_path, trainer, saving):
    counters = Counters()
    checkpoints = ModelCheckpoint(tmp_path, filename="{epoch}-{step}", save_top_k=-1, **saving)
    fit(make_data(folder / "train.jsonl", folder / "cache"), callbacks=[counters, checkpoints], **trainer)
    for checkpoint in tmp_path.glob("*.ckpt"):
        resumed = Counters()
        data = make_data(folder / "train.jsonl", folder / "cache")
        fit(data, callbacks=[resumed], ckpt_path=str(checkpoint), **trainer)
        done = len(counters.seen) - len(resumed.seen)
        assert resumed.seen == counters.seen[done:], checkpoint.name
        first = counters.seen[done][0] if resumed.seen else 3
        begun = done and counters.seen[done - 1][0] == first  # its start was seen before the checkpoint
        assert resumed.epochs == list(range(first + bool(begun), 3)), checkpoint.name


def test_a_checkpoint_within_an_epoch_is_left_alone(folder, tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    fit(make_data(folder / "train.jsonl", folder / "cache"), callbacks=[checkpoints], max_epochs=1)
    saved = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    for number, path in enumerate(saved):
        checkpoint = torch.load(path, weights_only=True)
        repaired = copy.deepcopy(checkpoint)
        repair_loops(repaired)
        last = number == len(saved) - 1
        assert (repaired["loops"] != checkpoint["loops"]) == last
        again = copy.deepcopy(repaired)
        repair_loops(again)
        assert again["loops"] == repaired["loops"]  # repairing twice is repairing once


def test_weights_alone_need_no_repair():
    checkpoint: dict[str, Any] = {"state_dict": {}}
    repair_loops(checkpoint)
    assert checkpoint == {"state_dict": {}}


def test_a_batch_counts_once_its_step_is_through():
    current = SimpleNamespace(ready=4, processed=3)
    progress = SimpleNamespace(current=current, total=SimpleNamespace(processed=13), is_last_batch=True)
    trainer: Any = SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)))
    assert count_batches(trainer) == BatchCounts(started=4, done=3, total=13, epoch_finished=False)
    current.processed = 4
    assert count_batches(trainer).epoch_finished
