"""Rows as the model sees them: their text, what of it is supervised, and the control tokens in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from lightning_qlora.data.collators import AnswerKind, expand_spans
from lightning_qlora.data.encoding import RowEncoder
from lightning_qlora.data.formats import ParsedRow
from lightning_qlora.data.packing import IntArray
from lightning_qlora.data.prepared import PreparedDocuments
from lightning_qlora.data.sources import Sources, as_sources, read_rows
from lightning_qlora.schema import Origin, RowRefused, TokenizedRow
from lightning_qlora.tools.inspection.findings import Sample, Segment

__all__ = ["choose_rows", "show_document", "show_places", "split_segments"]


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


def show_document(
    documents: PreparedDocuments, row: int, tokenizer: PreTrainedTokenizerBase, sources: Sequence[str], stage: str
) -> Sample:
    """Decode a prepared row.

    Args:
        documents: The prepared rows.
        row: Its first document.
        tokenizer: That encoded them.
        sources: The names of the stage's sources.
        stage: Whose row it is.
    """
    answers = []
    for document in documents[row : row + 1 + (documents.kinds[row] == AnswerKind.CHOSEN)]:
        supervised = np.zeros(len(document.input_ids), dtype=bool)
        supervised[expand_spans(document.supervised)] = True
        encoded = TokenizedRow(document.input_ids.tolist(), supervised.tolist(), documents.origin(row))
        answers.append((encoded, document.kind))
    return _show(answers, tokenizer, sources[int(documents.parts[row])], stage)


def show_places(places: Sequence[str], stages: Mapping[str, Sources], encoder: RowEncoder) -> list[Sample]:
    """Read the rows at given places anew, and show each, or why it cannot be used.

    Args:
        places: ``FILE:LINE``, as messages name them; a file's name without its folder will do.
        stages: What each stage reads.
        encoder: How rows are prepared.

    Raises:
        ValueError: If there is no row at a place.
    """
    samples = [
        sample
        for stage, sources in stages.items()
        for source in as_sources(sources)
        for row in read_rows(source, encoder.task)
        if any(_is_at(place, row.origin) for place in places)
        for sample in [_show_anew(row, encoder, str(source), stage)]
    ]
    missing = [place for place in places if not any(_is_at(place, sample.place) for sample in samples)]
    if missing:
        raise ValueError(f"There is no row at {', '.join(missing)}. Write FILE:LINE as the messages do.")
    return samples


def _is_at(place: str, origin: Origin | str) -> bool:
    return str(origin) == place or str(origin).endswith("/" + place)


def _show_anew(row: ParsedRow | RowRefused, encoder: RowEncoder, source: str, stage: str) -> Sample:
    if not isinstance(row, RowRefused):
        fitted = encoder.fit([row], encoder.max_length)[0]
        if fitted.refusal is None:
            return replace(_show(fitted.documents, encoder.chat.tokenizer, source, stage), asked=True)
        row = fitted.refusal
    return Sample(stage, str(row.origin), source, 0, 0, [], f"{row.reason}: {row.detail}", asked=True)


def _show(
    answers: Sequence[tuple[TokenizedRow, AnswerKind]], tokenizer: PreTrainedTokenizerBase, source: str, stage: str
) -> Sample:
    (row, kind), *others = answers
    rejected: list[Segment] = []
    for other, _ in others:
        start = other.supervised.index(True)
        rejected = split_segments(tokenizer, other.input_ids[start:], other.supervised[start:])
    return Sample(
        stage,
        str(row.origin),
        source,
        sum(len(answer.input_ids) for answer, _ in answers),
        sum(sum(answer.supervised) for answer, _ in answers),
        split_segments(tokenizer, row.input_ids, row.supervised),
        answer=None if kind is AnswerKind.NONE else kind.name.lower(),
        rejected=rejected,
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
