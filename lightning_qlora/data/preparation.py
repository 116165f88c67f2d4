"""Read, render, mask, shorten and store every row once; then every rank and every later run reads the result.

The result is cached under a key of everything it depends on, so it can be neither stale nor half written: see
:func:`prepare`.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_qlora.data.encoding import RowEncoder, StoredChunk, digest
from lightning_qlora.data.lines import JsonLine, ReadRow
from lightning_qlora.data.prepared import DOCUMENTS_FILE, DocumentWriter, PreparedDocuments
from lightning_qlora.data.report import PreparationReport, SourceReport
from lightning_qlora.data.sources import DataSource, Sources, as_sources, read_lines, source_fingerprint
from lightning_qlora.data.workers import encode_in_workers
from lightning_qlora.schema import Completion

__all__ = ["CHUNK_ROWS", "Prepared", "prepare"]

MANIFEST_FILE = "manifest.json"

CHUNK_ROWS = 2048
"""Most rows that are tokenised together and written as one record batch; a quarter of it costs a tenth of the speed."""
CHUNK_CHARACTERS = 2**22
"""Characters (of lines: bytes) after which a chunk of longer rows ends; a token takes some hundred bytes until it is
written."""


class Prepared(NamedTuple):
    """A prepared data set.

    Attributes:
        documents: The usable rows, memory-mapped, in the order in which they were read.
        report: What became of every row.
        identity: A hash of each thing that it depends on, by name.
    """

    documents: PreparedDocuments
    report: PreparationReport
    identity: dict[str, str]


def prepare(
    sources: Sources,
    encoder: RowEncoder,
    *,
    cache_dir: Path,
    num_proc: int = 1,
    max_invalid_fraction: float = 0.05,
    name: str = "data",
) -> Prepared:
    """Return the prepared rows of the sources: from the cache, or made now.

    The cache key covers the content of the data, what it is read for, the tokenizer, the chat template, the length and
    supervision policy, and the code of this package's data room, so a changed one prepares anew. A set is written into
    a hidden folder and renamed when it is complete; processes that want the same set wait for the first and read what
    it made.

    Args:
        sources: What to read.
        encoder: How a row becomes tokens.
        cache_dir: The folder of prepared sets.
        num_proc: Most worker processes that tokenise, and parse lines of JSON; 1 does it in this process (on the
            tokenizer's own threads), and so do more for a few thousand rows, which take less time than workers need to
            start.
        max_invalid_fraction: Largest share of refused rows, from 0 to 1.
        name: What the progress bar calls it.

    Raises:
        ValueError: If no row is usable, no token supervised, or too large a share of the rows refused; with the
            table of reasons.
    """
    parts = as_sources(sources)
    identity = {"data": digest([source_fingerprint(part) for part in parts]), **encoder.identity()}
    fingerprint = digest(identity)
    folder = cache_dir / fingerprint
    prepared = _open(folder)
    if prepared is None:
        with _alone(cache_dir, fingerprint):
            prepared = _open(folder)  # another process may have made it in the meantime
            if prepared is None:
                with _older_objects_frozen():
                    _build(folder, parts, encoder, identity, num_proc, name)
                prepared = _open(folder)
                assert prepared is not None
    check_report(prepared.report, max_invalid_fraction)
    return prepared


@contextmanager
def _alone(cache_dir: Path, fingerprint: str) -> Iterator[None]:
    """Hold the lock of a prepared set, in a folder that exists; the lock of a process that died is free."""
    lock = FileLock(cache_dir / f".{fingerprint}.lock")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        rank_zero_info("Waiting for another process that prepares the same data.")
        lock.acquire()
    except OSError as error:
        raise ValueError(
            f"Prepared data cannot be written to {cache_dir}: {error.strerror or error}. Write --data.cache_dir FOLDER "
            "with a folder that you can write to."
        ) from error
    try:
        yield
    finally:
        lock.release()


def check_report(report: PreparationReport, max_invalid_fraction: float) -> None:
    """Stop if the data is not fit for training.

    Raises:
        ValueError: See :func:`prepare`.
    """
    names = ", ".join(s.name for s in report.sources)
    if report.rows_read == 0:
        raise ValueError(f"There is no row in {names}. Name files that hold at least one row.")
    if report.rows_kept == 0:
        raise ValueError(f"No row of {names} can be used:\n{report.table()}")
    if report.num_supervised_tokens == 0:
        raise ValueError(f"No token of {names} is supervised, so nothing can be learned from it:\n{report.table()}")
    invalid = report.invalid_rows() / report.rows_read
    if invalid > max_invalid_fraction:
        raise ValueError(
            f"{report.invalid_rows()} of {report.rows_read} rows cannot be used ({invalid:.1%}), more than the allowed "
            f"{max_invalid_fraction:.1%}:\n{report.table()}\n"
            f"Correct the rows, or write max_invalid_fraction: {min(1.0, np.ceil(invalid * 100) / 100):.2f} or more to "
            "go on without them."
        )


def _open(folder: Path) -> Prepared | None:
    """Read a prepared set; ``None`` if there is none or it is not complete."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        size = (folder / DOCUMENTS_FILE).stat().st_size
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    if size != manifest["num_bytes"]:
        return None
    documents = PreparedDocuments(folder / DOCUMENTS_FILE, manifest["source_names"])
    return Prepared(documents, PreparationReport.from_dict(manifest["report"]), manifest["identity"])


def _build(
    folder: Path, parts: Sequence[DataSource], encoder: RowEncoder, identity: dict[str, str], num_proc: int, name: str
) -> None:
    """Write a prepared set beside its place and rename it; the caller holds the lock."""
    for orphan in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a process that was killed
        shutil.rmtree(orphan)
    staging = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.tmp"
    staging.mkdir()
    try:
        report = PreparationReport(folder.name, encoder.max_length, encoder.overlong)
        names = _write_documents(staging / DOCUMENTS_FILE, parts, encoder, report, num_proc, name)
        documents = PreparedDocuments(staging / DOCUMENTS_FILE, names)
        report.describe_lengths(documents.lengths)
        num_rows = len(documents.row_offsets) - 1
        report.num_duplicates = num_rows - len(np.unique(documents.digests))
        report.check()
        assert report.rows_kept == num_rows
        manifest = {
            "identity": identity,
            "num_bytes": (staging / DOCUMENTS_FILE).stat().st_size,
            "source_names": names,
            "report": report.to_dict(),
        }
        (staging / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for file in (DOCUMENTS_FILE, MANIFEST_FILE):
            _flush_to_disk(staging / file)
        if folder.exists():  # incomplete, or _open would have read it
            shutil.rmtree(folder)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_documents(
    path: Path,
    parts: Sequence[DataSource],
    encoder: RowEncoder,
    report: PreparationReport,
    num_proc: int,
    name: str,
) -> list[str]:
    """Tokenise all rows into ``path``, count them in ``report``, and return the names of the files read."""
    report.sources = [SourceReport(str(part)) for part in parts]
    writer = DocumentWriter(path)
    with tqdm(desc=f"Preparing {name}", unit=" rows", disable=None) as progress:

        def chunks() -> Iterator[tuple[int, list[ReadRow]]]:
            for part, source in enumerate(parts):
                rows: list[ReadRow] = []
                characters = 0
                for row in read_lines(source, encoder.task):
                    rows.append(row)
                    characters += _count_characters(row)
                    if len(rows) == CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
                        yield part, rows
                        rows, characters = [], 0
                if rows:
                    yield part, rows

        try:
            with closing(_encode_in_order(chunks(), encoder, num_proc)) as encoded:
                for chunk in encoded:
                    writer.write(chunk.batch)
                    report.sources[chunk.part].merge(chunk.report)
                    progress.update(chunk.report.rows_read)
        finally:
            writer.close()
    return writer.sources


def _count_characters(row: ReadRow) -> int:
    """Count the characters of a row's texts, without what calls and tools hold; of a line all its bytes."""
    if isinstance(row, JsonLine):
        return len(row.content)
    if isinstance(row, Completion):
        return len(row.prompt) + len(row.completion)
    count = 0
    for name in ("messages", "prompt", "completion", "chosen", "rejected"):
        for message in getattr(row, name, ()):
            count += len(message.content) + len(message.reasoning or "")
    return count


@contextmanager
def _older_objects_frozen() -> Iterator[None]:
    """Keep the garbage collector from looking through all that was there before, the libraries, again and again.

    Rows come and go by the thousand, which lets it look through everything every few seconds.
    """
    others = gc.get_freeze_count()
    gc.freeze()
    try:
        yield
    finally:
        if not others:  # those of somebody else stay
            gc.unfreeze()


def _encode_in_order(
    chunks: Iterable[tuple[int, list[ReadRow]]], encoder: RowEncoder, num_proc: int
) -> Generator[StoredChunk, None, None]:
    """Encode the chunks, here or in worker processes, and yield them in their order."""
    chunks = iter(chunks)
    ahead: list[tuple[int, list[ReadRow]]] = []
    if num_proc > 1 and _is_much(chunks, ahead):
        yield from encode_in_workers(itertools.chain(ahead, chunks), encoder, num_proc)
    else:
        for part, rows in itertools.chain(ahead, chunks):
            yield encoder.store(part, rows)


def _is_much(chunks: Iterator[tuple[int, list[ReadRow]]], ahead: list[tuple[int, list[ReadRow]]]) -> bool:
    """Return whether the chunks hold more than is encoded here in the time that workers take to start.

    Args:
        chunks: What is still to be read.
        ahead: What was read of it to find out, in order.
    """
    num_rows = num_characters = 0
    for part, rows in chunks:
        ahead.append((part, rows))
        num_rows += len(rows)
        num_characters += sum(map(_count_characters, rows))
        if num_rows > 2 * CHUNK_ROWS or num_characters > 2 * CHUNK_CHARACTERS:
            return True
    return False


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
