"""Random runs, interrupted at random places, several times each: V3 of the test plan, as far as the data goes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback
from tiny_chats import Recorder, fit, make_data, write_chats

from lightning_qlora.data import SFTDataModule

pytestmark = [
    pytest.mark.soak,
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class Killed(Exception):  # noqa: N818 - what happens to a process
    pass


class KillAt(Callback):
    """Save in a hook once enough batches are through, then die there."""

    def __init__(self, hook: str, batches: int, path: Path) -> None:
        self.batches, self.path = batches, path
        setattr(self, hook, self._maybe)

    def _maybe(self, trainer: Any, *_: Any) -> None:
        progress = trainer.fit_loop.epoch_loop.batch_progress.total
        if not trainer.sanity_checking and progress.processed >= self.batches:
            trainer.save_checkpoint(self.path)
            raise Killed


def random_run(rng: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    accumulate = rng.choice([1, 1, 2, 3])
    trainer: dict[str, Any] = {"max_epochs": rng.choice([2, 3]), "accumulate_grad_batches": accumulate}
    if rng.random() < 0.3:
        trainer["max_steps"] = rng.choice([1000, 9])
    if rng.random() < 0.4:
        trainer["val_check_interval"] = rng.choice([2, 3])
    if rng.random() < 0.2:
        trainer["limit_train_batches"] = 4
    if rng.random() < 0.2:
        trainer["reload_dataloaders_every_n_epochs"] = 1
    options: dict[str, Any] = {"packing": rng.random() < 0.6, "num_workers": rng.choice([0, 0, 0, 2])}
    return trainer, options


@pytest.mark.parametrize("seed", range(60))
def test_any_interruptions_change_nothing(tmp_path, seed):
    rng = random.Random(seed)
    trainer, options = random_run(rng)
    source = write_chats(tmp_path / "train.jsonl", rng.randint(9, 30), seed=seed)
    validation = str(write_chats(tmp_path / "validation.jsonl", 4, first=100))

    def data() -> SFTDataModule:
        return make_data(source, tmp_path / "cache", validation=validation, tokens_per_batch=256, **options)

    whole = fit(data(), **trainer)
    seen: list[Any] = []
    checkpoint = None
    for kill in range(rng.randint(1, 4)):
        module = Recorder(ask_for_steps=rng.random() < 0.5)
        # A checkpoint amid accumulation would lose half a gradient; the callbacks of this package save at the ends of
        # steps only, and so does this test.
        hook = "on_train_batch_end" if trainer["accumulate_grad_batches"] == 1 else "on_train_epoch_end"
        hook = rng.choice([hook, hook, "on_train_epoch_end", "on_validation_end"])
        if trainer["accumulate_grad_batches"] > 1 and "val_check_interval" in trainer:
            hook = "on_train_epoch_end"
        killer = KillAt(hook, rng.randint(len(seen), len(whole.seen)), tmp_path / f"{kill}.ckpt")
        try:
            fit(data(), module, ckpt_path=checkpoint, callbacks=[killer], **trainer)
        except Killed:
            checkpoint = str(tmp_path / f"{kill}.ckpt")
            seen += module.seen
    module = Recorder()
    fit(data(), module, ckpt_path=checkpoint, **trainer)
    assert seen + module.seen == whole.seen
    assert module.weight.item() == whole.weight.item() or not module.seen
