"""Tables of rows: CSV, Parquet, Arrow files, saved data sets and those of the Hugging Face Hub.

The readers keep the contract of ``readers``: one entry for each row, in order, in constant memory.

Arrow stores the objects of a column with the same keys in every row and fills up with nulls. Those nulls are no
part of a tool call or a schema, so null entries of nested objects are taken out again.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_qlora.data.json_values import MAX_DEPTH
from lightning_qlora.data.readers import Entry, Selection, open_bytes
from lightning_qlora.schema import Origin, RowRefused

__all__ = [
    "count_arrow",
    "count_parquet",
    "dataset_builder",
    "open_dataset",
    "read_arrow",
    "read_csv",
    "read_dataset",
    "read_parquet",
    "read_tsv",
]

BATCH_ROWS: Final = 512
"""Rows that are Python objects at a time."""

CSV_FIELD_LIMIT: Final = 16 * 2**20
"""Characters that one field may have: a quote that is never closed must not swallow the file."""

_NOT_UTF8: Final = re.compile("[\udc80-\udcff]")


class _Lines:
    """The lines of a file, which can be handed out a second time from a mark on."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._again: list[str] = []
        self._taken: list[str] = []
        self.number = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._again.pop() if self._again else next(self._lines)
        self._taken.append(line)
        self.number += 1
        return line

    def mark(self) -> int:
        """Forget the lines so far; return the number of the next one."""
        self._taken.clear()
        return self.number + 1

    def rewind(self) -> None:
        """Hand out again all lines since the mark but the first."""
        self.number -= len(self._taken) - 1
        self._again.extend(reversed(self._taken[1:]))


def read_csv(path: Path, name: str, selection: Selection, first: int = 0, *, delimiter: str = ",") -> Iterator[Entry]:
    """Comma-separated text with a header line; fields may hold line breaks in quotes.

    A record with broken quotes costs its first line; reading goes on at the next.

    Args:
        path: The file.
        name: Its name in origins.
        selection: The rows that are wanted.
        first: The position of the file's first row within the source.
        delimiter: What separates the fields.

    Raises:
        ValueError: The header is unusable.
    """
    csv.field_size_limit(CSV_FIELD_LIMIT)  # Python keeps one limit for the process; its default is 131,072
    with open_bytes(path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        lines = _Lines(text)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header = _csv_header(reader, name)
        position = first
        while True:
            origin = Origin(name, lines.mark())
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                lines.rewind()
                row: Any = RowRefused("broken-csv", f"{error}; quotes have to be closed, and doubled inside", origin)
            else:
                if not values:
                    continue
                row = _csv_row(header, values, origin)
            yield (origin, row) if selection.wants(position) else None
            position += 1


def read_tsv(path: Path, name: str, selection: Selection, first: int = 0) -> Iterator[Entry]:
    """Tab-separated text; else as :func:`read_csv`."""
    return read_csv(path, name, selection, first, delimiter="\t")


def _csv_header(reader: Iterator[list[str]], name: str) -> list[str]:
    try:
        header = next((values for values in reader if values), [])
    except csv.Error as error:
        raise ValueError(
            f"{name}:1 is no CSV header: {error}. Write the names of the columns in the first line."
        ) from None
    if len(set(header)) < len(header) or (header and "" in header):
        raise ValueError(f"{name}:1 names its columns {header}. Allowed: names that are all different and not empty.")
    return header


def _csv_row(header: list[str], values: list[str], origin: Origin) -> dict[str, str] | RowRefused:
    if len(values) != len(header):
        return RowRefused("broken-csv", f"found {len(values)} fields; the header has {len(header)}", origin)
    for value in values:
        bad = None if value.isascii() else _NOT_UTF8.search(value)
        if bad is not None:
            found = f"the row holds the byte 0x{ord(bad.group()) & 0xFF:02x}, which is not UTF-8"
            return RowRefused("invalid-utf8", found, origin)
    return dict(zip(header, values, strict=True))


def read_parquet(path: Path, name: str, selection: Selection, first: int = 0) -> Iterator[Entry]:
    """A Parquet file, row group by row group; groups before the first wanted row are not read.

    Raises:
        ValueError: It is not Parquet, or damaged.
    """
    with _arrow_errors(name), pq.ParquetFile(path) as file:
        row = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if first + row + size <= selection.skip:
                yield from itertools.repeat(None, size)
                row += size
                continue
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group]):
                yield from _batch_entries(batch, row, name, selection, first)
                row += batch.num_rows


def read_arrow(path: Path, name: str, selection: Selection, first: int = 0) -> Iterator[Entry]:
    """An Arrow file or stream (also Feather), memory-mapped.

    Raises:
        ValueError: It is neither, or damaged.
    """
    row = 0
    with _arrow_errors(name):
        for whole in _arrow_batches(path):
            if first + row + whole.num_rows <= selection.skip:
                yield from itertools.repeat(None, whole.num_rows)
                row += whole.num_rows
                continue
            for start in range(0, whole.num_rows, BATCH_ROWS):
                batch = whole.slice(start, BATCH_ROWS)
                yield from _batch_entries(batch, row, name, selection, first)
                row += batch.num_rows


def count_parquet(path: Path, name: str) -> int:
    """The number of rows of a Parquet file, of which its metadata alone is read.

    Raises:
        ValueError: It is not Parquet, or damaged.
    """
    with _arrow_errors(name):
        return int(pq.read_metadata(path).num_rows)


def count_arrow(path: Path, name: str) -> int:
    """The number of rows of an Arrow file or stream.

    Raises:
        ValueError: It is neither, or damaged.
    """
    with _arrow_errors(name):
        return sum(batch.num_rows for batch in _arrow_batches(path))


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The record batches of an Arrow file, or of an Arrow stream as the datasets library writes it."""
    with pa.memory_map(str(path)) as mapped:
        try:
            reader = pa.ipc.open_file(mapped)
        except pa.ArrowInvalid:
            mapped.seek(0)
            with pa.ipc.open_stream(mapped) as stream:
                yield from stream
            return
        with reader:
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)


@contextmanager
def _arrow_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
        raise ValueError(
            f"{name} cannot be read as the table that its name says: {error}. Write or fetch it again."
        ) from None


def _batch_entries(batch: pa.RecordBatch, row: int, name: str, selection: Selection, first: int) -> Iterator[Entry]:
    """The rows of a batch whose first row is row ``row`` (from 0) of its file."""
    nested = any(pa.types.is_nested(field.type) for field in batch.schema)
    for offset, record in enumerate(_records(batch)):
        if not selection.wants(first + row + offset):
            yield None
            continue
        origin = Origin(name, row + offset + 1)
        if isinstance(record, UnicodeDecodeError):
            yield origin, RowRefused("invalid-utf8", f"a text of the row is not UTF-8: {record.reason}", origin)
        else:
            yield origin, without_nulls(record) if nested else record


def _records(batch: pa.RecordBatch) -> list[dict[str, Any] | UnicodeDecodeError]:
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        pass
    records: list[dict[str, Any] | UnicodeDecodeError] = []
    for row in range(batch.num_rows):
        try:
            records += batch.slice(row, 1).to_pylist()
        except UnicodeDecodeError as error:
            records.append(error)
    return records


def without_nulls(record: dict[str, Any]) -> dict[str, Any]:
    """The row without the null entries of the objects nested in it; its own columns stay."""
    return {key: _pruned(value, 1) for key, value in record.items()}


def _pruned(value: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:  # refused later, if anything looks at it
        return value
    if isinstance(value, dict):
        return {key: _pruned(item, depth + 1) for key, item in value.items() if item is not None}
    return [_pruned(item, depth + 1) for item in value] if isinstance(value, list) else value


def open_dataset(
    path: str, *, saved: bool, split: str | None, subset: str | None, revision: str | None, streaming: bool
) -> Any:
    """Open a folder written by ``save_to_disk``, or a data set of the Hugging Face Hub.

    Args:
        path: The folder, or the id.
        saved: Whether it is a folder.
        split: Which split; ``train`` unless given, or the one that is all of the folder.
        subset: Which configuration of an id.
        revision: Which branch, tag or commit of an id.
        streaming: Whether an id is read over the network while it is used, instead of downloaded first.

    Returns:
        A ``datasets.Dataset`` or ``IterableDataset``.

    Raises:
        ValueError: There is no such data set, subset or split, or the Hub cannot be reached.
    """
    import datasets  # seconds to import, and most runs read files

    if saved:
        if subset is not None or revision is not None:
            raise ValueError(
                f"{path} is a folder written by save_to_disk; found subset {subset!r} and revision {revision!r}, which "
                "belong to dataset ids. Leave them out, or write the id in place of the folder."
            )
        return _split_of(datasets.load_from_disk(path), path, split)
    with _hub_errors(path, f"split {split or 'train'!r} and subset {subset!r}"):
        return datasets.load_dataset(path, name=subset, split=split or "train", revision=revision, streaming=streaming)


def _split_of(data: Any, path: str, split: str | None) -> Any:
    """The wanted split of a saved ``DatasetDict``, or a saved ``Dataset`` that is not known to be another split."""
    if isinstance(data, dict):
        if (split or "train") not in data:
            raise ValueError(f"{path} has no split {split or 'train'!r}. Allowed for split: {', '.join(data)}.")
        return data[split or "train"]
    if split is not None and data.split is not None and str(data.split) != split:
        raise ValueError(f"{path} has no split {split!r}. Allowed for split: {data.split}, or leave it out.")
    return data


def dataset_builder(path: str, *, subset: str | None, revision: str | None) -> Any:
    """What is known of a data set of the Hub without its rows: ``hash`` (the commit), ``config_id``, ``info``.

    Raises:
        ValueError: There is no such data set or subset, or the Hub cannot be reached.
    """
    import datasets

    with _hub_errors(path, f"subset {subset!r}"):
        return datasets.load_dataset_builder(path, name=subset, revision=revision)


@contextmanager
def _hub_errors(path: str, asked: str) -> Iterator[None]:
    try:
        yield
    except (ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"{path!r} is no file or folder here, and as a Hugging Face dataset id it cannot be loaded: {error}. "
            "Write the path of a file, a folder or a pattern, or the id of a dataset that you can reach "
            "(HF_TOKEN opens gated ones; a dataset that was downloaded before is found without a network)."
        ) from None
    except ValueError as error:  # an unknown split or subset: the library lists the ones that exist
        raise ValueError(f"The dataset {path!r} cannot be loaded with {asked}: {error}") from None


def read_dataset(data: Any, name: str, selection: Selection) -> Iterator[Entry]:
    """The rows of an opened data set; origins count its rows.

    Args:
        data: What ``open_dataset`` returned.
        name: Its name in origins.
        selection: The rows that are wanted. Those before the first one are not decoded where they can be sought.
    """
    if hasattr(data, "__len__"):
        rows = iter(data.select(range(min(selection.skip, len(data)), len(data))))
        skipped = min(selection.skip, len(data))
    else:  # read and dropped: datasets 4.8 skips only within the first shard
        rows = itertools.islice(data, selection.skip, None)
        skipped = selection.skip
    yield from itertools.repeat(None, skipped)
    for position, record in enumerate(rows, skipped):
        yield (Origin(name, position + 1), without_nulls(record)) if selection.wants(position) else None
