from __future__ import annotations

import itertools
import json
import os
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
from lightning_qlora.data.sources import DataSource
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
        assert len(item.batch["row_ids"]) == len(item.origins)
        assert all(type(row) is int and 0 <= row < 2**63 for row in item.batch["row_ids"])  # torch's int64 holds them
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


def write_questions(path: Path, usable: list[bool]) -> str:
    rows = [{"prompt": f"Q{i}", "completion": "A" if good else ""} for i, good in enumerate(usable)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("usable", "buffer"),
    [([False] * 3000 + [True] * 300, 100), ([True, False] * 1500, 1)],
    ids=["whole windows are refused", "every other row is refused"],
)
def test_refused_rows_stop_the_stream_whatever_the_buffer(tmp_path, usable, buffer):
    source = write_questions(tmp_path / "rows.jsonl", usable)
    with pytest.raises(ValueError, match=r"of the first 1000 rows .* more than the allowed 5.0%") as error:
        one_epoch(stream(tmp_path, sources=source, shuffle_buffer=buffer))
    assert f"{source}:" in str(error.value)


def test_refused_windows_are_counted_once_with_the_next_batch_also_after_a_resume(tmp_path):
    usable = [True] * 4 + [False] * 12 + [True] * 4 + [False] * 6
    batches = {"sources": write_questions(tmp_path / "rows.jsonl", usable), "shuffle_buffer": 2}
    batches |= {"batching": Batching(False, None, 1)}

    def counts(items: list[StreamItem]) -> list[tuple[int, int]]:
        reports = [item.report for item in items]
        return [(r.rows_read, sum(r.refused.values())) if r else (0, 0) for r in reports]

    whole = list(itertools.islice(stream(tmp_path, **batches), 9))
    assert counts(whole) == [(2, 0), (0, 0), (2, 0), (0, 0), (14, 12), (0, 0), (2, 0), (0, 0), (8, 6)]
    assert whole[-1].state["epoch"] == 1
    resumed = list(itertools.islice(stream(tmp_path, **batches, states={0: whole[3].state}), 5))
    # The window of the checkpoint is read again, by a process that has not counted it.
    assert counts(resumed) == [(16, 12), *counts(whole[5:])]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_report_of_a_stream_counts_all_rows_of_all_workers(tmp_path, num_workers):
    source = Path(write_questions(tmp_path / "rows.jsonl", [True] * 4 + [False] * 12 + [True] * 4))
    options = {"packing": False, "tokens_per_batch": None, "batch_size": 1, "num_workers": num_workers}
    module = make_data(source, tmp_path / "cache", streaming=True, shuffle_buffer=2, **options)
    for _ in itertools.islice(module.train_dataloader(), 8):  # an epoch
        pass
    report = module.stream_report
    assert report is not None
    assert (report.rows_read, report.rows_kept, report.refused) == (20, 8, {"empty-answer": 12})


@pytest.mark.timeout(60)
@pytest.mark.parametrize("before", ["true", None])
def test_workers_do_not_wait_for_threads_that_only_their_parent_has(folder, monkeypatch, before, capfd):
    name = "TOKENIZERS_PARALLELISM"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)  # as the command line does
    tiny_tokenizer().backend_tokenizer.encode_batch(["one two three"] * 100)  # in threads
    module = data(folder, num_workers=2)
    assert len(list(itertools.islice(module.train_dataloader(), 4))) == 4
    assert os.environ.get(name) == before
    assert "got forked" not in capfd.readouterr().err


def test_rows_that_the_user_asked_to_be_dropped_stop_no_stream(tmp_path):
    source = str(write_chats(tmp_path / "rows.jsonl", 1100))
    encoder = RowEncoder(ChatTemplate(tiny_tokenizer()), 48, "drop_row")
    report = next(iter(stream(tmp_path, sources=source, encoder=encoder, shuffle_buffer=1100))).report
    assert report is not None
    assert report.rows_read == 1100
    assert report.refused["too-long"] > 0.05 * 1100


def test_a_pass_without_a_usable_row_stops_with_the_reasons(tmp_path):
    source = write_questions(tmp_path / "rows.jsonl", [False] * 2)
    with pytest.raises(ValueError, match=r"A whole pass over the data gave no usable row:\n +2  empty-answer\n"):
        next(iter(stream(tmp_path, sources=source)))
    with pytest.raises(ValueError, match=r"A whole pass over share 2 of 2 of the data gave no usable row:\n +1  "):
        next(iter(stream(tmp_path, sources=source, rank=1, world_size=2)))


def test_a_share_without_rows_is_not_blamed_on_the_data(tmp_path):
    source = write_chats(tmp_path / "rows.jsonl", 3)
    assert lines(one_epoch(stream(tmp_path, sources=str(source), rank=2, world_size=3))) == [3]
    with pytest.raises(ValueError, match=r"Share 4 of 4 of the data got no row: .* Lower num_workers"):
        next(iter(stream(tmp_path, sources=str(source), rank=3, world_size=4)))
    little = DataSource(str(source), weight=0.01)
    with pytest.raises(ValueError, match="The weights of the train sources leave no row"):
        next(iter(stream(tmp_path, sources=little)))


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
    assert len(batches.origins(module.seen[-1][2])) == len(module.seen[-1][2])
    assert batches.stream_report is not None
    assert batches.stream_report.rows_read >= 8


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_of_several_files_are_named_by_their_file_also_after_a_resume(tmp_path, num_workers):
    for name in "ab":
        rows = [{"prompt": "Q", "completion": f"{name}{line}"} for line in range(1, 11)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"packing": False, "tokens_per_batch": None, "batch_size": 1, "num_workers": num_workers}

    class Naming(Recorder):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            (origin,) = batches.origins(batch["row_ids"])
            said = batches.tokenizer.decode(batch["targets"])
            assert said.startswith(f"{Path(origin.source).stem}{origin.line}<")
            return super().training_step(batch, batch_idx)

    def train(steps: int, ckpt_path: str | None = None) -> list[Any]:
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=steps)
        return fit(batches, Naming(), max_steps=steps, callbacks=[saving], ckpt_path=ckpt_path).seen

    batches = make_data(tmp_path, tmp_path / "cache", streaming=True, shuffle_buffer=8, **options)
    first = train(13)
    batches = make_data(tmp_path, tmp_path / "cache", streaming=True, shuffle_buffer=8, **options)
    rest = train(20, str(tmp_path / "step=13.ckpt"))
    assert len({rows for _, _, rows in first + rest}) == 20


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
