"""Read, render, mask, shorten and store every row once; then every rank and every later run reads the result.

The result is cached under a key of everything it depends on, so it can be neither stale nor half written: see
:func:`prepare`.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
import transformers
from filelock import FileLock, Timeout
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.data.collators import Document
from lightning_qlora.data.formats import ParsedRow, Task
from lightning_qlora.data.prepared import DOCUMENTS_FILE, DocumentWriter, PreparedDocuments
from lightning_qlora.data.report import PreparationReport, SourceReport
from lightning_qlora.data.sources import DataSource, Sources, as_sources, read_rows, source_fingerprint
from lightning_qlora.data.truncation import Fitted, OverlongPolicy, fit_rows
from lightning_qlora.schema import Completion, Origin, RowRefused

__all__ = ["Prepared", "RowEncoder", "prepare"]

MANIFEST_FILE = "manifest.json"

CHUNK_ROWS = 2048
"""Most rows that are tokenised together and written as one record batch; a quarter of it costs a tenth of the speed."""
CHUNK_CHARACTERS = 2**22
"""Characters after which a chunk of longer rows ends; a token takes some hundred bytes until it is written."""


class EncodedChunk(NamedTuple):
    """Some rows of one source after tokenising: the usable ones as documents with their places, all of them counted."""

    part: int
    documents: list[Document]
    origins: list[Origin]
    report: SourceReport


@dataclass(frozen=True)
class RowEncoder:
    """Turns rows into documents; pickles, so that worker processes can do it too.

    Args:
        chat: The chat template.
        max_length: Most tokens of a document.
        overlong: What happens to longer rows.
    """

    chat: ChatTemplate
    max_length: int = 2048
    overlong: OverlongPolicy = "drop_oldest_turns"

    @property
    def task(self) -> Task:
        """What the rows are read for."""
        return "sft"

    def fit(self, rows: Sequence[Any], max_length: int) -> Sequence[Fitted]:
        """Tokenise rows of the task, and bring those that are too long down to a limit."""
        return fit_rows(self.chat, rows, max_length, self.overlong)

    def __call__(self, part: int, rows: Sequence[ParsedRow]) -> EncodedChunk:
        """Encode rows of the source ``part``, in their order."""
        report = SourceReport("")
        documents, origins = [], []
        for fitted in self.fit(rows, self.max_length):
            report.add(fitted)
            for encoded, kind in fitted.documents:
                documents.append(Document.from_row(encoded, -1, kind))
                origins.append(encoded.origin)
        return EncodedChunk(part, documents, origins, report)

    def identity(self) -> dict[str, str]:
        """Return a hash of each thing that the tokens of a row depend on, by name."""
        chat, tokenizer = self.chat, self.chat.tokenizer
        special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
        return {
            "task": self.task,
            "tokenizer": _digest(tokenizer.backend_tokenizer.to_str(), special),
            "chat_template": _digest(tokenizer.chat_template, chat.template_kwargs),
            "length_and_supervision_policy": _digest(
                self.max_length, self.overlong, chat.supervise, sorted(chat.content_tokens)
            ),
            "code": _code_digest(),
        }


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
        num_proc: Worker processes that tokenise; 1 does it in this process (on the tokenizer's own threads). With
            more, a script of your own needs ``if __name__ == "__main__":``, because the workers import it.
        max_invalid_fraction: Largest share of refused rows, from 0 to 1.
        name: What the progress bar calls it.

    Raises:
        ValueError: If no row is usable, no token supervised, or too large a share of the rows refused; with the
            table of reasons.
    """
    parts = as_sources(sources)
    identity = {"data": _digest([source_fingerprint(part) for part in parts]), **encoder.identity()}
    fingerprint = _digest(identity)
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

        def chunks() -> Iterator[tuple[int, list[ParsedRow]]]:
            for part, source in enumerate(parts):
                rows: list[ParsedRow] = []
                characters = 0
                for row in read_rows(source, encoder.task):
                    if isinstance(row, RowRefused):
                        report.sources[part].refuse(row)
                        progress.update()
                        continue
                    rows.append(row)
                    characters += _count_characters(row)
                    if len(rows) == CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
                        yield part, rows
                        rows, characters = [], 0
                if rows:
                    yield part, rows

        try:
            for chunk in _encode_in_order(chunks(), encoder, num_proc):
                writer.write(chunk.documents, chunk.origins, chunk.part)
                report.sources[chunk.part].merge(chunk.report)
                progress.update(chunk.report.rows_read)
        finally:
            writer.close()
    return writer.sources


def _count_characters(row: ParsedRow) -> int:
    """Count the characters of a row's texts, without what calls and tools hold."""
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
    chunks: Iterable[tuple[int, list[ParsedRow]]], encoder: RowEncoder, num_proc: int
) -> Iterator[EncodedChunk]:
    """Encode the chunks, here or in worker processes, and yield them in their order.

    At most twice as many chunks as workers are under way, so memory does not grow with the data.
    """
    if num_proc <= 1:
        for part, rows in chunks:
            yield encoder(part, rows)
        return
    pending: deque[Future[EncodedChunk]] = deque()
    with ProcessPoolExecutor(num_proc, get_context("spawn"), _start_worker, (encoder,)) as pool:
        for part, rows in chunks:
            pending.append(pool.submit(_encode_in_worker, part, rows))
            if len(pending) >= 2 * num_proc:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


_worker_encoder: RowEncoder | None = None


def _start_worker(encoder: RowEncoder) -> None:
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    _worker_encoder = encoder
    gc.freeze()


def _encode_in_worker(part: int, rows: list[ParsedRow]) -> EncodedChunk:
    assert _worker_encoder is not None
    return _worker_encoder(part, rows)


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _digest(*values: Any) -> str:
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@cache
def _code_digest() -> str:
    """Return a hash of the code that prepares: this folder, the vocabulary, and the libraries that tokenise."""
    here = Path(__file__).parent
    files = sorted([*here.glob("*.py"), here.parent / "schema.py"])
    return _digest([file.read_text("utf-8") for file in files], transformers.__version__, tokenizers.__version__)
