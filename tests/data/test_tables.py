"""CSV, Parquet, Arrow and saved data sets: every row with its place, none lost."""

from __future__ import annotations

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qlora.data.readers import Selection
from lightning_qlora.data.tables import (
    count_arrow,
    count_parquet,
    open_dataset,
    read_arrow,
    read_csv,
    read_dataset,
    read_parquet,
    read_tsv,
)
from lightning_qlora.schema import Origin, RowRefused

ALL = Selection()


def verdicts(entries):
    return [
        None if entry is None else (entry[0].line, entry[1].reason if isinstance(entry[1], RowRefused) else entry[1])
        for entry in entries
    ]


def csv_verdicts(tmp_path, content: bytes):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    return verdicts(read_csv(path, "f", ALL))


def test_csv_fields_with_breaks_quotes_and_long_text(tmp_path):
    long = "x" * 200_000  # beyond the csv module's own limit
    content = f'\ufeffprompt,completion\r\n"a, ""b""\nc",d\r\n\r\n{long},Köln\r\n'.encode()
    assert csv_verdicts(tmp_path, content) == [
        (2, {"prompt": 'a, "b"\nc', "completion": "d"}),
        (5, {"prompt": long, "completion": "Köln"}),
    ]


def test_tab_separated(tmp_path):
    (tmp_path / "rows").write_bytes(b"a\tb\n1,2\t3\n")
    assert verdicts(read_tsv(tmp_path / "rows", "f", ALL)) == [(2, {"a": "1,2", "b": "3"})]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"1", "broken-csv"),
        (b"1,2,3", "broken-csv"),
        (b'"1"2,3', "broken-csv"),
        (b'"never closed,3', "broken-csv"),
        (b"\xff,2", "invalid-utf8"),
    ],
)
def test_a_bad_csv_record_costs_itself_only(bad, reason, tmp_path):
    content = b"a,b\n1,2\n" + bad + b"\n3,4\n5,6\n"
    assert csv_verdicts(tmp_path, content) == [
        (2, {"a": "1", "b": "2"}),
        (3, reason),
        (4, {"a": "3", "b": "4"}),
        (5, {"a": "5", "b": "6"}),
    ]


def test_a_quote_closed_by_a_later_record_does_not_swallow_lines(tmp_path):
    content = b'a,b\n"1,2\n3,4\n5,"6"\n7,8\n'
    assert [line for line, _ in csv_verdicts(tmp_path, content)] == [2, 3, 4, 5]


@pytest.mark.parametrize("header", [b"a,a\n1,2\n", b"a,\n1,2\n", b'"a"b,c\n1,2\n'])
def test_an_unusable_csv_header_is_an_error(header, tmp_path):
    with pytest.raises(ValueError, match=r"^f:1 "):
        csv_verdicts(tmp_path, header)


@settings(max_examples=100, deadline=None)
@given(
    lines=st.lists(st.text(st.sampled_from('a,"\r'), max_size=6).map(str.encode) | st.binary(max_size=6), max_size=6)
)
def test_any_csv_is_read_to_its_last_line(lines, tmp_path_factory):
    path = tmp_path_factory.mktemp("csv") / "rows.csv"
    path.write_bytes(b"\n".join([b"a,b", *lines, b"x,y", b"last,row"]))
    found = [row for _, row in read_csv(path, "f", ALL)]
    assert found[-1] == {"a": "last", "b": "row"}


@pytest.fixture
def table():
    return pa.table({"prompt": [f"p{n}" for n in range(2500)], "n": range(2500)})


def write_parquet(table, path):
    pq.write_table(table, path, row_group_size=700)


def write_file(table, path):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=600)


def write_stream(table, path):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=600)


TABLES = {
    "parquet": (write_parquet, read_parquet),
    "arrow file": (write_file, read_arrow),
    "arrow stream": (write_stream, read_arrow),
    "feather": (lambda table, path: pyarrow.feather.write_feather(table, path), read_arrow),
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("selection", [ALL, Selection(skip=1999), Selection(skip=100, shard=2, num_shards=3)])
def test_tables_by_position(kind, selection, table, tmp_path):
    write, read = TABLES[kind]
    write(table, tmp_path / "rows")

    entries = list(read(tmp_path / "rows", "f", selection, 0))

    wanted = [n for n in range(2500) if n >= selection.skip and n % selection.num_shards == selection.shard]
    assert len(entries) == 2500
    assert [entry[1]["n"] for entry in entries if entry] == wanted
    assert [entry[0] for entry in entries if entry] == [Origin("f", n + 1) for n in wanted]


@pytest.mark.parametrize("kind", TABLES)
def test_damaged_tables_are_an_error(kind, table, tmp_path):
    write, read = TABLES[kind]
    count = count_parquet if kind == "parquet" else count_arrow
    write(table, tmp_path / "rows")
    assert count(tmp_path / "rows", "f") == 2500
    content = (tmp_path / "rows").read_bytes()
    for damaged in (b"nothing of the kind", content[:-500], b""):
        (tmp_path / "rows").write_bytes(damaged)
        with pytest.raises(ValueError, match="^f cannot be read"):
            list(read(tmp_path / "rows", "f", ALL))
        with pytest.raises(ValueError, match="^f cannot be read"):
            count(tmp_path / "rows", "f")


def test_nulls_that_arrow_fills_in_are_taken_out(tmp_path):
    messages = [
        {"role": "user", "content": "Hi", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"a": 1, "b": None}}]},
    ]
    pq.write_table(pa.Table.from_pylist([{"messages": messages, "system": None}]), tmp_path / "rows")
    [(_, row)] = read_parquet(tmp_path / "rows", "f", ALL)
    assert row == {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]},
        ],
        "system": None,
    }


def test_bytes_that_are_not_utf8_in_a_table_cost_their_row(tmp_path):
    texts = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "rows")
    assert verdicts(read_parquet(tmp_path / "rows", "f", ALL)) == [
        (1, {"text": "a"}),
        (2, "invalid-utf8"),
        (3, {"text": "c"}),
    ]


HUB = {"split": None, "subset": None, "revision": None, "streaming": False}


def test_saved_datasets(tmp_path):
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"]}).select([2, 0])
    data.save_to_disk(str(tmp_path / "one"))
    opened = open_dataset(str(tmp_path / "one"), saved=True, **HUB)
    assert verdicts(read_dataset(opened, "f", ALL)) == [(1, {"text": "c"}), (2, {"text": "a"})]

    datasets.DatasetDict({"train": data, "dev": data.select([1])}).save_to_disk(str(tmp_path / "two"))
    opened = open_dataset(str(tmp_path / "two"), saved=True, **{**HUB, "split": "dev"})
    assert verdicts(read_dataset(opened, "f", ALL)) == [(1, {"text": "a"})]
    with pytest.raises(ValueError, match=r"no split 'test'. Allowed for split: train, dev"):
        open_dataset(str(tmp_path / "two"), saved=True, **{**HUB, "split": "test"})


def test_what_is_asked_of_a_saved_dataset_is_there_or_is_an_error(tmp_path):
    data = datasets.Dataset.from_dict({"text": ["a"]}, split="train")
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "two"))
    for folder in (str(tmp_path / "one"), str(tmp_path / "two")):
        for split in ("train", None):
            assert open_dataset(folder, saved=True, **{**HUB, "split": split})["text"] == ["a"]
        with pytest.raises(ValueError, match=r"has no split 'test'. Allowed for split: train"):
            open_dataset(folder, saved=True, **{**HUB, "split": "test"})
        for option in ("subset", "revision"):
            with pytest.raises(ValueError, match=rf"{option} 'x'.*belong to dataset ids. Leave them out"):
                open_dataset(folder, saved=True, **{**HUB, option: "x"})


def test_a_saved_dataset_without_a_name_is_any_split(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "one"))
    assert open_dataset(str(tmp_path / "one"), saved=True, **{**HUB, "split": "test"})["text"] == ["a"]


@pytest.mark.parametrize("streamed", [False, True])
def test_positions_in_datasets(streamed):
    data = datasets.Dataset.from_dict({"n": range(50)})
    data = data.to_iterable_dataset(num_shards=3) if streamed else data
    entries = verdicts(read_dataset(data, "f", Selection(skip=41, shard=1, num_shards=4)))
    assert len(entries) == 50
    assert [entry for entry in entries if entry] == [(42, {"n": 41}), (46, {"n": 45}), (50, {"n": 49})]


def test_tools_in_a_saved_dataset_come_back_as_objects(tmp_path):
    tools = [[{"name": "f", "parameters": {"a": 1}}], [{"name": "g", "parameters": {"b": "x"}}]]
    datasets.Dataset.from_dict({"tools": tools}).save_to_disk(str(tmp_path / "saved"))
    opened = open_dataset(str(tmp_path / "saved"), saved=True, **HUB)
    assert [row["tools"] for _, row in read_dataset(opened, "f", ALL)] == tools


def test_an_id_that_cannot_be_reached_is_one_clear_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="'nobody/nothing' is no file or folder here.*dataset id.*Write the path"):
        open_dataset("nobody/nothing", saved=False, **HUB)


def test_an_unknown_split_of_an_id_names_the_ones_there_are(monkeypatch):
    def load(path, **options):
        assert options == {"name": "main", "split": "dev", "revision": "abc", "streaming": True}
        raise ValueError('Unknown split "dev". Should be one of ["train"].')

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match="'owner/name' cannot be loaded with split 'dev' and subset 'main'.*train"):
        open_dataset("owner/name", saved=False, split="dev", subset="main", revision="abc", streaming=True)
