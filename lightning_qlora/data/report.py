"""What became of every row: counts by source and reason that always add up, lengths, and what the limit did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from lightning_qlora.data.documents import AnswerKind
from lightning_qlora.data.truncation import OUTCOMES, Fitted
from lightning_qlora.schema import RowRefused

__all__ = ["LENGTH_STEP", "PERCENTILES", "AnswerLengths", "PreparationReport", "SourceReport"]

LENGTH_STEP = 32
"""Width of a step of the length histogram, in tokens. Any limit that is a multiple of it is answered exactly."""

K = TypeVar("K", int, str)

PERCENTILES = (5, 25, 50, 75, 95, 99, 100)

_EXAMPLES_PER_REASON = 3


@dataclass
class AnswerLengths:
    """How long good and bad answers are: a model may learn length from a difference, rather than what was meant.

    Attributes:
        num_chosen: Preferred (or desirable) answers.
        num_rejected: Rejected (or undesirable) answers.
        chosen_tokens: Supervised tokens of the former.
        rejected_tokens: Supervised tokens of the latter.
        num_pairs: Rows that hold both.
        chosen_longer: Pairs whose chosen answer is the longer one.
        rejected_longer: Pairs whose rejected answer is.
    """

    num_chosen: int = 0
    num_rejected: int = 0
    chosen_tokens: int = 0
    rejected_tokens: int = 0
    num_pairs: int = 0
    chosen_longer: int = 0
    rejected_longer: int = 0

    @property
    def mean_chosen_tokens(self) -> float:
        """Mean length of a preferred answer, in tokens."""
        return self.chosen_tokens / max(1, self.num_chosen)

    @property
    def mean_rejected_tokens(self) -> float:
        """Mean length of a rejected answer, in tokens."""
        return self.rejected_tokens / max(1, self.num_rejected)

    @property
    def chosen_longer_share(self) -> float:
        """Share of the pairs whose chosen answer is the longer one, from 0 to 1."""
        return self.chosen_longer / max(1, self.num_pairs)

    @property
    def rejected_longer_share(self) -> float:
        """Share of the pairs whose rejected answer is the longer one."""
        return self.rejected_longer / max(1, self.num_pairs)

    def add(self, answers: Iterable[tuple[AnswerKind, int]]) -> None:
        """Count the answers of a row: what each is, and its supervised tokens."""
        lengths = dict(answers)
        for kind, length in lengths.items():
            if kind in (AnswerKind.CHOSEN, AnswerKind.DESIRABLE):
                self.num_chosen += 1
                self.chosen_tokens += length
            elif kind in (AnswerKind.REJECTED, AnswerKind.UNDESIRABLE):
                self.num_rejected += 1
                self.rejected_tokens += length
        if AnswerKind.CHOSEN in lengths:
            difference = lengths[AnswerKind.CHOSEN] - lengths[AnswerKind.REJECTED]
            self.num_pairs += 1
            self.chosen_longer += difference > 0
            self.rejected_longer += difference < 0

    def merge(self, other: AnswerLengths) -> None:
        """Add the counts of some more rows."""
        for name, count in asdict(other).items():
            setattr(self, name, getattr(self, name) + count)


@dataclass
class SourceReport:
    """The account of one source.

    Attributes:
        name: The source, as it was written.
        rows_read: Rows that it held, each either kept or refused.
        rows_kept: Rows in the prepared data set.
        refused: Refused rows by reason.
        examples: The first refused rows of each reason: ``reason``, ``place`` (file:line) and ``detail``.
        truncation: Rows by what the length policy did to them: ``fits``, ``turns-dropped``, ``cut-start``,
            ``cut-end``, ``too-long``. Rows that were refused before they had a length are in none.
        num_tokens: Tokens of the kept rows.
        num_supervised_tokens: The supervised ones among them.
        full_lengths: Rows by their length before the policy, in steps: the key is the upper bound of the step. The
            length of a pair is that of its longer side.
        answers: How long the answers of preference data are; all zero for others.
    """

    name: str
    rows_read: int = 0
    rows_kept: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    examples: list[dict[str, str]] = field(default_factory=list)
    truncation: dict[str, int] = field(default_factory=dict)
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    full_lengths: dict[int, int] = field(default_factory=dict)
    answers: AnswerLengths = field(default_factory=AnswerLengths)

    def refuse(self, refusal: RowRefused) -> None:
        """Count a row that cannot be used."""
        self.rows_read += 1
        seen = self.refused.get(refusal.reason, 0)
        self.refused[refusal.reason] = seen + 1
        if seen < _EXAMPLES_PER_REASON:
            example = {"reason": refusal.reason, "place": str(refusal.origin), "detail": refusal.detail}
            self.examples.append(example)

    def add(self, row: Fitted) -> None:
        """Count a row that was tokenised; two answers to one prompt are one row."""
        if row.outcome is not None:
            self.truncation[row.outcome] = self.truncation.get(row.outcome, 0) + 1
            step = -(-row.full_length // LENGTH_STEP) * LENGTH_STEP
            self.full_lengths[step] = self.full_lengths.get(step, 0) + 1
        if row.refusal is not None:
            self.refuse(row.refusal)
            return
        self.rows_read += 1
        self.rows_kept += 1
        supervised = [(kind, encoded.supervised.count(True)) for encoded, kind in row.documents]
        self.num_tokens += sum(len(encoded.input_ids) for encoded, _ in row.documents)
        self.num_supervised_tokens += sum(count for _, count in supervised)
        self.answers.add(supervised)

    def invalid_rows(self, overlong: str) -> int:
        """Return the refused rows, except those that the user asked to be refused for their length.

        Args:
            overlong: The policy for longer rows.
        """
        asked = self.truncation.get("too-long", 0) if overlong == "drop_row" else 0
        return sum(self.refused.values()) - asked

    def merge(self, other: SourceReport) -> None:
        """Add the counts of some more rows of this source."""
        for refusal in other.examples:
            shown = sum(example["reason"] == refusal["reason"] for example in self.examples)
            if shown < _EXAMPLES_PER_REASON:
                self.examples.append(refusal)
        self.refused = _sum(self.refused, other.refused)
        self.truncation = _sum(self.truncation, other.truncation)
        self.full_lengths = _sum(self.full_lengths, other.full_lengths)
        self.rows_read += other.rows_read
        self.rows_kept += other.rows_kept
        self.num_tokens += other.num_tokens
        self.num_supervised_tokens += other.num_supervised_tokens
        self.answers.merge(other.answers)


@dataclass
class PreparationReport:
    """The account of a prepared data set.

    Attributes:
        fingerprint: Hash of everything that the prepared rows depend on: the cache's key.
        max_length: The limit, in tokens.
        overlong: The policy for rows above it.
        sources: One account for each source, in their order.
        length_percentiles: Tokens of the kept rows (of each answer with its prompt) at each of :data:`PERCENTILES`.
        num_duplicates: Kept rows whose tokens equal an earlier row's.
        packing: How the training rows share batches (``batches``, ``efficiency``, ``tokens_per_batch``), once known.
    """

    fingerprint: str
    max_length: int
    overlong: str
    sources: list[SourceReport] = field(default_factory=list)
    length_percentiles: dict[int, int] = field(default_factory=dict)
    num_duplicates: int = 0
    packing: dict[str, float] | None = None

    @property
    def rows_read(self) -> int:
        """Rows of all sources."""
        return sum(s.rows_read for s in self.sources)

    @property
    def rows_kept(self) -> int:
        """Rows in the prepared data set."""
        return sum(s.rows_kept for s in self.sources)

    @property
    def refused(self) -> dict[str, int]:
        """Refused rows by reason, most frequent first."""
        return dict(Counter(_sum(*(s.refused for s in self.sources))).most_common())

    @property
    def truncation(self) -> dict[str, int]:
        """Rows by what the length policy did, every outcome named."""
        total = _sum(*(s.truncation for s in self.sources))
        return {outcome: total.get(outcome, 0) for outcome in OUTCOMES}

    @property
    def num_tokens(self) -> int:
        """Tokens of the kept rows."""
        return sum(s.num_tokens for s in self.sources)

    @property
    def num_supervised_tokens(self) -> int:
        """Tokens that the model learns to write."""
        return sum(s.num_supervised_tokens for s in self.sources)

    @property
    def examples(self) -> list[dict[str, str]]:
        """The first refused rows of each source and reason."""
        return [example for s in self.sources for example in s.examples]

    @property
    def answers(self) -> AnswerLengths:
        """How long the answers of preference data are."""
        total = AnswerLengths()
        for source in self.sources:
            total.merge(source.answers)
        return total

    @property
    def full_lengths(self) -> dict[int, int]:
        """Rows by their length before the policy, in steps of :data:`LENGTH_STEP` tokens."""
        return dict(sorted(_sum(*(s.full_lengths for s in self.sources)).items()))

    def rows_longer_than(self, max_length: int) -> int:
        """Return how many rows another limit would concern (exact for multiples of :data:`LENGTH_STEP`)."""
        return sum(count for bound, count in self.full_lengths.items() if bound > max_length)

    def invalid_rows(self) -> int:
        """Return the refused rows, except those that the user asked to be refused for their length."""
        return sum(source.invalid_rows(self.overlong) for source in self.sources)

    def describe_lengths(self, lengths: npt.NDArray[np.int64]) -> None:
        """Fill in the percentiles."""
        if len(lengths):
            values = np.percentile(lengths, PERCENTILES, method="higher")
            self.length_percentiles = {p: int(v) for p, v in zip(PERCENTILES, values, strict=True)}

    def check(self) -> None:
        """Assert that every row that was read is accounted for, once."""
        for source in self.sources:
            accounted = source.rows_kept + sum(source.refused.values())
            assert source.rows_read == accounted, (
                f"{source.name}: {source.rows_read} rows read, {accounted} accounted for"
            )
            assert sum(source.truncation.values()) == sum(source.full_lengths.values())
            assert source.rows_kept <= sum(source.truncation.values()) <= source.rows_read

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PreparationReport:
        """Return the report that :meth:`to_dict` wrote, also after JSON turned numeric keys into text."""
        sources = [
            SourceReport(
                **{**s, "full_lengths": _int_keys(s["full_lengths"]), "answers": AnswerLengths(**s["answers"])}
            )
            for s in values["sources"]
        ]
        percentiles = _int_keys(values["length_percentiles"])
        return cls(**{**values, "sources": sources, "length_percentiles": percentiles})

    def table(self) -> str:
        """Return the counts by source and reason, with examples, as text."""
        lines = []
        for source in self.sources:
            lines.append(f"{source.name}: {source.rows_read} rows read, {source.rows_kept} kept")
            for reason, count in sorted(source.refused.items(), key=lambda item: -item[1]):
                lines.append(f"  {count:>8}  {reason}")
                lines += [f"            {e['place']}: {e['detail']}" for e in source.examples if e["reason"] == reason]
        return "\n".join(lines)


def _sum(*counts: dict[K, int]) -> dict[K, int]:
    total: Counter[K] = Counter()
    for some in counts:
        total.update(some)
    return dict(total)


def _int_keys(values: Iterable[Any]) -> dict[int, int]:
    return {int(key): value for key, value in dict(values).items()}
