from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from tiny import tiny_tokenizer

from lightning_qlora.data import encoding, preparation
from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.data.encoding import RowEncoder
from lightning_qlora.data.preparation import CHUNK_ROWS, Prepared, prepare
from lightning_qlora.data.prepared import DOCUMENTS_FILE, PreparedDocuments
from lightning_qlora.data.report import PreparationReport, SourceReport
from lightning_qlora.data.sources import DataSource
from lightning_qlora.data.truncation import Shortened
from lightning_qlora.schema import Origin, RowRefused, TokenizedRow


def write_chats(path: Path, count: int, *, first: int = 0, words: int = 6) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Question {i}: " + "what " * (i % words)},
                {"role": "assistant", "content": f"Answer {i} " + "yes " * (i % 5)},
            ]
        }
        for i in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def encoder(tokenizer=None, supervise="all", template_kwargs=None, **options) -> RowEncoder:
    chat = ChatTemplate(tokenizer or tiny_tokenizer(), supervise=supervise, template_kwargs=template_kwargs)
    return RowEncoder(chat, **options)


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write_chats(tmp_path / "chats.jsonl", 20)


def contents(prepared: Prepared) -> list[tuple[list[int], list[list[int]], Origin]]:
    documents = prepared.documents
    return [(d.input_ids.tolist(), d.supervised.tolist(), documents.origin(i)) for i, d in enumerate(documents)]


def test_rows_are_stored_as_they_were_encoded_in_order(chats, tmp_path):
    enc = encoder()
    prepared = prepare(str(chats), enc, cache_dir=tmp_path / "cache")
    assert len(prepared.documents) == 20
    for number, document in enumerate(prepared.documents):
        assert document.row_id == number
        assert prepared.documents.origin(number) == Origin(str(chats), number + 1)
    line = json.loads(chats.read_text().splitlines()[3])
    expected = enc.chat.encode(
        next(iter_rows(chats, 3)),
    )
    assert prepared.documents[3].input_ids.tolist() == expected.input_ids
    flags = [any(a <= t < b for a, b in prepared.documents[3].supervised) for t in range(len(expected.input_ids))]
    assert flags == expected.supervised
    answer = [t for t, s in zip(expected.input_ids, expected.supervised, strict=True) if s]
    assert line["messages"][1]["content"] in enc.chat.tokenizer.decode(answer)


def iter_rows(path: Path, skip: int):
    from lightning_qlora.data.sources import read_rows

    return read_rows(str(path), skip=skip)


def test_columns_agree_with_the_documents(chats, tmp_path):
    documents = prepare(str(chats), encoder(), cache_dir=tmp_path).documents
    assert documents.lengths.tolist() == [len(d.input_ids) for d in documents]
    assert documents.num_supervised.tolist() == [
        int((d.supervised[:, 1] - d.supervised[:, 0]).sum()) for d in documents
    ]
    assert len(set(documents.digests.tolist())) == 20
    assert documents.parts.tolist() == [0] * 20
    with pytest.raises(IndexError):
        documents[20]


def test_datasets_can_read_the_file(chats, tmp_path):
    import datasets

    documents = prepare(str(chats), encoder(), cache_dir=tmp_path).documents
    table = datasets.Dataset.from_file(str(documents.path))
    assert table.num_rows == 20
    assert table[2]["input_ids"] == documents[2].input_ids.tolist()


def test_many_record_batches_read_like_one(tmp_path):
    chats = write_chats(tmp_path / "many.jsonl", 2 * CHUNK_ROWS + 7)
    documents = prepare(str(chats), encoder(), cache_dir=tmp_path).documents
    assert len(documents) == 2 * CHUNK_ROWS + 7
    for number in (0, CHUNK_ROWS - 1, CHUNK_ROWS, 2 * CHUNK_ROWS + 6):
        assert documents.origin(number).line == number + 1
        assert len(documents[number].input_ids) == documents.lengths[number]


def test_long_rows_are_encoded_fewer_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "CHUNK_CHARACTERS", 40)
    sizes = []

    class Counting(RowEncoder):
        def __call__(self, part, rows):
            sizes.append((len(rows), sum(len(m.content) for row in rows for m in row.messages)))
            return super().__call__(part, rows)

    whole = write_chats(tmp_path / "many.jsonl", 30)
    few = prepare(str(whole), Counting(encoder().chat), cache_dir=tmp_path / "few")
    assert len(sizes) > 5
    assert all(characters >= 40 or rows == sizes[-1][0] for rows, characters in sizes)
    assert max(rows for rows, _ in sizes) < 10
    monkeypatch.undo()
    assert contents(few) == contents(prepare(str(whole), RowEncoder(encoder().chat), cache_dir=tmp_path / "all"))


@pytest.mark.parametrize("frozen_before", [False, True])
def test_the_collector_gets_its_objects_back(chats, tmp_path, frozen_before):
    if frozen_before:
        gc.freeze()
    try:
        prepare(str(chats), encoder(), cache_dir=tmp_path)
        assert bool(gc.get_freeze_count()) == frozen_before
    finally:
        gc.unfreeze()


def test_every_row_is_accounted_for(tmp_path):
    lines = write_chats(tmp_path / "rows.jsonl", 6).read_text().splitlines()
    lines[2] = "{broken"
    lines[4] = json.dumps({"messages": [{"role": "user", "content": "hi"}]})
    lines.append(lines[0])
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    prepared = prepare(str(tmp_path / "rows.jsonl"), encoder(), cache_dir=tmp_path, max_invalid_fraction=0.5)
    report = prepared.report
    assert (report.rows_read, report.rows_kept) == (7, 5)
    assert report.refused == {"broken-json": 1, "no-assistant-turn": 1}
    assert [example["place"].rsplit("/")[-1] for example in report.examples] == ["rows.jsonl:3", "rows.jsonl:5"]
    assert report.num_duplicates == 1
    assert report.truncation == {"fits": 5, "turns-dropped": 0, "cut-start": 0, "cut-end": 0, "too-long": 0}
    assert report.num_tokens == prepared.documents.lengths.sum()
    assert report.num_supervised_tokens == prepared.documents.num_supervised.sum()
    assert report.length_percentiles[100] == prepared.documents.lengths.max()
    assert [prepared.documents.origin(i).line for i in range(5)] == [1, 2, 4, 6, 7]


def test_long_rows_are_counted_by_outcome(tmp_path):
    turns = [{"role": r, "content": f"{r} " * 8} for _ in range(4) for r in ("user", "assistant")]
    long_answer = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "long " * 200}]
    short = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (turns, long_answer, short)))
    full = prepare(str(path), encoder(), cache_dir=tmp_path).documents.lengths
    limit = int(full[0]) - 1
    report = prepare(str(path), encoder(max_length=limit), cache_dir=tmp_path, max_invalid_fraction=0.5).report
    assert report.truncation == {"fits": 1, "turns-dropped": 1, "cut-start": 0, "cut-end": 0, "too-long": 1}
    assert report.refused == {"too-long": 1}
    assert report.invalid_rows() == 1
    assert sum(report.full_lengths.values()) == 3
    assert report.rows_longer_than(0) == 3
    assert report.rows_longer_than(32 * 100) == 0
    dropping = prepare(str(path), encoder(max_length=limit, overlong="drop_row"), cache_dir=tmp_path).report
    assert dropping.refused == {"too-long": 2}
    assert dropping.invalid_rows() == 0  # asked for, so it stops no run
    cut = prepare(str(path), encoder(max_length=limit, overlong="keep_start"), cache_dir=tmp_path)
    assert cut.report.truncation["cut-end"] == 2
    assert cut.documents.lengths.max() == limit


def test_sources_are_reported_and_marked_apart(tmp_path):
    first, second = write_chats(tmp_path / "a.jsonl", 3), write_chats(tmp_path / "b.jsonl", 5, first=3)
    prepared = prepare([str(first), DataSource(str(second), weight=2.0)], encoder(), cache_dir=tmp_path)
    assert [(s.name, s.rows_read) for s in prepared.report.sources] == [(str(first), 3), (str(second), 5)]
    assert prepared.documents.parts.tolist() == [0] * 3 + [1] * 5
    assert prepared.documents.sources == [str(first), str(second)]
    assert [prepared.documents.origin(row) for row in (2, 3)] == [Origin(str(first), 3), Origin(str(second), 1)]


def test_worker_processes_give_the_same(tmp_path):
    path = write_chats(tmp_path / "rows.jsonl", 2 * CHUNK_ROWS + 40)
    lines = path.read_text().splitlines()
    lines[5] = "null"
    lines[CHUNK_ROWS] = "[]"
    path.write_text("\n".join(lines))
    here = prepare(str(path), encoder(), cache_dir=tmp_path / "one")
    there = prepare(str(path), encoder(), cache_dir=tmp_path / "two", num_proc=2)
    assert contents(here) == contents(there)
    assert here.documents.path.read_bytes() == there.documents.path.read_bytes()
    assert here.report.to_dict() == there.report.to_dict()
    assert here.report.rows_read == 2 * CHUNK_ROWS + 40


# The cache


def cached_folders(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.iterdir() if p.is_dir())


def test_a_second_run_reads_the_cache(chats, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = prepare(str(chats), encoder(), cache_dir=cache)
    monkeypatch.setattr(preparation, "_build", lambda *_: pytest.fail("prepared again"))
    second = prepare(str(chats), encoder(), cache_dir=cache)
    assert contents(first) == contents(second)
    assert second.report.to_dict() == first.report.to_dict()
    assert second.identity == first.identity
    assert [p for p in cache.iterdir() if p.name.endswith(".tmp")] == []


def _change_data(path: Path, enc: RowEncoder, _) -> RowEncoder:
    path.write_text(path.read_text().replace("Answer 7", "Reply 77"))
    return enc


def _change_template(_path: Path, _enc: RowEncoder, _) -> RowEncoder:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("helpful", "useful")
    assert tokenizer.chat_template != tiny_tokenizer().chat_template
    return encoder(tokenizer)


def _change_tokenizer(_path: Path, _enc: RowEncoder, _) -> RowEncoder:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["Question"])
    return encoder(tokenizer)


def _change_code(_path: Path, enc: RowEncoder, monkeypatch) -> RowEncoder:
    monkeypatch.setattr(encoding, "_code_digest", lambda: "another version")
    return enc


def _change(**options):
    return lambda _path, _enc, _: encoder(**options)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_change_data, "data"),
        (_change_template, "chat_template"),
        (_change_tokenizer, "tokenizer"),
        (_change(max_length=100), "length_and_supervision_policy"),
        (_change(overlong="keep_end"), "length_and_supervision_policy"),
        (_change(supervise="last"), "length_and_supervision_policy"),
        (_change(template_kwargs={"x": 1}), "chat_template"),
        (_change_code, "code"),
    ],
)
def test_each_ingredient_makes_another_cache(chats, tmp_path, monkeypatch, change, named):
    cache = tmp_path / "cache"
    before = prepare(str(chats), encoder(), cache_dir=cache)
    changed = change(chats, encoder(), monkeypatch)
    after = prepare(str(chats), changed, cache_dir=cache)
    assert len(cached_folders(cache)) == 2
    differing = {name for name in before.identity if before.identity[name] != after.identity[name]}
    assert differing == {named}


def test_touching_a_file_changes_nothing(chats, tmp_path):
    prepare(str(chats), encoder(), cache_dir=tmp_path / "cache")
    os.utime(chats, (1, 1))
    prepare(str(chats), encoder(), cache_dir=tmp_path / "cache")
    assert len(cached_folders(tmp_path / "cache")) == 1


@pytest.mark.parametrize("damage", ["cut", "no-manifest", "broken-manifest"])
def test_a_damaged_cache_is_made_anew(chats, tmp_path, damage):
    cache = tmp_path / "cache"
    before = contents(prepare(str(chats), encoder(), cache_dir=cache))
    (name,) = cached_folders(cache)
    documents, manifest = cache / name / DOCUMENTS_FILE, cache / name / "manifest.json"
    if damage == "cut":
        os.truncate(documents, documents.stat().st_size // 2)
    elif damage == "no-manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text()[:50])
    assert contents(prepare(str(chats), encoder(), cache_dir=cache)) == before


def test_a_failure_leaves_nothing_behind(chats, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(preparation, "_flush_to_disk", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        prepare(str(chats), encoder(), cache_dir=cache)
    assert [p.name for p in cache.iterdir() if not p.name.endswith(".lock")] == []
    monkeypatch.undo()
    assert len(prepare(str(chats), encoder(), cache_dir=cache).documents) == 20


def test_leftovers_of_a_killed_process_are_swept(chats, tmp_path):
    cache = tmp_path / "cache"
    prepare(str(chats), encoder(), cache_dir=cache)
    (name,) = cached_folders(cache)
    (cache / name).rename(cache / f".{name}.dead.tmp")
    (cache / ".other.dead.tmp").mkdir()
    prepare(str(chats), encoder(), cache_dir=cache)
    assert cached_folders(cache) == [".other.dead.tmp", name]


def _prepare_in_process(path: str, cache: str, results) -> None:
    built = []
    original = preparation._build
    preparation._build = lambda *args: (built.append(1), original(*args))
    prepared = prepare(path, encoder(), cache_dir=Path(cache))
    results.put((len(built), len(prepared.documents)))


def test_processes_at_once_prepare_once(chats, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = (str(chats), str(tmp_path / "cache"), results)
    processes = [context.Process(target=_prepare_in_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(outcomes) == [(0, 20), (0, 20), (1, 20)]


def test_a_folder_that_cannot_be_written_is_named(chats, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"cannot be written to .*file/cache: Not a directory\. Write --data.cache_dir"
    ):
        prepare(str(chats), encoder(), cache_dir=tmp_path / "file" / "cache")


def _hold_lock(path: str, held, released) -> None:
    with FileLock(path):
        held.set()
        released.wait(30)


def test_waiting_for_another_process_is_said(chats, tmp_path, caplog):
    prepared = prepare(str(chats), encoder(), cache_dir=tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache" / prepared.report.fingerprint)
    context = multiprocessing.get_context("fork")
    held, released = context.Event(), context.Event()
    lock = str(tmp_path / "cache" / f".{prepared.report.fingerprint}.lock")
    process = context.Process(target=_hold_lock, args=(lock, held, released))
    process.start()
    assert held.wait(30)
    timer = threading.Timer(0.3, released.set)
    timer.start()
    with caplog.at_level("INFO"):
        prepare(str(chats), encoder(), cache_dir=tmp_path / "cache")
    timer.join()
    process.join()
    assert "Waiting for another process" in caplog.text


def test_documents_pickle_as_their_path(chats, tmp_path):
    import pickle

    documents = prepare(str(chats), encoder(), cache_dir=tmp_path).documents
    data = pickle.dumps(documents)
    assert len(data) < 1000
    copy = pickle.loads(data)
    assert isinstance(copy, PreparedDocuments)
    np.testing.assert_array_equal(copy[4].input_ids, documents[4].input_ids)


# Verdicts on the whole


def test_too_many_refusals_stop_with_the_table(tmp_path):
    lines = write_chats(tmp_path / "rows.jsonl", 10).read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, "{", "{"]))
    source, cache = str(tmp_path / "rows.jsonl"), tmp_path / "cache"
    with pytest.raises(ValueError, match=r"2 of 12 rows cannot be used \(16.7%\), more than the allowed 5.0%") as error:
        prepare(source, encoder(), cache_dir=cache)
    assert "2  broken-json" in str(error.value)
    assert "rows.jsonl:11: " in str(error.value)
    assert "max_invalid_fraction: 0.17" in str(error.value)
    assert len(prepare(source, encoder(), cache_dir=cache, max_invalid_fraction=0.17).documents) == 10


def test_no_usable_row_stops(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{\n{\n")
    with pytest.raises(ValueError, match=r"No row of .*rows.jsonl can be used:\n.*2 rows read, 0 kept"):
        prepare(str(tmp_path / "rows.jsonl"), encoder(), cache_dir=tmp_path, max_invalid_fraction=1.0)


def test_empty_file_stops(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"holds no rows"):
        prepare(str(tmp_path / "rows.jsonl"), encoder(), cache_dir=tmp_path)


def test_report_survives_json_and_shows_a_table():
    report = PreparationReport("f", 10, "drop_row")
    source = SourceReport("a")
    row = TokenizedRow([1, 2, 3], [False, True, True], Origin("a", 1))
    source.add(Shortened(row, "fits", 3))
    for line in range(2, 7):
        refusal = RowRefused("too-long", "too many", Origin("a", line))
        source.add(Shortened(refusal, "too-long", 90 + line))
    source.refuse(RowRefused("broken-json", "no", Origin("a", 7)))
    report.sources = [source]
    report.check()
    again = PreparationReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again == report
    assert report.refused == {"too-long": 5, "broken-json": 1}
    assert report.full_lengths == {32: 1, 96: 5}
    assert [e["place"] for e in source.examples] == ["a:2", "a:3", "a:4", "a:7"]
    assert report.table().splitlines()[:2] == ["a: 7 rows read, 1 kept", "         5  too-long"]
    assert "a:7: no" in report.table()
    broken = replace(report, sources=[replace(source, rows_read=8)])
    with pytest.raises(AssertionError, match="8 rows read, 7 accounted for"):
        broken.check()


def test_merged_counts_equal_counts_in_one_go():
    rows = [RowRefused(f"r{i % 2}", "d", Origin("a", i)) for i in range(9)]
    whole, parts = SourceReport("a"), [SourceReport("x"), SourceReport("y")]
    for i, row in enumerate(rows):
        whole.refuse(row)
        parts[i // 5].refuse(row)
    merged = SourceReport("a")
    for part in parts:
        merged.merge(part)
    assert merged == whole
