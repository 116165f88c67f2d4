"""Rows as the model sees them: their text, what of it is supervised, and the control tokens in it."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from lightning_qlora.data.collators import expand_spans
from lightning_qlora.data.packing import IntArray
from lightning_qlora.data.prepared import PreparedDocuments
from lightning_qlora.tools.inspection.findings import Sample, Segment

__all__ = ["choose_rows", "show_row", "split_segments", "visible"]

_JOINERS = "\u200c\u200d"  # parts of words and emoji; they draw nothing by themselves
_HIDDEN = ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")


def choose_rows(parts: IntArray, rows: IntArray, count: int, *, seed: int) -> IntArray:
    """Draw rows from all sources in turn, so that a small one is seen too.

    Args:
        parts: The source of each prepared row.
        rows: The numbers of the rows in use.
        count: How many to draw, at most.
        seed: Of the draw.
    """
    shuffled = np.random.default_rng([seed, 8]).permutation(rows)
    sources = parts[shuffled]
    turn = np.empty(len(shuffled), dtype=np.int64)
    for part in np.unique(sources):
        own = np.flatnonzero(sources == part)
        turn[own] = np.arange(len(own))
    drawn: IntArray = shuffled[np.argsort(turn, kind="stable")[:count]]
    return drawn


def show_row(
    documents: PreparedDocuments, row: int, tokenizer: PreTrainedTokenizerBase, sources: Sequence[str], stage: str
) -> Sample:
    """Decode a prepared row.

    Args:
        documents: The prepared rows.
        row: Which of them.
        tokenizer: That encoded them.
        sources: The names of the stage's sources.
        stage: Whose row it is.
    """
    document = documents[row]
    supervised = np.zeros(len(document.input_ids), dtype=bool)
    supervised[expand_spans(document.supervised)] = True
    return Sample(
        stage,
        str(documents.origin(row)),
        sources[int(documents.parts[row])],
        len(supervised),
        int(supervised.sum()),
        split_segments(tokenizer, document.input_ids.tolist(), supervised.tolist()),
    )


def split_segments(
    tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], supervised: Sequence[bool]
) -> list[Segment]:
    """Split a row into runs of tokens that are alike; each control token is a run by itself.

    Text that only spells a control token comes out as text: it is the ids that tell.
    """
    added = tokenizer.added_tokens_decoder
    control = {token_id for token_id, token in added.items() if not str(token).isspace()}
    segments: list[Segment] = []
    begin = previous = 0
    for end in range(1, len(input_ids) + 1):
        here, alone = supervised[begin], input_ids[begin] in control
        if end < len(input_ids) and not alone and supervised[end] == here and input_ids[end] not in control:
            continue
        text = str(added[input_ids[begin]]) if alone else _decode_after(tokenizer, input_ids, previous, begin, end)
        segments.append(Segment(text, here, alone))
        previous, begin = begin, end
    return segments


def _decode_after(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], before: int, begin: int, end: int) -> str:
    """Decode ``begin`` to ``end`` as it reads after what comes before: some decoders drop a first space."""
    context, whole = _decode(tokenizer, ids[before:begin]), _decode(tokenizer, ids[before:end])
    return whole[len(context) :] if whole.startswith(context) else _decode(tokenizer, ids[begin:end])


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def visible(text: str) -> str:
    r"""Write characters that draw nothing, or that steer a terminal or the direction of text, as ``\u001b``."""
    if text.isprintable():
        return text
    return "".join(character if _draws(character) else f"\\u{ord(character):04x}" for character in text)


def _draws(character: str) -> bool:
    return character in "\n\t" or character in _JOINERS or unicodedata.category(character) not in _HIDDEN
