"""Two processes (gloo, forked): what each of them trains on, also after a resume."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.strategies import DDPStrategy
from tiny_chats import Recorder, make_data, write_chats
from tiny_pairs import pair_data, write_pairs
from tiny_ranks import run_ranks

from lightning_qlora.ranks import RankError

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork.*:DeprecationWarning"),
]


class RankRecorder(Recorder):
    """Writes down what its rank has seen, and saves a checkpoint on the way."""

    def __init__(self, folder: Path, name: str, save_at: int | None = None) -> None:
        super().__init__()
        self.folder, self.name, self.save_at = str(folder), name, save_at

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        if self.trainer.global_step == self.save_at:
            self.trainer.save_checkpoint(f"{self.folder}/{self.name}.ckpt")

    def on_fit_end(self) -> None:
        record = {"seen": self.seen, "evaluated": self.evaluated, "weight": self.weight.item()}
        Path(self.folder, f"{self.name}-{self.trainer.global_rank}.json").write_text(json.dumps(record))


def fit_on_two(data: Any, module: RankRecorder, ckpt_path: str | None = None, **options: Any) -> list[dict[str, Any]]:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(start_method="fork", process_group_backend="gloo"),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return [json.loads(Path(module.folder, f"{module.name}-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streamed"])
def test_two_ranks_share_the_rows_and_resume_exactly(tmp_path, streaming):
    source = write_chats(tmp_path / "train.jsonl", 25)
    validation = str(write_chats(tmp_path / "validation.jsonl", 5, first=100))
    options: dict[str, Any] = {"streaming": True, "shuffle_buffer": 4} if streaming else {}

    def data() -> Any:
        return make_data(source, tmp_path / "cache", validation=validation, **options)

    length: dict[str, Any] = {"max_steps": 9, "val_check_interval": 9} if streaming else {"max_epochs": 2}
    whole = fit_on_two(data(), RankRecorder(tmp_path, "whole", save_at=3), **length)
    if not streaming:
        for epoch in range(2):
            rows = [row for rank in whole for number, _, rows in rank["seen"] if number == epoch for row in rows]
            assert sorted(row for row in rows if row >= 0) == list(range(25))
        assert len(whole[0]["seen"]) == len(whole[1]["seen"])
    evaluated = [row for rank in whole for row in itertools.chain.from_iterable(rank["evaluated"]) if row >= 0]
    assert sorted(evaluated) == sorted([*range(5)] * (1 if streaming else 2))
    resumed = fit_on_two(data(), RankRecorder(tmp_path, "resumed"), str(tmp_path / "whole.ckpt"), **length)
    for before, after in zip(whole, resumed, strict=True):
        assert after["seen"] == before["seen"][3:]
        assert after["weight"] == before["weight"]
    assert whole[0]["seen"] != whole[1]["seen"]


@pytest.mark.parametrize("options", [{"share_prompts": True}, {"unpaired": True, "packing": False}], ids=str)
def test_two_ranks_share_the_pairs_and_resume_exactly(tmp_path, options):
    source = write_pairs(tmp_path / "train.jsonl", 15)
    count = 45 if "unpaired" in options else 30

    def data() -> Any:
        return pair_data(source, tmp_path / "cache", tokens_per_batch=None, **options)

    whole = fit_on_two(data(), RankRecorder(tmp_path, "whole", save_at=2), max_epochs=2)
    for epoch in range(2):
        rows = [row for rank in whole for number, _, rows in rank["seen"] if number == epoch for row in rows]
        assert sorted(row for row in rows if row >= 0) == list(range(count))
    assert len(whole[0]["seen"]) == len(whole[1]["seen"])
    resumed = fit_on_two(data(), RankRecorder(tmp_path, "resumed"), str(tmp_path / "whole.ckpt"), max_epochs=2)
    for before, after in zip(whole, resumed, strict=True):
        assert after["seen"] == before["seen"][2:]


def test_a_rank_that_cannot_read_ends_the_run_on_all(tmp_path, monkeypatch):
    source = write_chats(tmp_path / "train.jsonl", 25)
    data = make_data(source, tmp_path / "cache")
    set_up = data._stages.set_up

    def failing(stage: str) -> None:
        if data.trainer is not None and data.trainer.global_rank == 1:
            raise OSError("Stale file handle")
        set_up(stage)

    monkeypatch.setattr(data._stages, "set_up", failing)

    def fit() -> tuple[str, str]:
        trainer = L.Trainer(
            accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        try:
            trainer.fit(Recorder(), datamodule=data)
        except (OSError, RankError) as error:
            return type(error).__name__, str(error)
        return "trained", ""

    ends = run_ranks(tmp_path / "ranks", fit)
    assert ends == [("RankError", "Rank 1 failed: OSError: Stale file handle"), ("OSError", "Stale file handle")]
