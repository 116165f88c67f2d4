"""Where rows come from: files, folders, patterns and dataset ids, read as a stream with the place of every row.

Two promises hold for all kinds of source. Each row yields exactly one item, a row or a ``RowRefused``, so that
counts add up whatever the data is. And reading can start at any row and be shared by several readers.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, TypeAlias, get_args

from lightning_qlora.data.columns import check_columns
from lightning_qlora.data.formats import FORMATS, Format, ParsedRow, Task
from lightning_qlora.data.lines import JsonLine, ReadRow, RowParser, decode_line
from lightning_qlora.data.readers import (
    COMPRESSED,
    Entry,
    Selection,
    compression_of,
    open_bytes,
    read_json,
    read_json_lines,
)
from lightning_qlora.data.tables import (
    count_arrow,
    count_parquet,
    dataset_builder,
    open_dataset,
    read_arrow,
    read_csv,
    read_dataset,
    read_parquet,
    read_tsv,
)
from lightning_qlora.schema import Origin, RowRefused

__all__ = [
    "DataSource",
    "Sources",
    "as_sources",
    "estimated_rows",
    "files_of",
    "read_lines",
    "read_records",
    "read_rows",
    "source_fingerprint",
]

_READERS: Final[dict[str, Callable[[Path, str, Selection, int], Iterator[Entry]]]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
}
_COMPRESSIBLE: Final = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_SUFFIXES: Final = f"{', '.join(_READERS)} ({', '.join(_COMPRESSIBLE)} also with {' or '.join(COMPRESSED)})"
_NO_ROWS: Final = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
"""Files that the datasets library writes beside the rows."""

_DATASET_ID: Final = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SAMPLE_BYTES: Final = 2**16


@dataclass(frozen=True)
class DataSource:
    """Rows to read, in any of the known shapes.

    Args:
        path: A file, a folder, a pattern such as ``data/*.jsonl``, or the id of a Hugging Face dataset. Files:
            .json, .jsonl, .csv, .tsv (these also as .gz and .zst), .parquet, .arrow, .feather, and folders
            written by ``save_to_disk``. In a folder all such files are read, sorted, hidden ones left out.
        format: The shape of the rows: messages, sharegpt, alpaca, prompt_completion, raw_completion, text, preference
            (pairs) or unpaired (answers with a label); auto recognises it row by row (raw_completion has to be asked
            for). In supervised training, preference learns the chosen answers.
        columns: Names of the data's own columns for the fields of the shape, such as
            ``{prompt: question, completion: answer}``.
        split: The split of a dataset id or of a saved dataset; train unless given.
        subset: The configuration of a dataset id.
        revision: The branch, tag or commit of a dataset id; a commit makes the run repeatable.
        weight: How often each row is used in an epoch, or a pass of validation or test: 2 uses every row twice, 0.5 a
            seeded half of the rows.
        max_rows: Read only the first so many rows.
        streaming: Read a dataset id over the network while training instead of downloading it first. Files are
            streamed in any case.

    Raises:
        ValueError: If a value is out of range.
    """

    path: str
    format: Format = "auto"
    columns: dict[str, str] | None = None
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    weight: float = 1.0
    max_rows: int | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path.strip():
            raise ValueError(f"path is {self.path!r}. Write a file, a folder, a pattern or a Hugging Face dataset id.")
        if self.path.lstrip().startswith("{"):  # the command line takes an object with a wrong field for a text
            names = ", ".join(field.name for field in fields(self))
            raise ValueError(f"{self.path} is no data source. Allowed fields: {names}; their values as --help says.")
        if self.format not in FORMATS:
            raise ValueError(f"format is {self.format!r}. Allowed: {', '.join(get_args(Format))}.")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"weight is {self.weight!r}. Allowed: above 0; 1 uses each row once, 0.5 half of them.")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows is {self.max_rows}. Allowed: 1 or more, or null for all rows.")
        check_columns(self.columns)

    def __str__(self) -> str:
        subset = f"[{self.subset}]" if self.subset else ""
        return f"{self.path}{subset}{':' + self.split if self.split else ''}"


Sources: TypeAlias = str | DataSource | list[str | DataSource] | Path
"""What a data module takes: one path or source, or a list of them.

``Path`` also keeps jsonargparse from reading a named file as a part of the configuration, which it would for a union of
text and dataclass alone: a data file may well be YAML, empty, or of any size.
"""


def as_sources(sources: Sources) -> list[DataSource]:
    """Give every entry its full form.

    Raises:
        ValueError: There is none.
    """
    entries = sources if isinstance(sources, list) else [sources]
    if not entries:
        raise ValueError("The list of data sources is empty. Write at least one path or dataset id.")
    return [entry if isinstance(entry, DataSource) else DataSource(str(entry)) for entry in entries]


def read_rows(
    source: str | DataSource, task: Task = "sft", *, skip: int = 0, shard: int = 0, num_shards: int = 1
) -> Iterator[ParsedRow | RowRefused]:
    """Read the rows of one source: exactly one item for each row, in order.

    Args:
        source: What to read.
        task: What the rows are for; see :func:`~lightning_qlora.data.formats.parse_row`.
        skip: Rows to pass over, to resume: they are neither decoded nor counted.
        shard: Which share of the rows, from 0; with ``skip`` positions still count all rows.
        num_shards: How many readers share the source, a row each in turn.

    Raises:
        ValueError: See :func:`read_records`.
    """
    for row in _read(as_sources(source)[0], task, Selection(skip, shard, num_shards)):
        yield row.parse() if isinstance(row, JsonLine) else row


def read_lines(source: str | DataSource, task: Task = "sft") -> Iterator[ReadRow]:
    """Read the rows of one source as :func:`read_rows` does, but leave lines of JSON to be parsed elsewhere.

    Args:
        source: What to read.
        task: What the rows are for.

    Raises:
        ValueError: See :func:`read_records`.
    """
    return _read(as_sources(source)[0], task, Selection())


def _read(source: DataSource, task: Task, selection: Selection) -> Iterator[ReadRow]:
    parser = RowParser(source.format, source.columns, task)
    for origin, record in _wanted(source, selection):
        yield JsonLine(record, origin, parser) if isinstance(record, bytes) else parser(record, origin)


def read_records(
    source: str | DataSource, *, skip: int = 0, shard: int = 0, num_shards: int = 1
) -> Iterator[tuple[Origin, Any]]:
    """Read one source without interpreting it: the place of each row, and the row or its ``RowRefused``.

    Args:
        source: What to read.
        skip: Rows to pass over.
        shard: Which share of the rows, from 0.
        num_shards: How many readers share the source.

    Raises:
        ValueError: There is no such file, folder or dataset, no file of a known type, no row at all, or a file is
            damaged as a whole.
    """
    for origin, record in _wanted(as_sources(source)[0], Selection(skip, shard, num_shards)):
        yield origin, decode_line(record, origin) if isinstance(record, bytes) else record


def _wanted(source: DataSource, selection: Selection) -> Iterator[tuple[Origin, Any]]:
    """The rows of a source that are wanted, each with its place; lines of JSON are not decoded."""
    position = -1
    for position, entry in enumerate(_entries(source, selection)):
        if source.max_rows is not None and position >= source.max_rows:
            return
        if entry is not None:
            yield entry
    if position < 0:
        raise ValueError(f"{source} holds no rows. Write a path or dataset id with at least one.")


def _entries(source: DataSource, selection: Selection) -> Iterator[Entry]:
    files = files_of(source)
    if files is None:
        yield from read_dataset(_dataset(source), str(source), selection)
        return
    first = 0
    for file in files:
        for entry in _READERS[_kind(file)](file, str(file), selection, first):
            first += 1
            yield entry


def _dataset(source: DataSource) -> Any:
    return open_dataset(
        source.path,
        saved=Path(source.path).expanduser().is_dir(),
        split=source.split,
        subset=source.subset,
        revision=source.revision,
        streaming=source.streaming,
    )


def _kind(file: Path) -> str:
    """The suffix that tells the reader of a file; empty if there is none."""
    if compression_of(file):
        suffix = Path(file.stem).suffix.lower()
        return suffix if suffix in _COMPRESSIBLE else ""
    suffix = file.suffix.lower()
    return suffix if suffix in _READERS else ""


def files_of(source: DataSource) -> list[Path] | None:
    """Find the files of a source, in the order in which they are read.

    Returns:
        The files; ``None`` for what the datasets library reads: a folder saved by it, or a dataset id.

    Raises:
        ValueError: Nothing is there, or nothing of a known type.
    """
    path = Path(source.path).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return None
        files = _files_in(path)
    elif path.is_file():
        if not _kind(path):
            raise ValueError(f"{path} is a file of an unknown type. Allowed: {_SUFFIXES}.")
        files = [path]
    elif glob.has_magic(source.path):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        files = [file for entry in found for file in (_files_in(entry) if entry.is_dir() else [entry])]
        files = [file for file in files if _kind(file) and file.name not in _NO_ROWS]
    elif _may_be_dataset_id(source.path):
        return None
    else:
        raise ValueError(_not_found(path))
    if not files:
        raise ValueError(f"{source.path} holds no file of a known type. Allowed: {_SUFFIXES}.")
    if source.split is not None or source.subset is not None or source.revision is not None:
        raise ValueError(
            f"{source.path} names files; split, subset and revision belong to dataset ids (split also to saved "
            "datasets). Write the path of the files that you mean."
        )
    return list(dict.fromkeys(files))


def _files_in(folder: Path) -> list[Path]:
    """The data files of a folder and the folders in it, sorted; without hidden ones."""
    return sorted(
        file
        for file in folder.rglob("*")
        if _kind(file)
        and file.name not in _NO_ROWS
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
    )


def _may_be_dataset_id(path: str) -> bool:
    """Whether a name that is no path here may be one of the Hub: ``name`` or ``owner/name``."""
    owner, _, name = path.rpartition("/")
    return (
        _DATASET_ID.fullmatch(path) is not None
        and not _kind(Path(path))
        and not compression_of(Path(path))
        and not (name and Path(owner).is_dir() and owner not in ("", "."))
        and owner not in (".", "..")
    )


def _not_found(path: Path) -> str:
    near: list[str] = []
    if path.parent.is_dir():
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.iterdir()], n=3)
    where = f"There is no {path} (looked in {path.parent.absolute()})."
    similar = f" Similar names there: {', '.join(near)}." if near else ""
    return f"{where}{similar} Write a file, a folder, a pattern such as data/*.jsonl, or a Hugging Face dataset id."


def source_fingerprint(source: str | DataSource) -> str:
    """Hash everything that the rows of a source depend on.

    Files count by their names and the SHA-256 of all their bytes, never by their times; a dataset id by the commit
    that its revision stands for. The weight is left out: it decides how often rows are used, not what they are.

    Returns:
        64 hexadecimal digits.
    """
    source = as_sources(source)[0]
    options = {key: value for key, value in asdict(source).items() if key not in ("path", "weight", "streaming")}
    files = files_of(source)
    contents: list[Any]
    if files is not None:
        contents = [[str(file), file.stat().st_size, _sha256(file)] for file in files]
    elif Path(source.path).expanduser().is_dir():
        folder = Path(source.path).expanduser()
        stored = sorted(file for file in folder.rglob("*") if file.is_file())
        contents = [[str(file.relative_to(folder)), file.stat().st_size, _sha256(file)] for file in stored]
    else:
        builder = _dataset_builder(source)
        contents = [source.path, builder.hash, builder.config_id]
    return hashlib.sha256(json.dumps([options, contents], sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _dataset_builder(source: DataSource) -> Any:
    return dataset_builder(source.path, subset=source.subset, revision=source.revision)


def estimated_rows(source: str | DataSource) -> int:
    """Estimate the number of rows without reading them all: exact for tables, by the first lines for text.

    Used to spread the sources of a mix evenly over it; nothing depends on it being right.
    """
    source = as_sources(source)[0]
    files = files_of(source)
    if files is not None:
        rows = sum(_estimated_file_rows(file) for file in files)
    elif Path(source.path).expanduser().is_dir():
        rows = len(_dataset(source))
    else:
        split = (_dataset_builder(source).info.splits or {}).get(source.split or "train")
        rows = 1 if split is None else int(split.num_examples or 1)
    return max(1, rows if source.max_rows is None else min(rows, source.max_rows))


def _estimated_file_rows(file: Path) -> int:
    kind = _kind(file)
    if kind == ".parquet":
        return count_parquet(file, str(file))
    if kind in (".arrow", ".feather"):
        return count_arrow(file, str(file))
    if kind == ".json":
        return sum(1 for _ in read_json(file, str(file), Selection()))
    with open_bytes(file) as stream:
        sample = stream.read(_SAMPLE_BYTES) + stream.readline()  # whole lines, however long
    size = file.stat().st_size * (4 if compression_of(file) else 1)  # text shrinks to about a quarter
    lines = sample.count(b"\n") + (not sample.endswith(b"\n"))
    return max(1, round(lines * size / max(1, len(sample))))
