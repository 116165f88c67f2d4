"""Files, folders, patterns and ids; what YAML may say; fingerprints; positions over several files."""

from __future__ import annotations

import gzip
import json
import os
import textwrap
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import datasets
import jsonargparse
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lightning_qlora.data.mixing import mix
from lightning_qlora.data.sources import (
    DataSource,
    Sources,
    as_sources,
    estimated_rows,
    files_of,
    read_records,
    read_rows,
    source_fingerprint,
)
from lightning_qlora.schema import Completion, Conversation, Origin, PreferenceRow, RowRefused


def row(number):
    return {"prompt": f"question {number}", "completion": f"answer {number}"}


def write_lines(path, numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row(n)) + "\n" for n in numbers))
    return path


@pytest.fixture
def folder(tmp_path):
    """Rows 0 to 9 over files of several types, in the order of their names."""
    folder = tmp_path / "data"
    write_lines(folder / "a.jsonl", [0, 1])
    (folder / "b.json").write_text(json.dumps([row(2), row(3)]))
    (folder / "c.csv").write_text("prompt,completion\nquestion 4,answer 4\n")
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(json.dumps(row(5)).encode()))
    (folder / "deeper").mkdir()
    pq.write_table(pa.Table.from_pylist([row(6), row(7)]), folder / "deeper" / "x.parquet")
    write_lines(folder / "e.NDJSON", [8, 9])
    write_lines(folder / ".hidden.jsonl", [100])
    write_lines(folder / ".cache" / "x.jsonl", [101])
    (folder / "README.md").write_text("notes")
    (folder / "dataset_infos.json").write_text("{}")
    return folder


def prompts(source, **options):
    return [found.messages[0].content for found in read_rows(source, **options)]


def questions(numbers):
    return [f"question {number}" for number in numbers]


def test_a_folder_is_read_in_the_order_of_names(folder):
    assert prompts(str(folder)) == questions([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])


def test_patterns(folder):
    assert prompts(f"{folder}/*.json*") == questions([0, 1, 2, 3, 5])
    assert prompts(f"{folder}/**/*.parquet") == questions([6, 7])
    assert prompts(f"{folder}/d*") == questions([5, 6, 7])  # a file and a folder


def test_origins_name_the_file_and_the_line(folder):
    origins = [found.origin for found in read_rows(str(folder))]
    assert origins[1] == Origin(str(folder / "a.jsonl"), 2)
    assert origins[4] == Origin(str(folder / "c.csv"), 2)
    assert origins[7] == Origin(str(folder / "deeper" / "x.parquet"), 2)


@pytest.mark.parametrize("skip", range(12))
def test_reading_starts_at_any_row(skip, folder):
    assert prompts(str(folder), skip=skip) == questions(range(skip, 10))


@pytest.mark.parametrize("num_shards", [1, 2, 3, 11])
def test_shards_share_all_rows(num_shards, folder):
    shares = [prompts(str(folder), shard=shard, num_shards=num_shards) for shard in range(num_shards)]
    assert [shares[n % num_shards][n // num_shards] for n in range(10)] == questions(range(10))
    assert sum(map(len, shares)) == 10


def test_max_rows(folder):
    assert prompts(DataSource(str(folder), max_rows=3)) == questions([0, 1, 2])
    assert prompts(DataSource(str(folder), max_rows=3), skip=2) == questions([2])


def test_format_columns_and_task(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"q": "1+1=", "a": "2"}\n')
    columns = {"prompt": "q", "completion": "a"}
    [found] = read_rows(DataSource(str(path), columns=columns))
    assert isinstance(found, Conversation)
    [found] = read_rows(DataSource(str(path), format="raw_completion", columns=columns))
    assert found == Completion("1+1=", "2", Origin(str(path), 1))
    path.write_text('{"prompt": "Hi", "chosen": "a", "rejected": "b"}\n{"text": "x"}\n')
    pair, refused = read_rows(str(path), "preference")
    assert isinstance(pair, PreferenceRow)
    assert (refused.reason, refused.origin.line) == ("not-a-pair", 2)


def test_verdicts_of_files_and_of_rows_come_in_order(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row(0)) + "\n{\n\n[]\n" + json.dumps(row(1)) + "\nnull\n")
    found = list(read_rows(str(path)))
    reasons = [item.reason if isinstance(item, RowRefused) else "good" for item in found]
    assert reasons == ["good", "broken-json", "not-an-object", "good", "not-an-object"]
    assert [item.origin.line for item in found] == [1, 2, 4, 5, 6]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "arrow", "jsonl.gz", "jsonl.zst"])
def test_memory_does_not_grow_with_the_file(suffix, tmp_path):
    def peak_bytes(count):
        path = tmp_path / f"{count}.{suffix}"
        rows = [{"prompt": f"question {n}", "completion": "word " * 100} for n in range(count)]
        write_table(rows, path)
        tracemalloc.start()
        assert sum(1 for _ in read_rows(str(path))) == count
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_bytes(10)  # imports
    assert peak_bytes(6000) < peak_bytes(2000) + 100_000  # the rows themselves are 2 MB more


def write_table(rows, path):
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".csv":
        path.write_text("prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1000)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
        path.write_bytes(pack(lines))


BAD_SOURCES = {
    "no such file": ("rows/train.jsonl", r"There is no rows/train.jsonl \(looked in .*Write a file, a folder"),
    "no such file, near": ("data/a.jsnl", r"Similar names there: .*a.jsonl"),
    "no such folder": ("data/nothing", "There is no data/nothing"),
    "absolute": ("/nowhere/rows", "There is no /nowhere/rows"),
    "unknown type": ("data/README.md", r"unknown type. Allowed: .jsonl, .*also with .gz or .zst"),
    "compressed unknown": ("data/README.md.gz", "There is no"),
    "empty pattern": ("data/*.arrow", "holds no file of a known type"),
    "empty folder": ("empty", "holds no file of a known type"),
    "empty file": ("empty.jsonl", "empty.jsonl holds no rows"),
    "only blank lines": ("blank.jsonl", "blank.jsonl holds no rows"),
    "header only": ("header.csv", "header.csv holds no rows"),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_what_is_not_there_is_one_clear_error(case, folder, tmp_path, monkeypatch):
    path, message = BAD_SOURCES[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n \n")
    (tmp_path / "header.csv").write_text("prompt,completion\n")
    with pytest.raises(ValueError, match=message):
        list(read_records(path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": " "}, "path is ' '"),
        ({"path": "x", "format": "chatml"}, "format is 'chatml'. Allowed: auto, messages"),
        ({"path": "x", "weight": 0}, "weight is 0. Allowed: above 0"),
        ({"path": "x", "weight": float("nan")}, "weight is nan"),
        ({"path": "x", "max_rows": 0}, "max_rows is 0. Allowed: 1 or more"),
        ({"path": "x", "columns": {"questions": "q"}}, "columns maps 'questions'"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        DataSource(**values)


def test_split_is_refused_for_files(folder):
    with pytest.raises(ValueError, match="split, subset and revision belong to dataset ids"):
        files_of(DataSource(str(folder), split="train"))


def test_no_source_at_all():
    with pytest.raises(ValueError, match="list of data sources is empty"):
        as_sources([])


class Data:
    """A class as jsonargparse binds it.

    Args:
        train: The rows to learn from.
    """

    def __init__(self, train: Sources):
        self.train = train


@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        ("train: a.jsonl", ["a.jsonl"]),
        ("train: [a.jsonl, b.json]", ["a.jsonl", "b.json"]),
        ("train: {path: a.jsonl, weight: 0.5}", [DataSource("a.jsonl", weight=0.5)]),
        (
            "train:\n- a.jsonl\n- path: owner/name\n  split: train\n  columns: {prompt: q, completion: a}\n",
            ["a.jsonl", DataSource("owner/name", split="train", columns={"prompt": "q", "completion": "a"})],
        ),
    ],
)
def test_yaml_of_every_form(yaml, expected):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Data, "data")
    config = parser.parse_string("data:\n" + textwrap.indent(yaml, "  "))
    assert as_sources(parser.instantiate(config).data.train) == as_sources(expected)
    again = parser.parse_string(parser.dump(config))
    assert as_sources(parser.instantiate(again).data.train) == as_sources(expected)


@pytest.mark.parametrize("content", ["", "{}", '{"path": "elsewhere.jsonl"}', "[a, b]"])
def test_a_file_named_on_the_command_line_is_not_read_as_configuration(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(content)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Data, "data")
    parsed = parser.instantiate(parser.parse_args(["--data.train=rows.jsonl"]))
    assert as_sources(parsed.data.train) == [DataSource("rows.jsonl")]
    parsed = parser.instantiate(parser.parse_string("data: {train: [rows.jsonl]}"))
    assert as_sources(parsed.data.train) == [DataSource("rows.jsonl")]


def test_command_line_and_its_errors():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Data, "data")
    config = parser.parse_args(["--data.train", '[{"path": "a.jsonl", "weight": 2}]'])
    assert parser.instantiate(config).data.train == [DataSource("a.jsonl", weight=2)]
    with pytest.raises(ValueError, match="wieght.* is no data source. Allowed fields: path, format, columns"):
        as_sources(parser.parse_args(["--data.train", '{"path": "a.jsonl", "wieght": 2}']).data.train)
    with pytest.raises(jsonargparse.ArgumentError, match="wieght"):
        parser.parse_string("data: {train: {path: a.jsonl, wieght: 2}}")
    config = parser.parse_string("data: {train: {path: a.jsonl, weight: -1}}")
    with pytest.raises(ValueError, match="weight is -1"):
        parser.instantiate(config)


def test_fingerprint_follows_the_content(folder):
    first = source_fingerprint(str(folder))
    assert source_fingerprint(DataSource(str(folder))) == first
    assert source_fingerprint(DataSource(str(folder), weight=2.0)) == first

    changed = folder / "a.jsonl"
    before = changed.stat()
    content = changed.read_text()
    changed.write_text(content.replace("answer 0", "Answer 0"))
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time
    assert source_fingerprint(str(folder)) != first

    changed.write_text(content)
    assert source_fingerprint(str(folder)) == first
    (folder / "README.md").write_text("other notes")
    assert source_fingerprint(str(folder)) == first
    write_lines(folder / "z.jsonl", [10])
    assert source_fingerprint(str(folder)) != first


@pytest.mark.parametrize(
    "options", [{"format": "alpaca"}, {"columns": {"prompt": "q"}}, {"max_rows": 3}, {"columns": {"prompt": "z"}}]
)
def test_fingerprint_follows_how_rows_are_read(options, folder):
    assert source_fingerprint(DataSource(str(folder), **options)) != source_fingerprint(str(folder))


def test_fingerprint_of_a_saved_dataset(tmp_path):
    def saved(texts):
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "saved"))
        return source_fingerprint(str(tmp_path / "saved"))

    assert saved(["a", "b"]) != saved(["a", "c"])
    assert [found.completion for found in read_rows(str(tmp_path / "saved"))] == ["a", "c"]
    assert estimated_rows(str(tmp_path / "saved")) == 2


def test_a_dataset_id(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    data = datasets.Dataset.from_list([row(0), row(1)])
    asked = []

    def load(path, **options):
        asked.append((path, options))
        return data.to_iterable_dataset() if options["streaming"] else data

    def builder(path, name, revision):
        splits = {"test": SimpleNamespace(num_examples=2)}
        return SimpleNamespace(hash=f"commit of {revision}", config_id=name, info=SimpleNamespace(splits=splits))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    for streaming in (False, True):
        source = DataSource("owner/name", split="test", subset="main", revision="v1", streaming=streaming)
        found = list(read_rows(source, skip=1))
        assert [str(item.origin) for item in found] == ["owner/name[main]:test:2"]
        assert asked[-1] == (
            "owner/name",
            {"name": "main", "split": "test", "revision": "v1", "streaming": streaming},
        )
    assert estimated_rows(source) == 2
    other = DataSource("owner/name", split="test", subset="main", revision="v2", streaming=True)
    assert source_fingerprint(source) != source_fingerprint(other)


def test_estimates_of_long_lines_keep_a_mix_even(tmp_path):
    for name, length in (("long", 70_000), ("middling", 40_000), ("short", 1)):
        lines = [json.dumps({"prompt": name, "completion": "x" * length}) for _ in range(100)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        assert abs(estimated_rows(str(tmp_path / f"{name}.jsonl")) - 100) <= 1
    names = [found.messages[0].content for found in mix([str(path) for path in sorted(tmp_path.iterdir())])]
    assert all(abs(names[:150].count(name) - 50) <= 2 for name in ("long", "middling", "short"))


@pytest.mark.parametrize("content", ["", "{}", "{}\n{}", "{}\n{}\n"])
def test_estimates_count_a_last_line_that_does_not_end(content, tmp_path):
    (tmp_path / "rows.jsonl").write_text(content)
    assert estimated_rows(str(tmp_path / "rows.jsonl")) == max(1, len(content.split()))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_a_damaged_table_is_named_where_its_rows_are_counted(name, tmp_path):
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=rf"{name} cannot be read as the table"):
        mix(str(tmp_path / name))


TABLE = ("prompt", "completion"), ("a,b", "c")
LINES = "".join(json.dumps({"prompt": "a,b", "completion": "c"}) + "\n" for _ in range(2)).encode()
SEPARATED = {sep: "\n".join(sep.join(f'"{cell}"' for cell in row) for row in TABLE).encode() for sep in ",\t"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("A.TSV", SEPARATED["\t"]),
        ("A.Tsv.GZ", gzip.compress(SEPARATED["\t"])),
        ("x.tsv.csv", SEPARATED[","]),
        ("x.csv.tsv", SEPARATED["\t"]),
        ("B.JSONL.GZ", gzip.compress(LINES)),
        ("B.jsonl.ZST", zstandard.compress(LINES)),
    ],
    ids=lambda value: value if type(value) is str else "",  # an archive holds the time
)
def test_suffixes_in_capitals_and_several_of_them(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert {found.messages[0].content for found in read_rows(str(tmp_path / name))} == {"a,b"}


def test_labels_and_turns_in_text_cells(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,label\nQ,A,true\nQ,B,False\nQ,C,1\nQ,D,0\n")
    assert [found.desirable for found in read_rows(str(path), "unpaired")] == [True, False, True, False]
    kept = [getattr(found, "reason", "good") for found in read_rows(str(path))]
    assert kept == ["good", "unwanted-answer", "good", "unwanted-answer"]

    path = tmp_path / "pairs.tsv"
    good, bad = ([{"role": "assistant", "content": text}] for text in ("A", "B"))
    cells = ["Q", *(json.dumps(side).replace('"', '""') for side in (good, bad))]
    path.write_text("prompt\tchosen\trejected\n" + "\t".join(f'"{cell}"' for cell in cells))
    [pair] = read_rows(str(path), "preference")
    assert [turn.content for turn in (*pair.prompt, *pair.chosen, *pair.rejected)] == ["Q", "A", "B"]


@pytest.mark.parametrize("name", ["a.jsonl", "b.json", "deeper/x.parquet", "e.NDJSON"])
def test_estimates_of_small_files_are_exact(name, folder):
    assert estimated_rows(str(folder / name)) == 2
