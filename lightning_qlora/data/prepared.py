"""Prepared documents on disk: an Arrow stream that is written once, then memory-mapped by every rank and worker."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from typing_extensions import override

from lightning_qlora.data.documents import AnswerKind, Document
from lightning_qlora.schema import Origin

__all__ = ["DocumentBatch", "DocumentWriter", "Documents", "PreparedDocuments", "content_digest"]

DOCUMENTS_FILE = "documents.arrow"

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("supervised", pa.list_(pa.int32())),  # spans: start, end, start, end, ...
        ("part", pa.int16()),  # which entry of the mix
        ("source", pa.int32()),  # which file or data set, an index into the names kept beside
        ("line", pa.int64()),
        ("digest", pa.uint64()),  # of the whole row, the same for all its answers
        ("kind", pa.int8()),  # AnswerKind
    ]
)


def content_digest(input_ids: npt.NDArray[np.int32]) -> int:
    """Return 64 bits that are equal for equal token ids: what counts duplicates and splits off the validation rows."""
    return int.from_bytes(hashlib.blake2b(input_ids.tobytes(), digest_size=8).digest(), "little")


class DocumentBatch(NamedTuple):
    """Documents of one entry of the mix as they are stored: what a process that tokenises hands on in one piece.

    Attributes:
        columns: Their columns; ``source`` counts the names below.
        sources: The files or data sets that they were read from.
    """

    columns: pa.RecordBatch
    sources: list[str]

    @classmethod
    def of(cls, documents: Sequence[Document], origins: Sequence[Origin], part: int) -> DocumentBatch:
        """Lay out the documents of the entry ``part``, in their order."""
        count = len(documents)
        numbers: dict[str, int] = {}
        sources = [numbers.setdefault(origin.source, len(numbers)) for origin in origins]
        columns = [
            _list_array([d.input_ids for d in documents]),
            _list_array([d.supervised.reshape(-1) for d in documents]),
            _array(np.full(count, part, dtype=np.int16)),
            _array(np.asarray(sources, dtype=np.int32)),
            _array(np.asarray([o.line for o in origins], dtype=np.int64)),
            _array(np.asarray(_row_digests(documents), dtype=np.uint64)),
            _array(np.asarray([d.kind for d in documents], dtype=np.int8)),
        ]
        return cls(pa.record_batch(columns, schema=SCHEMA), list(numbers))


class DocumentWriter:
    """Append documents to an Arrow stream, a record batch at a time, in constant memory.

    Args:
        path: The file to write; ``datasets.Dataset.from_file`` reads it too.
    """

    def __init__(self, path: Path) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._sink, SCHEMA)
        self._source_numbers: dict[str, int] = {}

    @property
    def sources(self) -> list[str]:
        """The names that the ``source`` column counts."""
        return list(self._source_numbers)

    def write(self, batch: DocumentBatch) -> None:
        """Append documents, in their order."""
        columns = batch.columns
        if not columns.num_rows:
            return
        numbers = [self._source_numbers.setdefault(name, len(self._source_numbers)) for name in batch.sources]
        if numbers != list(range(len(numbers))):
            sources = np.asarray(numbers, dtype=np.int32)[_view(columns["source"])]
            columns = columns.set_column(SCHEMA.get_field_index("source"), SCHEMA.field("source"), _array(sources))
        self._writer.write_batch(columns)

    def close(self) -> None:
        """Finish the stream."""
        self._writer.close()
        self._sink.close()


class Documents(Sequence[Document]):
    """Numbered documents that batches are made of."""

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> list[Document]: ...
    @override
    def __getitem__(self, index: int | slice) -> Document | list[Document]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._read(index)

    @abstractmethod
    def _read(self, index: int) -> Document:
        """Return the document of a number that exists."""

    @property
    @abstractmethod
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document."""

    @abstractmethod
    def origin(self, index: int) -> Origin:
        """Return where a document was read: the file and line to name in messages."""


class PreparedDocuments(Documents):
    """The documents of a prepared data set; token ids stay on disk until a batch needs them.

    A row is one document, or a pair of them: the chosen answer and the rejected one behind it.

    Pickles as its path, so that loader workers map the file themselves.

    Args:
        path: The Arrow stream.
        sources: The names that its ``source`` column counts.
    """

    def __init__(self, path: Path, sources: Sequence[str]) -> None:
        self.path = path
        self.sources = list(sources)
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        self._ids = [_list_views(chunk) for chunk in table["input_ids"].chunks]
        self._spans = [_list_views(chunk) for chunk in table["supervised"].chunks]
        rows_per_chunk = [len(offsets) - 1 for offsets, _ in self._ids]
        self._chunk_starts = np.concatenate(([0], np.cumsum(rows_per_chunk, dtype=np.int64)))
        self._table = table
        self.kinds: npt.NDArray[np.int8] = _values(table["kind"])
        """:class:`~lightning_qlora.data.documents.AnswerKind` of each document."""

    @override
    def __len__(self) -> int:
        return int(self._chunk_starts[-1])

    @override
    def _read(self, index: int) -> Document:
        chunk = int(np.searchsorted(self._chunk_starts, index, side="right")) - 1
        row = index - int(self._chunk_starts[chunk])
        ids = _row(self._ids[chunk], row)
        kind = AnswerKind(self.kinds[index])
        return Document(ids, _row(self._spans[chunk], row).reshape(-1, 2), index, kind)

    @property
    def row_offsets(self) -> npt.NDArray[np.int64]:
        """Where each row begins among the documents, and the end: one more than there are rows."""
        return np.append(np.flatnonzero(self.kinds != AnswerKind.REJECTED), len(self)).astype(np.int64)

    @property
    @override
    def lengths(self) -> npt.NDArray[np.int64]:
        return self._per_row(self._ids, lambda offsets, _: np.diff(offsets))

    @property
    def num_supervised(self) -> npt.NDArray[np.int64]:
        """Supervised tokens of each document."""

        def count(offsets: npt.NDArray[np.int32], values: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
            spans = values[offsets[0] : offsets[-1]].reshape(-1, 2).astype(np.int64)
            done = np.concatenate(([0], np.cumsum(spans[:, 1] - spans[:, 0])))
            return np.asarray(np.diff(done[(offsets - offsets[0]) // 2]), dtype=np.int64)

        return self._per_row(self._spans, count)

    @property
    def prompt_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document before its first supervised one; each has one."""
        return self._per_row(self._spans, lambda offsets, values: values[offsets[:-1]])

    @property
    def spans(self) -> npt.NDArray[np.int32]:
        """The supervised spans of all documents, one after the other: start, end, start, end, ..."""
        parts = [values[offsets[0] : offsets[-1]] for offsets, values in self._spans]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)

    @property
    def digests(self) -> npt.NDArray[np.uint64]:
        """For each document the :func:`content_digest` of its row."""
        return _values(self._table["digest"])

    @property
    def parts(self) -> npt.NDArray[np.int16]:
        """The entry of the mix that each document came from."""
        return _values(self._table["part"])

    @override
    def origin(self, index: int) -> Origin:
        source = self._table["source"][index].as_py()
        return Origin(self.sources[source], self._table["line"][index].as_py())

    def _per_row(self, chunks: list[_Views], count: Any) -> npt.NDArray[np.int64]:
        counts = [np.asarray(count(*views), dtype=np.int64) for views in chunks]
        return np.concatenate(counts) if counts else np.empty(0, dtype=np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.path, self.sources))


def _row_digests(documents: Sequence[Document]) -> list[int]:
    digests: list[int] = []
    for index, document in enumerate(documents):
        ids = document.input_ids.astype(np.int32, copy=False)
        if document.kind is AnswerKind.REJECTED:
            digests[-1:] = [content_digest(np.concatenate((documents[index - 1].input_ids.astype(np.int32), ids)))] * 2
        else:
            digests.append(content_digest(ids))
    return digests


_Views = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]


# Arrow's own conversions from and to numpy import pandas first, which takes some tenths of a second in each process.


def _array(values: npt.NDArray[Any]) -> pa.Array:
    """Return an Arrow array on the memory of numpy's."""
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def _view(array: pa.Array) -> npt.NDArray[Any]:
    """Return the numbers of an array without nulls, without copying."""
    dtype = array.type.to_pandas_dtype()
    _, memory = array.buffers()
    if not len(array):
        return np.empty(0, dtype)
    return np.frombuffer(memory, dtype, len(array), array.offset * np.dtype(dtype).itemsize)


def _values(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    return np.concatenate([np.empty(0, column.type.to_pandas_dtype()), *map(_view, column.chunks)])


def _list_array(rows: Sequence[npt.NDArray[np.integer]]) -> pa.ListArray:
    offsets = np.concatenate(([0], np.cumsum([len(row) for row in rows]))).astype(np.int32)
    values = np.concatenate(rows).astype(np.int32) if rows else np.empty(0, dtype=np.int32)
    return pa.ListArray.from_arrays(_array(offsets), _array(values))


def _list_views(chunk: pa.ListArray) -> _Views:
    """Return (offsets, values) of a list column without copying."""
    return _view(chunk.offsets), _view(chunk.values)


def _row(views: _Views, row: int) -> npt.NDArray[np.int32]:
    offsets, values = views
    return values[offsets[row] : offsets[row + 1]]
