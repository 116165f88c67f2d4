"""Counts of rows by source and verdict, which always add up to the rows read and can be merged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from lightning_qlora.schema import RowRefused

__all__ = ["RowCounts", "SourceCounts"]

_EXAMPLES: Final = 3


@dataclass
class SourceCounts:
    """What became of the rows of one source.

    Attributes:
        read: Rows that were read, counted when they are, before there is a verdict.
        kept: Rows that were used at least once.
        left_out: Good rows that a weight below 1 left out.
        repeats: Further uses of kept rows, through a weight above 1 (not part of ``read``).
        refused: Refused rows by reason.
        examples: The first refusals of each reason, as [file, line, detail].
    """

    read: int = 0
    kept: int = 0
    left_out: int = 0
    repeats: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[list[Any]]] = field(default_factory=dict)

    def refuse(self, refusal: RowRefused) -> None:
        """Count a row that cannot be used."""
        self.refused[refusal.reason] = self.refused.get(refusal.reason, 0) + 1
        self._remember(refusal.reason, [[refusal.origin.source, refusal.origin.line, refusal.detail]])

    def merge(self, other: SourceCounts) -> None:
        """Add the counts of another share of the same source."""
        self.read += other.read
        self.kept += other.kept
        self.left_out += other.left_out
        self.repeats += other.repeats
        self.refused = dict(Counter(self.refused) + Counter(other.refused))
        for reason, examples in other.examples.items():
            self._remember(reason, examples)

    def _remember(self, reason: str, examples: list[list[Any]]) -> None:
        # Sorted by place, so that the outcome does not depend on the order of merging.
        self.examples[reason] = sorted([*self.examples.get(reason, []), *examples])[:_EXAMPLES]

    @property
    def adds_up(self) -> bool:
        """Whether every row read has exactly one verdict."""
        return self.read == self.kept + self.left_out + sum(self.refused.values())


class RowCounts:
    """The counts of several sources.

    Args:
        sources: The counts by the name of the source.
    """

    def __init__(self, sources: Mapping[str, SourceCounts] | None = None) -> None:
        self.sources: dict[str, SourceCounts] = dict(sources or {})

    def __getitem__(self, source: str) -> SourceCounts:
        return self.sources.setdefault(source, SourceCounts())

    @property
    def total(self) -> SourceCounts:
        """All sources together."""
        total = SourceCounts()
        for counts in self.sources.values():
            total.merge(counts)
        return total

    def merge(self, other: RowCounts) -> None:
        """Add the counts of another reader, such as another worker's share."""
        for name, counts in other.sources.items():
            self[name].merge(counts)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts as plain values."""
        return {name: asdict(counts) for name, counts in self.sources.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RowCounts:
        """Restore what ``state_dict`` returned."""
        copies = {
            name: {**counts, "refused": dict(counts["refused"]), "examples": _copied(counts["examples"])}
            for name, counts in state.items()
        }
        return cls({name: SourceCounts(**counts) for name, counts in copies.items()})

    def __str__(self) -> str:
        lines = []
        for name, counts in self.sources.items():
            left_out = f", {counts.left_out} left out by weight" if counts.left_out else ""
            repeats = f", {counts.repeats} repeats" if counts.repeats else ""
            refused = sum(counts.refused.values())
            lines.append(f"{name}: {counts.read} read, {counts.kept} kept, {refused} refused{left_out}{repeats}")
            for reason, number in sorted(counts.refused.items(), key=lambda item: -item[1]):
                source, line, detail = counts.examples[reason][0]
                lines.append(f"  {reason}: {number}, first {source}:{line}: {detail}")
        return "\n".join(lines)


def _copied(examples: Mapping[str, list[list[Any]]]) -> dict[str, list[list[Any]]]:
    return {reason: [list(example) for example in found] for reason, found in examples.items()}
