"""What of an answer differs from a text that it should equal, word by word."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import Literal, NamedTuple

__all__ = ["Piece", "mark_differences"]

_TOKEN = re.compile(r"\w+|\s+|[^\w\s]")
_MOST_TOKENS = 1500  # difflib takes time that grows with the product of the lengths


class Piece(NamedTuple):
    """A part of a text: in both, only in the answer (``extra``), or only in what it should equal (``missing``)."""

    kind: Literal["same", "extra", "missing"]
    text: str


def mark_differences(answer: str, wanted: str) -> list[Piece]:
    """Align an answer with what it should equal.

    The pieces that are not ``missing`` make up the answer, those that are not ``extra`` what it should equal. Very long
    texts are aligned by lines instead of words.

    Args:
        answer: What was written.
        wanted: What it should equal.
    """
    found, expected = _TOKEN.findall(answer), _TOKEN.findall(wanted)
    if max(len(found), len(expected)) > _MOST_TOKENS:
        found, expected = answer.splitlines(keepends=True), wanted.splitlines(keepends=True)
    if max(len(found), len(expected)) > _MOST_TOKENS:
        found, expected = [answer], [wanted]
    pieces: list[Piece] = []
    for kind, i, j, m, n in SequenceMatcher(None, expected, found, autojunk=False).get_opcodes():
        if kind == "equal":
            pieces.append(Piece("same", "".join(expected[i:j])))
            continue
        if j > i:
            pieces.append(Piece("missing", "".join(expected[i:j])))
        if n > m:
            pieces.append(Piece("extra", "".join(found[m:n])))
    return pieces
