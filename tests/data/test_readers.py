"""Malformed JSON files: each bad row named with its line, the good ones unchanged, the counts exact."""

from __future__ import annotations

import builtins
import gzip
import json

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qlora.data.lines import decode_line
from lightning_qlora.data.readers import BOM, Selection, read_json, read_json_lines
from lightning_qlora.schema import Origin, RowRefused

ALL = Selection()
GOOD = {"prompt": "Grüße \u2028 \U0001f600", "completion": "x\ny"}
LINE = json.dumps(GOOD, ensure_ascii=False).encode()


def decoded(entries):
    """The entries of a reader, their lines decoded."""
    for entry in entries:
        lazy = entry is not None and isinstance(entry[1], bytes)
        yield (entry[0], decode_line(entry[1], entry[0])) if lazy else entry


def verdict(entry):
    origin, row = entry
    return origin.line, row.reason if isinstance(row, RowRefused) else row


MALFORMED = {
    "not json": (b"hello", "broken-json"),
    "cut off": (LINE[:-5], "broken-json"),
    "two objects": (b"{} {}", "broken-json"),
    "two objects without a space": (LINE + LINE, "broken-json"),
    "trailing comma": (b'{"a": 1,}', "broken-json"),
    "trailing comma after the row": (LINE + b",", "broken-json"),
    "single quotes": (b"{'a': 1}", "broken-json"),
    "comment": (b"// note", "broken-json"),
    "python literal": (b'{"a": None}', "broken-json"),
    "raw control character": (b'{"a": "x\ty\x01"}', "broken-json"),
    "bad escape": (rb'{"a": "\x41"}', "broken-json"),
    "unquoted key": (b'{a: "b"}', "broken-json"),
    "unclosed text": (b'{"a": "b}', "broken-json"),
    "lone bracket": (b"[", "broken-json"),
    "huge integer": (b'{"a": ' + b"9" * 5000 + b"}", "broken-json"),
    "carriage return only": (b'{"a": 1}\r{"a": 2}', "broken-json"),
    "invalid byte": (b'{"a": "\xff"}', "invalid-utf8"),
    "latin-1": ('{"a": "Köln"}'.encode("latin-1"), "invalid-utf8"),
    "cut in a character": ('{"a": "ö'.encode()[:-1], "invalid-utf8"),
    "surrogate bytes": (b'{"a": "\xed\xa0\x80"}', "invalid-utf8"),
    "utf-16": ('{"a": "ö"}'.encode("utf-16"), "invalid-utf8"),
    "NUL byte": (b'{"a": "x\x00y"}', "nul-character"),
    "only NULs": (b"\x00" * 9, "nul-character"),
    "duplicate key": (b'{"a": 1, "a": 2}', "duplicate-key"),
    "duplicate key inside": (b'{"a": [{"b": 1, "b": 1}]}', "duplicate-key"),
    "NaN": (b'{"a": NaN}', "not-finite-number"),
    "infinity": (b'{"a": [-Infinity]}', "not-finite-number"),
    "too deep": (b"[" * 100_000, "nested-too-deep"),
    "too deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested-too-deep"),
    "git conflict": (b"<<<<<<< HEAD", "broken-json"),
    # JSON, but no row: the verdict is the parser's, after this module
    "null": (b"null", None),
    "a number": (b"12", 12),
    "a list": (b"[1]", [1]),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_bad_line_costs_itself_only(case, tmp_path):
    bad, expected = MALFORMED[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINE + b"\n" + bad + b"\n\n" + LINE + b"\r\n")

    entries = list(decoded(read_json_lines(path, "rows.jsonl", ALL)))

    assert [verdict(entry) for entry in entries] == [(1, GOOD), (2, expected), (4, GOOD)]
    if isinstance(entries[1][1], RowRefused):
        assert str(entries[1][1]).startswith(f"rows.jsonl:2: {expected}: ")
        str(entries[1][1]).encode()


def test_blank_lines_byte_order_marks_and_a_missing_last_line_break(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(BOM + LINE + b"\r\n" + b"\n \t\r\n\n" + BOM + LINE)
    assert [verdict(entry) for entry in decoded(read_json_lines(path, "f", ALL))] == [(1, GOOD), (5, GOOD)]


@settings(max_examples=150, deadline=None)
@given(
    lines=st.lists(
        st.binary(max_size=20)
        | st.sampled_from([LINE, b"{}", b"", b" ", b"\x00", BOM, b'{"a":1,"a":2}', b'"\xff"', b"NaN"]),
        max_size=8,
    )
)
def test_every_line_that_is_not_blank_is_accounted_for(lines, tmp_path_factory):
    content = b"\n".join(lines)
    path = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    path.write_bytes(content)
    filled = [n for n, line in enumerate(content.split(b"\n"), 1) if line.removeprefix(BOM).strip()]

    entries = list(decoded(read_json_lines(path, "f", ALL)))

    assert [origin.line for origin, _ in entries] == filled


def as_zst(content: bytes) -> bytes:
    half = len(content) // 2  # two frames, as `cat a.zst b.zst` makes them
    return zstandard.compress(content[:half]) + zstandard.compress(content[half:])


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", as_zst), (".GZ", gzip.compress)])
def test_compressed_lines_and_damaged_archives(suffix, compress, tmp_path):
    content = b"".join(b'{"n": %d}\n' % n for n in range(20_000))
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(compress(content))
    assert [row["n"] for _, row in decoded(read_json_lines(path, "f", ALL))] == list(range(20_000))

    for damaged in (compress(content)[:-200], compress(content)[:-1], content):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            list(read_json_lines(path, "f", ALL))


def test_zst_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    def missing(name, *args, **kwargs):
        if name == "zstandard":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", missing)
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(as_zst(LINE))
    with pytest.raises(ValueError, match=r"pip install 'lightning_qlora\[zstd\]'"):
        list(read_json_lines(path, "f", ALL))


def test_selection_by_position(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(b'{"n": %d}\n\n' % n for n in range(10)))
    entries = list(decoded(read_json_lines(path, "f", Selection(skip=13, shard=1, num_shards=3), first=10)))
    assert len(entries) == 10
    assert [entry[1]["n"] for entry in entries if entry] == [3, 6, 9]
    assert entries[3][0] == Origin("f", 7)


DOCUMENTS = {
    "list": ('[{"n": 1}, {"n": 2}]', [(1, {"n": 1}), (2, {"n": 2})]),
    "list on lines": ('\ufeff[\n{"n": 1},\n\n  {"n": 2}\n]\n', [(2, {"n": 1}), (4, {"n": 2})]),
    "empty list": (" [ ] ", []),
    "empty file": ("", []),
    "wrapped list": (
        '{"version": {"a": [1]}, "data": [\n{"n": 1},\n{"n": 2}], "x": 1}',
        [(2, {"n": 1}), (3, {"n": 2})],
    ),
    "one row": ('{"prompt": "a",\n "completion": "b"}', [(1, {"prompt": "a", "completion": "b"})]),
    "lines under a wrong name": ('{"n": 1}\n\n{"n": 2}\n{"n"', [(1, {"n": 1}), (3, {"n": 2}), (4, "broken-json")]),
    "lines, the first one bad": ('{"n"\n{"n": 2}\n', [(1, "broken-json"), (2, {"n": 2})]),
    "items that are no rows": ('[null, 1, "x"]', [(1, None), (2, 1), (3, "x")]),
    "bad rows between good ones": (
        '[{"n": 1},\n{"n": NaN},\n{"a": 1, "a": 2},\n{"b": '
        + f'{"[" * 20_000}1{"]" * 20_000}}},\n{{"c": {"9" * 5000}}},\n{{"n": 2}}]',
        [
            (1, {"n": 1}),
            (2, "not-finite-number"),
            (3, "duplicate-key"),
            (4, "nested-too-deep"),
            (5, "broken-json"),
            (6, {"n": 2}),
        ],
    ),
    "brackets in texts": ('[{"a": "]}\\"[", "a": 1}, {"n": 2}]', [(1, "duplicate-key"), (2, {"n": 2})]),
}


@pytest.mark.parametrize("case", DOCUMENTS)
def test_documents(case, tmp_path):
    text, expected = DOCUMENTS[case]
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    assert [verdict(entry) for entry in decoded(read_json(path, "f", ALL))] == expected


def test_bytes_that_are_not_utf8_cost_the_row_that_holds_them(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"n": 1},\n{"n": "\xff"},\n{"n": 3}]')
    assert [verdict(entry) for entry in decoded(read_json(path, "f", ALL))] == [
        (1, {"n": 1}),
        (2, "invalid-utf8"),
        (3, {"n": 3}),
    ]


@pytest.mark.parametrize(
    "text",
    ['[{"n": 1},\n{"n": 2}', '[{"n": 1},\n{"n": ]', '{"data": [{"n": 1}, {"n": ', "12", "hello", '[1] "x"', '{"a": 1'],
)
def test_a_document_that_breaks_off_is_no_data(text, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^f:\d+ is not JSON: .* Allowed: a list of rows"):
        list(read_json(path, "f", ALL))


def rows_or_error(path):
    try:
        return [row for _, row in decoded(read_json(path, "f", ALL))]
    except ValueError as error:
        return error


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=30) | st.text(st.sampled_from('[]{},:"a1\\ \n'), max_size=20).map(str.encode))
def test_any_bytes_are_rows_or_one_clear_error(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("documents") / "rows.json"
    path.write_bytes(content)
    rows = rows_or_error(path)
    if isinstance(rows, ValueError):
        assert "Allowed" in str(rows)
    else:
        assert all(row is None or isinstance(row, (RowRefused, dict, list, str, int, float)) for row in rows)
