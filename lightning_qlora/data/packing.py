"""Which documents share a batch: best-fit packing into a token budget, and padded batches of similar lengths.

Both read lengths only, so a plan for a million documents takes seconds and a few megabytes. A plan is made once
and holds for the whole run, so the number of batches in an epoch is known exactly; the order in which the batches
are visited changes each epoch (:class:`~lightning_qlora.data.loading.EpochSampler`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["BatchPlan", "IntArray", "group_by_length", "pack_documents"]

IntArray: TypeAlias = npt.NDArray[np.int64]

PACKING_WINDOW_DOCUMENTS = 16_384
PACKING_WINDOW_BINS = 512
"""Documents, and bins they fill, that are packed together at least. A window leaves about one bin underfilled, so 512
bins cost 0.2 %; and because each window is a random draw, the bins of only short documents, which best-fit decreasing
makes last, hold other documents in each."""

GROUPING_WINDOW_BATCHES = 64
"""Padded batches that are cut from one sorted draw: large enough for similar lengths, small enough to stay random."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The documents of every batch.

    Attributes:
        rows: Row numbers of all batches, one after the other. Each row appears exactly once.
        offsets: Where each batch begins in ``rows``, and the end: one more than there are batches.
        num_tokens: Tokens of all documents.
        capacity: Positions that the batches occupy: tokens, plus padding or unused budget.
    """

    rows: IntArray
    offsets: IntArray
    num_tokens: int
    capacity: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> IntArray:
        """Return the row numbers of one batch."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.rows[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[IntArray]:
        return (self[i] for i in range(len(self)))

    @property
    def efficiency(self) -> float:
        """Share of the positions that hold a token, from 0 to 1."""
        return self.num_tokens / self.capacity if self.capacity else 1.0


def pack_documents(
    lengths: Sequence[int] | npt.NDArray[np.integer], budget: int, *, seed: int = 0, window: int | None = None
) -> BatchPlan:
    """Pack documents whole into bins of at most ``budget`` tokens, by best-fit decreasing.

    The documents are shuffled by the seed and packed in windows. In each, the longest first, a document goes into
    the bin that it fills best; where none has room, a new one is opened.

    Args:
        lengths: Tokens of each document, each from 1 to ``budget``.
        budget: Tokens of a bin.
        seed: Decides which documents meet; the same seed gives the same plan on every machine.
        window: Documents packed together; by default 16,384, or more where they fill less than 512 bins.

    Raises:
        ValueError: If a document is empty or longer than the budget.

    Source: D. S. Johnson, Near-optimal bin packing algorithms, MIT, 1973 (at most 11/9 of the optimum plus one bin).
    """
    sizes = _check_lengths(lengths)
    if len(sizes) and int(sizes.max()) > budget:
        longest = int(sizes.argmax())
        raise ValueError(
            f"Document {longest} has {int(sizes[longest])} tokens, more than the budget of {budget} tokens per batch. "
            "Raise tokens_per_batch, or lower max_length so that longer rows are shortened."
        )
    if window is None:
        window = max(PACKING_WINDOW_DOCUMENTS, PACKING_WINDOW_BINS * budget * len(sizes) // max(1, int(sizes.sum())))
    rng = np.random.default_rng([seed, 1])
    shuffled = rng.permutation(len(sizes))
    bins = np.empty(len(sizes), dtype=np.int64)
    num_bins = 0
    for start in range(0, len(sizes), window):
        drawn = shuffled[start : start + window]
        decreasing = drawn[np.argsort(-sizes[drawn], kind="stable")]
        assigned, opened = _best_fit(sizes[decreasing].tolist(), budget)
        bins[decreasing] = np.asarray(assigned, dtype=np.int64) + num_bins
        num_bins += opened
    rows = np.lexsort((rng.random(len(sizes)), bins))  # by bin; inside a bin in random order
    offsets = np.concatenate(([0], np.cumsum(np.bincount(bins, minlength=num_bins)))).astype(np.int64)
    return BatchPlan(rows, offsets, int(sizes.sum()), num_bins * budget)


def group_by_length(
    lengths: Sequence[int] | npt.NDArray[np.integer],
    *,
    batch_size: int | None = None,
    tokens_per_batch: int | None = None,
    seed: int = 0,
) -> BatchPlan:
    """Cut documents into padded batches of similar lengths, so that little padding is needed.

    The documents are shuffled by the seed, sorted by length within windows of some batches, and cut.

    Args:
        lengths: Tokens of each document.
        batch_size: Most rows of a batch.
        tokens_per_batch: Most positions of a batch, padding included: rows times the longest row.
        seed: Decides which documents meet.

    Raises:
        ValueError: If neither limit is given, or a document is empty or longer than ``tokens_per_batch``.
    """
    if batch_size is None and tokens_per_batch is None:
        raise ValueError("Give batch_size (rows), tokens_per_batch (padded positions), or both.")
    sizes = _check_lengths(lengths)
    if tokens_per_batch is not None and len(sizes) and int(sizes.max()) > tokens_per_batch:
        raise ValueError(
            f"The longest document has {int(sizes.max())} tokens, more than tokens_per_batch={tokens_per_batch}. "
            "Raise tokens_per_batch, or lower max_length."
        )
    rows_per_batch = batch_size
    if rows_per_batch is None:
        assert tokens_per_batch is not None
        rows_per_batch = max(1, round(tokens_per_batch / max(1.0, float(sizes.mean()) if len(sizes) else 1.0)))
    window = rows_per_batch * GROUPING_WINDOW_BATCHES
    shuffled = np.random.default_rng([seed, 2]).permutation(len(sizes))
    ordered = [
        drawn[np.argsort(-sizes[drawn], kind="stable")]
        for drawn in (shuffled[start : start + window] for start in range(0, len(sizes), window))
    ]
    starts: list[int] = []
    capacity = base = 0
    for drawn in ordered:
        begin = 0
        while begin < len(drawn):
            longest = int(sizes[drawn[begin]])
            count = len(drawn) - begin if batch_size is None else min(batch_size, len(drawn) - begin)
            if tokens_per_batch is not None:
                count = min(count, tokens_per_batch // longest)
            starts.append(base + begin)
            capacity += longest * count
            begin += count
        base += len(drawn)
    rows = np.concatenate(ordered) if ordered else np.empty(0, dtype=np.int64)
    return BatchPlan(rows, np.asarray([*starts, len(sizes)], dtype=np.int64), int(sizes.sum()), capacity)


def _check_lengths(lengths: Sequence[int] | npt.NDArray[np.integer]) -> IntArray:
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and int(sizes.min()) < 1:
        raise ValueError(f"Document {int(sizes.argmin())} is empty: a document has at least one token.")
    return sizes


def _best_fit(decreasing: list[int], budget: int) -> tuple[list[int], int]:
    """Assign lengths, longest first, to bins; return the bin of each and the number of bins.

    Bit ``f`` of ``occupied`` says that some bin has ``f`` tokens free, so the tightest bin for a document is the
    lowest set bit at or above its length: a few machine-word operations instead of a search over bins.
    """
    bins_with_free: list[list[int]] = [[] for _ in range(budget + 1)]
    occupied = opened = 0
    assigned: list[int] = []
    for length in decreasing:
        fitting = occupied >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            bin_ = bins_with_free[free].pop()
            if not bins_with_free[free]:
                occupied ^= 1 << free
        else:
            free, bin_ = budget, opened
            opened += 1
        rest = free - length
        if rest:
            bins_with_free[rest].append(bin_)
            occupied |= 1 << rest
        assigned.append(bin_)
    return assigned, opened
