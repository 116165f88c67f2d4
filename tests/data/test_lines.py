"""Lines that workers read come to the same as lines that are read here, whatever stands in them."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import tiny_tokenizer

from lightning_qlora.data import lines, preparation
from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.data.encoding import RowEncoder
from lightning_qlora.data.lines import JsonLine, RowParser
from lightning_qlora.data.preparation import Prepared, prepare
from lightning_qlora.data.readers import BOM
from lightning_qlora.data.sources import DataSource, read_lines, read_rows
from lightning_qlora.schema import Conversation, Message, Origin, RowRefused

ORIGIN = Origin("rows.jsonl", 7)
BAD = {
    "broken-json": b'{"prompt": "a", ',
    "invalid-utf8": b'{"prompt": "\xff", "completion": "b"}',
    "duplicate-key": b'{"prompt": "a", "prompt": "b", "completion": "c"}',
    "nul-character": b'{"prompt": "\\u0000", "completion": "b"}',
    "unpaired-surrogate": b'{"prompt": "\\ud800", "completion": "b"}',
    "nested-too-deep": b"[" * 100_000,
    "not-an-object": b"null",
    "unknown-shape": b'{"label": 3}',
    "empty-answer": b'{"prompt": "a", "completion": " "}',
    "pair-for-supervised-run": b'{"prompt": "a", "chosen": "b", "rejected": "c"}',
}


def good(number: int) -> bytes:
    return json.dumps({"prompt": f"Question {number}", "completion": "yes \u00fc " * (1 + number % 5)}).encode()


@pytest.mark.parametrize("reason", BAD)
def test_a_line_says_why_it_is_no_row(reason):
    refused = JsonLine(BAD[reason], ORIGIN, RowParser("auto", None, "sft")).parse()
    assert isinstance(refused, RowRefused)
    assert (refused.reason, refused.origin) == (reason, ORIGIN)


def test_a_line_becomes_what_its_source_asks_for():
    line = json.dumps({"question": "hi", "chosen": "a", "rejected": "b"}).encode()
    parser = RowParser("preference", {"prompt": "question"}, "sft")
    expected = Conversation((Message("user", "hi"), Message("assistant", "a")), ORIGIN)
    assert JsonLine(line, ORIGIN, parser).parse() == expected


def test_lines_travel_as_they_stand(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(BOM + BAD["invalid-utf8"] + b"\n \r\n" + good(1) + b"\r\n")
    found = list(read_lines(str(path)))
    assert [(line.content, line.origin.line) for line in found] == [(BAD["invalid-utf8"], 1), (good(1), 3)]
    assert pickle.loads(pickle.dumps(found)) == found
    assert [str(line.parse()) for line in found] == [str(row) for row in read_rows(str(path))]


def test_rows_that_are_no_lines_are_parsed_where_they_are_read(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"prompt": "a", "completion": "b"},\n{"prompt": 1, "completion": "b"}]')
    kept, refused = read_lines(str(path))
    assert isinstance(kept, Conversation)
    assert (refused.reason, refused.origin.line) == ("content-not-text", 2)


def write_mess(path: Path, count: int) -> Path:
    """Good lines with every kind of bad one between them, blank lines, byte order marks and one huge line."""
    bad = [*BAD.values(), b"", b" \t", BOM]
    content = [BOM + good(0)]
    for number in range(1, count):
        content.append(good(number))
        if number % 3 == 0:
            content.append(bad[(number // 3) % len(bad)])
    content.insert(5, json.dumps({"prompt": "x" * 100_000, "completion": "b"}).encode())
    path.write_bytes(b"\r\n".join(content))
    return path


@pytest.fixture
def sources(tmp_path) -> list[str | DataSource]:
    """A mix of all that rows are read from."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [json.loads(good(number)) for number in range(30)] + [{"prompt": "a", "completion": ""}]
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(write_mess(tmp_path / "b.jsonl", 60).read_bytes()))
    (folder / "b.json").write_text(json.dumps(rows))
    (folder / "c.json").write_bytes(b"\n".join([good(1), BAD["broken-json"], good(2)]))  # lines under a wrong name
    pq.write_table(pa.Table.from_pylist(rows), folder / "d.parquet")
    (folder / "e.csv").write_text("prompt,completion\nhi,yes\n,no\n")
    (tmp_path / "few.jsonl").write_bytes(b"\n".join(map(good, range(90))))
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_text('{"q": "hi", "a": "yes", "text": "stray"}\n{"q": "hi"}\n')
    return [
        str(tmp_path / "b.jsonl"),
        DataSource(str(folder), weight=2.0),
        DataSource(str(tmp_path / "few.jsonl"), max_rows=11),
        DataSource(str(renamed), columns={"prompt": "q", "completion": "a"}),
    ]


def test_any_number_of_processes_gives_the_same(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "CHUNK_ROWS", 16)

    def prepared(num_proc: int) -> Prepared:
        encoder = RowEncoder(ChatTemplate(tiny_tokenizer()), max_length=400)
        return prepare(
            sources, encoder, cache_dir=tmp_path / str(num_proc), num_proc=num_proc, max_invalid_fraction=1.0
        )

    here = prepared(1)
    assert set(BAD) | {"too-long", "missing-column", "empty-user-turn"} <= set(here.report.refused)
    rows = [row for source in sources for row in read_rows(source)]
    assert here.report.rows_read == len(rows)
    assert here.report.rows_kept == sum(not isinstance(row, RowRefused) for row in rows) - 2  # the huge line, twice
    first = next(example for example in here.report.examples if example["reason"] == "invalid-utf8")
    assert first["place"] == f"{tmp_path / 'b.jsonl'}:5"
    for num_proc in (2, 3):
        there = prepared(num_proc)
        assert there.documents.path.read_bytes() == here.documents.path.read_bytes()
        assert there.documents.sources == here.documents.sources
        assert json.dumps(there.report.to_dict()) == json.dumps(here.report.to_dict())


def test_workers_read_the_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "CHUNK_ROWS", 16)
    monkeypatch.setattr(lines, "decode_json", lambda _: pytest.fail("decoded where the file is read"))
    path = write_mess(tmp_path / "rows.jsonl", 60)
    encoder = RowEncoder(ChatTemplate(tiny_tokenizer()))
    report = prepare(str(path), encoder, cache_dir=tmp_path, num_proc=2, max_invalid_fraction=1.0).report
    assert report.rows_kept == 60
