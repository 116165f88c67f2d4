"""What of an answer differs from a text that it should equal, word by word."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import Literal, NamedTuple

__all__ = ["Piece", "mark_differences"]

_TOKEN = re.compile(r"\w+|\s+|[^\w\s]")
_LEAST_IN_COMMON = 0.4
_MOST_TOKENS = 1500  # difflib takes time that grows with the product of the lengths


class Piece(NamedTuple):
    """A part of a text.

    Attributes:
        kind: ``same`` is in both texts, ``extra`` only in the answer, ``missing`` only in what it should equal;
            ``other`` is a whole answer that has too little in common for marks to help.
        text: The part.
    """

    kind: Literal["same", "extra", "missing", "other"]
    text: str


def mark_differences(answer: str, wanted: str) -> list[Piece]:
    """Align an answer with what it should equal.

    The pieces that are not ``missing`` make up the answer; those that are not ``extra`` make up what it should equal,
    unless it is ``other``. Very long texts are aligned by lines instead of words.

    Args:
        answer: What was written.
        wanted: What it should equal.
    """
    found, expected = _TOKEN.findall(answer), _TOKEN.findall(wanted)
    if max(len(found), len(expected)) > _MOST_TOKENS:
        found, expected = answer.splitlines(keepends=True), wanted.splitlines(keepends=True)
    if max(len(found), len(expected)) > _MOST_TOKENS:
        found, expected = [answer], [wanted]
    opcodes = SequenceMatcher(None, expected, found, autojunk=False).get_opcodes()
    in_common = sum(_num_words(expected[i:j]) for kind, i, j, _, _ in opcodes if kind == "equal")
    if answer and 2 * in_common < _LEAST_IN_COMMON * (_num_words(expected) + _num_words(found)):
        return [Piece("other", answer)]
    pieces: list[Piece] = []
    for kind, i, j, m, n in opcodes:
        if kind == "equal":
            pieces.append(Piece("same", "".join(expected[i:j])))
            continue
        if j > i:
            pieces.append(Piece("missing", "".join(expected[i:j])))
        if n > m:
            pieces.append(Piece("extra", "".join(found[m:n])))
    return pieces


def _num_words(tokens: list[str]) -> int:
    return sum(not token.isspace() for token in tokens)
