"""The answers of preference data as documents, row by row, and for KTO a mismatched one for each row.

KTO estimates how far the model has moved from the reference on answers that have nothing to do with their prompt
(arXiv:2402.01306, section 4.1). So each prompt is paired with the answer of another row. Which one is decided once,
by the seed, so that such a document has a number like any other: its reference can be computed beforehand, and its
length is known when batches are planned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from lightning_qlora.data.collators import AnswerKind, Document, expand_spans
from lightning_qlora.data.packing import BatchPlan, IntArray
from lightning_qlora.data.prepared import Documents, PreparedDocuments
from lightning_qlora.data.resume import hash_arrays
from lightning_qlora.schema import Origin

__all__ = ["AnswerDocuments", "choose_partners"]

NO_PARTNER = -1

TRIES = 32
"""Rows that are tried in turn for one whose answer fits behind a prompt. Prompts that find none have no mismatch."""


class AnswerDocuments(Documents):
    """The prepared documents, and behind them, numbered by their rows, the mismatched ones.

    Args:
        prepared: The answers.
        partners: For each row the document whose answer is put behind its prompt, or -1; ``None`` for no mismatches.
    """

    def __init__(self, prepared: PreparedDocuments, partners: IntArray | None = None) -> None:
        self.prepared = prepared
        self.partners = partners
        self.row_offsets = prepared.row_offsets

    @override
    def __len__(self) -> int:
        return len(self.prepared) + (0 if self.partners is None else len(self.partners))

    @override
    def _read(self, index: int) -> Document:
        if index < len(self.prepared):
            return self.prepared[index]
        row = index - len(self.prepared)
        assert self.partners is not None
        if self.partners[row] == NO_PARTNER:
            raise IndexError(f"Row {row} has no mismatched answer.")
        asked, told = self.prepared[int(self.row_offsets[row])], self.prepared[int(self.partners[row])]
        prompt, start = int(asked.supervised[0, 0]), int(told.supervised[0, 0])
        ids = np.concatenate((asked.input_ids[:prompt], told.input_ids[start:]))
        return Document(ids, told.supervised - start + prompt, index, AnswerKind.MISMATCHED)

    @property
    @override
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document; 0 for the mismatch that a row does not have."""
        lengths, prompts = self.prepared.lengths, self.prepared.prompt_lengths
        if self.partners is None:
            return lengths
        own = prompts[self.row_offsets[:-1]]
        return np.append(lengths, np.where(self.partners == NO_PARTNER, 0, own + (lengths - prompts)[self.partners]))

    @override
    def origin(self, index: int) -> Origin:
        row = index - len(self.prepared)
        return self.prepared.origin(index if row < 0 else int(self.row_offsets[row]))

    def digest(self, rows: IntArray) -> str:
        """Return a hash that is equal exactly if rows have documents of the same numbers, tokens and supervision."""
        partners = np.empty(0, dtype=np.int64) if self.partners is None else self.partners
        prepared = self.prepared
        return hash_arrays(
            np.unique(rows), prepared.digests, prepared.lengths, prepared.kinds, prepared.spans, partners
        )

    def by_row(self) -> tuple[IntArray, IntArray]:
        """Return the documents of all rows one after the other, mismatches last, and where each row begins."""
        counts = np.diff(self.row_offsets)
        if self.partners is None:
            return np.arange(len(self.prepared)), self.row_offsets
        has = (self.partners != NO_PARTNER).astype(np.int64)
        offsets = np.concatenate(([0], np.cumsum(counts + has))).astype(np.int64)
        numbers = np.empty(int(offsets[-1]), dtype=np.int64)
        rows = np.flatnonzero(has)
        mismatched = np.zeros(len(numbers), dtype=bool)
        mismatched[offsets[rows + 1] - 1] = True
        numbers[mismatched] = len(self.prepared) + rows
        numbers[~mismatched] = np.arange(len(self.prepared))
        return numbers, offsets

    def positions(self, *, share_prompts: bool) -> IntArray:
        """Return how many positions of a packed batch each document takes."""
        lengths = self.lengths
        if not share_prompts:
            return lengths
        prompts = self.prepared.prompt_lengths
        branches = np.where(self.prepared.kinds == AnswerKind.REJECTED, prompts, 0)
        if self.partners is not None:
            own = prompts[self.row_offsets[:-1]]
            branches = np.append(branches, np.where(self.partners == NO_PARTNER, 0, own))
        return lengths - branches

    def expand(self, plan: BatchPlan, rows: IntArray) -> BatchPlan:
        """Turn a plan of rows into one of their documents.

        Args:
            plan: Of the entries of ``rows``.
            rows: Row numbers.
        """
        numbers, offsets = self.by_row()
        planned = rows[plan.rows]
        documents = numbers[expand_spans(np.stack((offsets[planned], offsets[planned + 1]), axis=1))]
        before = np.concatenate(([0], np.cumsum(np.diff(offsets)[planned])))
        return replace(plan, rows=documents, offsets=before[plan.offsets].astype(np.int64))

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.prepared, self.partners))


def choose_partners(prepared: PreparedDocuments, rows: IntArray, max_length: int, *, seed: int = 0) -> IntArray:
    """Choose for the prompt of each row an answer of another row with another prompt.

    In a random order of the rows, each takes the answer of the next; of a pair, one of the two by chance. Where prompt
    and answer together would be longer than ``max_length``, or the prompts are the same, the rows after it are tried.

    Args:
        prepared: The answers.
        rows: The rows of the stage, which alone give and take; repeats do not matter.
        max_length: Most tokens of a document.
        seed: Of the choice.

    Returns:
        For each row of ``prepared`` the number of a document, or -1.
    """
    offsets, prompts = prepared.row_offsets, prepared.prompt_lengths
    answers = prepared.lengths - prompts
    rng = np.random.default_rng([seed, 10])
    order = rng.permutation(np.unique(rows))
    coins = rng.random(len(order))
    given = offsets[order] + (coins * np.diff(offsets)[order]).astype(np.int64)
    asked = [_prompt_digest(prepared, int(offsets[row])) for row in order.tolist()]
    partners = np.full(len(offsets) - 1, NO_PARTNER, dtype=np.int64)
    for place, row in enumerate(order.tolist()):
        room = max_length - int(prompts[offsets[row]])
        for step in range(1, min(TRIES, len(order) - 1) + 1):
            other = (place + step) % len(order)
            if answers[given[other]] <= room and asked[other] != asked[place]:
                partners[row] = given[other]
                break
    return partners


def _prompt_digest(prepared: PreparedDocuments, index: int) -> bytes:
    document = prepared[index]
    prompt = document.input_ids[: document.supervised[0, 0]]
    return hashlib.blake2b(prompt.tobytes(), digest_size=8).digest()


def shared_lengths(documents: Sequence[Document]) -> list[int]:
    """Return how many tokens each document of a batch has in common with the first one of its row before it."""
    shared = []
    trunk: Document | None = None
    for document in documents:
        if document.kind not in (AnswerKind.REJECTED, AnswerKind.MISMATCHED):
            trunk = document
            shared.append(0)
            continue
        prompt = int(document.supervised[0, 0])
        assert trunk is not None
        assert np.array_equal(trunk.input_ids[:prompt], document.input_ids[:prompt]), "the prompts of a row differ"
        shared.append(prompt)
    return shared
