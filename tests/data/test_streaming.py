from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny import tiny_tokenizer
from tiny_chats import Recorder, fit, make_data, write_chats

from lightning_qlora.data.batching import Batching
from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.data.encoding import RowEncoder
from lightning_qlora.data.streaming import StreamingBatches, StreamItem

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

ROWS = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    write_chats(folder / "train.jsonl", ROWS)
    return folder


def stream(folder: Path, **options: Any) -> StreamingBatches:
    settings: dict[str, Any] = {
        "sources": str(folder / "train.jsonl"),
        "encoder": RowEncoder(ChatTemplate(tiny_tokenizer()), 192),
        "batching": Batching(True, 384, 4),
        "shuffle_buffer": 8,
        "seed": 0,
        "rank": 0,
        "world_size": 1,
        "max_invalid_fraction": 0.05,
    }
    return StreamingBatches(**{**settings, **options})


def lines(items: list[StreamItem]) -> list[int]:
    return [origin.line for item in items for origin in item.origins]


def one_epoch(batches: StreamingBatches) -> list[StreamItem]:
    return list(itertools.takewhile(lambda item: item.state["epoch"] == 0, batches))


def data(folder: Path, **options: Any):
    return make_data(folder / "train.jsonl", folder / "cache", streaming=True, **{"shuffle_buffer": 8, **options})


def test_every_row_is_seen_once_an_epoch_shuffled_anew_in_each(folder):
    items = list(itertools.islice(stream(folder), 60))
    epochs = [lines([item for item in items if item.state["epoch"] == number]) for number in range(2)]
    for order in epochs:
        assert sorted(order) == list(range(1, ROWS + 1))
    assert epochs[0] != epochs[1] != list(range(1, ROWS + 1))


def test_batches_are_packed_into_the_budget_and_name_their_rows(folder):
    for item in one_epoch(stream(folder)):
        assert sum(item.batch["document_lengths"]) <= 384
        assert item.batch["row_ids"] == tuple(origin.line for origin in item.origins)
        assert item.batch["attention_mask"] is None
    padded = one_epoch(stream(folder, batching=Batching(False, None, 4)))
    assert max(len(item.origins) for item in padded) == 4
    assert sorted(lines(padded)) == list(range(1, ROWS + 1))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_rows(folder, world_size):
    shares = [lines(one_epoch(stream(folder, rank=rank, world_size=world_size))) for rank in range(world_size)]
    assert sorted(itertools.chain.from_iterable(shares)) == list(range(1, ROWS + 1))


def test_a_shard_continues_after_any_batch(folder):
    whole = list(itertools.islice(stream(folder), 40))
    for done in (1, 2, 5, 17, 25):
        rest = list(itertools.islice(stream(folder, states={0: whole[done - 1].state}), 40 - done))
        assert lines(rest) == lines(whole[done:])
        for mine, other in zip(rest, whole[done:], strict=True):
            assert torch.equal(mine.batch["input_ids"], other.batch["input_ids"])
            assert mine.state == other.state


def test_states_are_plain_values(folder):
    for item in itertools.islice(stream(folder), 10):
        assert json.loads(json.dumps(item.state)) == item.state


def test_refused_rows_are_counted(tmp_path):
    path = write_chats(tmp_path / "rows.jsonl", 20)
    path.write_text(path.read_text() + "{broken\nnull\n")
    items = one_epoch(stream(tmp_path, sources=str(path)))
    reports = [item.report for item in items if item.report is not None]
    assert sum(report.rows_read for report in reports) == 22
    assert sum((Counter(report.refused) for report in reports), Counter()) == {"broken-json": 1, "not-an-object": 1}
    assert len(lines(items)) == 20


def test_too_many_refused_rows_stop_the_stream(tmp_path):
    path = write_chats(tmp_path / "rows.jsonl", 1100)
    path.write_text("\n".join("{" if i % 10 == 0 else line for i, line in enumerate(path.read_text().splitlines())))
    batches = stream(tmp_path, sources=str(path), shuffle_buffer=1050)
    with pytest.raises(ValueError, match=r"105 of the first 1050 rows .* more than the allowed 5.0%") as error:
        next(iter(batches))
    assert "broken-json" in str(error.value)
    assert lines([next(iter(stream(tmp_path, sources=str(path), shuffle_buffer=1050, max_invalid_fraction=0.2)))])


def test_a_pass_without_a_usable_row_stops(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{\n{\n")
    with pytest.raises(ValueError, match="A whole pass over the data gave no usable row"):
        next(iter(stream(tmp_path, sources=str(tmp_path / "rows.jsonl"))))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_resumes_at_the_next_batch(folder, tmp_path, num_workers):
    options = {"num_workers": num_workers}
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=5 if num_workers else 1)
    trainer = {"max_steps": 12}
    whole = fit(data(folder, **options), callbacks=[saving], **trainer)
    assert len(whole.seen) == 12
    checkpoints = list(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) == (2 if num_workers else 12)
    for checkpoint in checkpoints:
        resumed = fit(data(folder, **options), ckpt_path=str(checkpoint), **trainer)
        assert resumed.seen == whole.seen[12 - len(resumed.seen) :], checkpoint.name
        assert resumed.weight.item() == whole.weight.item()


def test_interruptions_in_a_row_and_more_steps(folder, tmp_path):
    whole = fit(data(folder), max_steps=24, accumulate_grad_batches=2)
    seen, checkpoint = [], None
    for steps in (5, 6, 13, 24):
        saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=True)
        trainer = {"max_steps": steps, "accumulate_grad_batches": 2, "callbacks": [saving]}
        module = fit(data(folder), ckpt_path=checkpoint, **trainer)
        seen += module.seen
        checkpoint = str(tmp_path / f"step={steps}.ckpt")
    assert seen == whole.seen
    assert module.weight.item() == whole.weight.item()


def test_validation_within_a_stream(folder, tmp_path):
    validation = str(write_chats(tmp_path / "validation.jsonl", 5, first=100))
    module = fit(data(folder, validation=validation), max_steps=6, val_check_interval=2)
    assert module.validated_after == [2, 4, 6]
    assert sorted(set(itertools.chain.from_iterable(module.evaluated))) == list(range(5))


def test_rows_of_recent_batches_can_be_named(folder):
    module = Recorder()
    batches = data(folder)
    fit(batches, module, max_steps=3)
    rows = module.seen[-1][2]
    assert [origin.line for origin in batches.origins(rows)] == list(rows)
    assert batches.stream_report is not None
    assert batches.stream_report.rows_read >= 8


def test_a_stream_needs_an_end(folder):
    with pytest.raises(MisconfigurationException, match=r"Write --trainer.max_steps N"):
        fit(data(folder), max_epochs=1)


def test_a_stream_cannot_hold_rows_out(folder):
    with pytest.raises(MisconfigurationException, match="Write a validation source"):
        data(folder, validation_fraction=0.1)


def test_another_number_of_workers_is_refused(folder, tmp_path):
    fit(data(folder), max_steps=2, callbacks=[ModelCheckpoint(tmp_path, every_n_train_steps=2)])
    (checkpoint,) = map(str, tmp_path.glob("*.ckpt"))
    with pytest.raises(MisconfigurationException, match=r"changed: shards\."):
        fit(data(folder, num_workers=2), max_steps=4, ckpt_path=checkpoint)
    with pytest.raises(MisconfigurationException, match=r"changed: shuffle_buffer\."):
        fit(data(folder, shuffle_buffer=9), max_steps=4, ckpt_path=checkpoint)
