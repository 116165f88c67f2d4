"""One pass over the tokens of a stage: beginning-of-sequence tokens, the questions of its answers, and repeats."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.data.packing import IntArray
from lightning_qlora.data.prepared import PreparedDocuments
from lightning_qlora.schema import Message, RowRefused
from lightning_qlora.tools.inspection.findings import BosFindings, Leakage, Repeat

__all__ = ["Contents", "find_bos", "find_duplicates", "find_leakage", "read_contents"]

EXAMPLES = 5
"""Repeats that are named."""

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Contents:
    """What the tokens of a stage's rows hold.

    Attributes:
        documents: The prepared rows.
        rows: The numbers of those in use, ascending, each once.
        bos_at_start: Rows by the beginning-of-sequence tokens that they begin with.
        bos_later: Rows that hold one further on, by the number that they begin with.
        questions: Hashes of all that comes before each answer; rows without a question have none.
        question_rows: The row of each of them.
        last_questions: For each row that has one, the hash of all that comes before its last answer.
        last_question_rows: The rows that have one.
    """

    documents: PreparedDocuments
    rows: IntArray
    bos_at_start: dict[int, int]
    bos_later: dict[int, int]
    questions: Hashes
    question_rows: IntArray
    last_questions: Hashes
    last_question_rows: IntArray

    @property
    def digests(self) -> Hashes:
        """Hash of the tokens of each row."""
        return self.documents.digests[self.rows]

    def place(self, row: int) -> str:
        """Return the file and line of a row."""
        return str(self.documents.origin(int(row)))


def read_contents(documents: PreparedDocuments, rows: IntArray, bos_token_id: int | None, name: str) -> Contents:
    """Read the tokens of the rows.

    Args:
        documents: The prepared rows.
        rows: Which of them are in use.
        bos_token_id: The beginning-of-sequence token, if there is one.
        name: What the progress bar calls them.
    """
    distinct = np.unique(rows)
    at_start: Counter[int] = Counter()
    later: Counter[int] = Counter()
    questions: list[int] = []
    question_rows: list[int] = []
    last: list[int] = []
    last_rows: list[int] = []
    for row in tqdm(distinct.tolist(), desc=f"Reading {name}", unit=" rows", disable=None):
        document = documents[row]
        if bos_token_id is not None:
            places = np.flatnonzero(document.input_ids == bos_token_id)
            begins = int(np.sum(places == np.arange(len(places))))
            at_start[begins] += 1
            later[begins] += begins < len(places)
        hashes = _hash_questions(document.input_ids, document.supervised)
        questions += hashes
        question_rows += [row] * len(hashes)
        last += hashes[-1:]
        last_rows += [row] * bool(hashes)
    return Contents(
        documents,
        distinct,
        dict(sorted(at_start.items())),
        dict(later),
        np.asarray(questions, dtype=np.uint64),
        np.asarray(question_rows, dtype=np.int64),
        np.asarray(last, dtype=np.uint64),
        np.asarray(last_rows, dtype=np.int64),
    )


def _hash_questions(input_ids: npt.NDArray[np.integer], spans: npt.NDArray[np.integer]) -> list[int]:
    """Hash what comes before each supervised span.

    Text that is learned from its beginning has no question: its first token is not supervised only because nothing
    comes before it.
    """
    digest = hashlib.blake2b(digest_size=8)
    hashes, done = [], 0
    for start in spans[:, 0].tolist():
        digest.update(input_ids[done:start].tobytes())
        done = start
        if start > 1:
            hashes.append(int.from_bytes(digest.copy().digest(), "little"))
    return hashes


def find_bos(contents: Contents, chat: ChatTemplate) -> BosFindings | None:
    """Compare the rows' beginning-of-sequence tokens with what the tokenizer writes by itself."""
    bos = chat.tokenizer.bos_token_id
    if bos is None:
        return None
    expected = {_begins_with(list(chat.tokenizer("a").input_ids), bos)}
    opens_turns = False
    dialogue = [Message("user", "a"), Message("assistant", "a"), Message("user", "a")]
    for messages in (dialogue, dialogue[:1]):
        try:
            ids = chat.encode_prompt(messages)
        except RowRefused:
            continue  # a template that knows no such chat, or no template
        expected.add(_begins_with(ids, bos))
        opens_turns = opens_turns or ids.count(bos) > _begins_with(ids, bos)
    unexpected = sum(
        rows if begins not in expected else 0 if opens_turns else contents.bos_later.get(begins, 0)
        for begins, rows in contents.bos_at_start.items()
    )
    return BosFindings(
        contents.bos_at_start, sorted(expected), sum(contents.bos_later.values()), opens_turns, unexpected
    )


def _begins_with(ids: Sequence[int], token: int) -> int:
    return next((place for place, found in enumerate(ids) if found != token), len(ids))


def find_duplicates(contents: Contents) -> tuple[int, list[Repeat]]:
    """Count the rows in use whose tokens equal an earlier one's, and name the first."""
    _, first, group = np.unique(contents.digests, return_index=True, return_inverse=True)
    earlier = first[group]
    repeated = np.flatnonzero(earlier != np.arange(len(group)))
    rows = contents.rows
    examples = [Repeat(contents.place(rows[i]), contents.place(rows[earlier[i]])) for i in repeated[:EXAMPLES]]
    return len(repeated), examples


def find_leakage(stage: str, evaluated: Contents, trained: Contents) -> Leakage:
    """Count the rows of a stage that are trained on, whole or with another answer."""
    exact = np.flatnonzero(np.isin(evaluated.digests, trained.digests))
    same = np.flatnonzero(np.isin(evaluated.last_questions, trained.questions))
    exact_rows = evaluated.rows[exact]
    only_question = same[~np.isin(evaluated.last_question_rows[same], exact_rows)]
    return Leakage(
        stage,
        len(evaluated.rows),
        len(exact),
        len(same),
        [
            Repeat(evaluated.place(evaluated.rows[i]), trained.place(_row_of(trained.digests, trained.rows, digest)))
            for i, digest in ((i, evaluated.digests[i]) for i in exact[:EXAMPLES])
        ],
        [
            Repeat(
                evaluated.place(evaluated.last_question_rows[i]),
                trained.place(_row_of(trained.questions, trained.question_rows, evaluated.last_questions[i])),
            )
            for i in only_question[:EXAMPLES]
        ],
    )


def _row_of(hashes: Hashes, rows: IntArray, value: np.uint64) -> int:
    return int(rows[np.flatnonzero(hashes == value)[0]])
