"""A tokenised row, or one answer of it, as it is stored and as batches are made of it; without torch."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_qlora.schema import TokenizedRow

__all__ = ["FILLER_ROW_ID", "AnswerKind", "Document", "expand_spans", "spans_of"]

FILLER_ROW_ID = -1


class AnswerKind(IntEnum):
    """What a document's answer is to preference training; stored, so the numbers stay."""

    NONE = 0
    """Nothing: a row of supervised training, or a filler."""
    CHOSEN = 1
    """The preferred answer of a pair; its ``REJECTED`` one is the next document."""
    REJECTED = 2
    DESIRABLE = 3
    """A good answer, judged by itself."""
    UNDESIRABLE = 4
    MISMATCHED = 5
    """An answer to another prompt than the one before it."""


class Document(NamedTuple):
    """One row, or one answer of a row, as the prepared data set keeps it.

    Attributes:
        input_ids: (T,) token ids.
        supervised: (S, 2) half-open spans ``[start, end)`` of the supervised tokens, ascending.
        row_id: Its number in the prepared data set, or that of its place if it comes from a stream; -1 for a filler.
        kind: What its answer is.
    """

    input_ids: npt.NDArray[np.integer]
    supervised: npt.NDArray[np.integer]
    row_id: int
    kind: AnswerKind = AnswerKind.NONE

    @classmethod
    def from_row(cls, row: TokenizedRow, row_id: int, kind: AnswerKind = AnswerKind.NONE) -> Document:
        """Convert a row that :class:`~lightning_qlora.data.chat_template.ChatTemplate` encoded."""
        return cls(np.fromiter(row.input_ids, np.int32, len(row.input_ids)), spans_of(row.supervised), row_id, kind)

    @classmethod
    def filler(cls, token_id: int = 0) -> Document:
        """Return a document of one token that supervises nothing, so it adds exactly zero to loss and gradients."""
        return cls(np.asarray([token_id], dtype=np.int32), np.empty((0, 2), dtype=np.int32), FILLER_ROW_ID)


def spans_of(supervised: Sequence[bool]) -> npt.NDArray[np.int32]:
    """Return the (S, 2) half-open spans of true values: ``[F, T, T, F, T]`` -> ``[[1, 3], [4, 5]]``."""
    flags = bytes(supervised) + b"\0"
    spans = []
    start = flags.find(1)
    while start >= 0:
        end = flags.find(0, start)
        spans.append((start, end))
        start = flags.find(1, end)
    return np.array(spans, dtype=np.int32).reshape(-1, 2)


def expand_spans(spans: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Return every index inside the spans: ``[[1, 3], [4, 5]]`` -> ``[1, 2, 4]``."""
    starts = spans[:, 0].astype(np.int64)
    counts = spans[:, 1].astype(np.int64) - starts
    before = np.cumsum(counts) - counts
    indices: npt.NDArray[np.int64] = np.arange(int(counts.sum()), dtype=np.int64) + np.repeat(starts - before, counts)
    return indices
