"""What another length limit would do to the rows: counted by doing it, not guessed from lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_qlora.data.encoding import RowEncoder
from lightning_qlora.data.formats import ParsedRow
from lightning_qlora.data.preparation import CHUNK_ROWS
from lightning_qlora.data.prepared import PreparedDocuments
from lightning_qlora.data.report import PreparationReport
from lightning_qlora.data.sources import Sources, as_sources, read_rows
from lightning_qlora.data.truncation import Fitted
from lightning_qlora.schema import RowRefused
from lightning_qlora.tools.inspection.findings import LengthWhatIf

__all__ = ["try_limits"]

NO_LIMIT = 2**62
"""Tokens that no row has."""


@dataclass
class _Count:
    fits: int = 0
    shortened: int = 0
    refused: int = 0
    num_tokens: int = 0


def try_limits(
    sources: Sources,
    encoder: RowEncoder,
    documents: PreparedDocuments,
    report: PreparationReport,
    limits: Sequence[int],
) -> list[LengthWhatIf]:
    """Count what each limit would do to the rows that can be tokenised.

    Whether a chat that is too long can lose turns and still be used depends on its turns, so the rows are read once
    more, and those above the shortest limit are tokenised and shortened anew. Where no row is, nothing is read.

    Args:
        sources: Of the prepared rows.
        encoder: How they were prepared.
        documents: The prepared rows.
        report: What became of all rows.
        limits: In tokens; the configured one is tried too.
    """
    tried = sorted({*limits, encoder.max_length})
    counts = {limit: _Count() for limit in tried}
    measured = sum(report.full_lengths.values())
    if max(report.full_lengths, default=0) <= tried[0]:
        for count in counts.values():
            count.fits, count.num_tokens = measured, report.num_tokens
    else:
        for chunk in _chunks(_rows_above(sources, encoder, documents, report, tried[0], counts)):
            _measure(chunk, encoder, counts)
    assert all(c.fits + c.shortened + c.refused == measured for c in counts.values()), "a row was lost or read twice"
    return [
        LengthWhatIf(limit, c.fits, c.shortened, c.refused, c.num_tokens, limit == encoder.max_length)
        for limit, c in counts.items()
    ]


def _rows_above(
    sources: Sources,
    encoder: RowEncoder,
    documents: PreparedDocuments,
    report: PreparationReport,
    shortest: int,
    counts: dict[int, _Count],
) -> Iterator[ParsedRow]:
    """Read the rows again, and yield those not known to be within every limit; the others are counted at once.

    Prepared rows stand in the order in which they were read. Their lengths are those of the whole rows only if the
    policy shortened none.
    """
    whole = not any(count for outcome, count in report.truncation.items() if outcome not in ("fits", "too-long"))
    starts = documents.row_offsets[:-1]
    longest = np.maximum.reduceat(documents.lengths, starts) if len(starts) else documents.lengths
    tokens = np.add.reduceat(documents.lengths, starts) if len(starts) else documents.lengths
    upcoming = 0
    for source in as_sources(sources):
        for row in tqdm(read_rows(source, encoder.task), desc="Trying other limits", unit=" rows", disable=None):
            if isinstance(row, RowRefused):
                continue
            prepared = upcoming < len(starts) and documents.origin(int(starts[upcoming])) == row.origin
            at, upcoming = upcoming, upcoming + prepared
            if whole and prepared and longest[at] <= shortest:
                for count in counts.values():
                    count.fits += 1
                    count.num_tokens += int(tokens[at])
            else:
                yield row


def _chunks(rows: Iterator[ParsedRow]) -> Iterator[list[ParsedRow]]:
    chunk: list[ParsedRow] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == CHUNK_ROWS:
            yield chunk
            chunk = []
    yield chunk


def _measure(rows: list[ParsedRow], encoder: RowEncoder, counts: dict[int, _Count]) -> None:
    encoded = [
        (row, fitted) for row, fitted in zip(rows, encoder.fit(rows, NO_LIMIT), strict=True) if fitted.refusal is None
    ]
    for limit, count in counts.items():
        fitting = [fitted for _, fitted in encoded if fitted.full_length <= limit]
        count.fits += len(fitting)
        count.num_tokens += sum(_num_tokens(fitted) for fitted in fitting)
        above = [row for row, fitted in encoded if fitted.full_length > limit]
        for shortened in encoder.fit(above, limit):
            if shortened.refusal is not None:
                count.refused += 1
            else:
                count.shortened += 1
                count.num_tokens += _num_tokens(shortened)


def _num_tokens(fitted: Fitted) -> int:
    return sum(len(document.input_ids) for document, _ in fitted.documents)
