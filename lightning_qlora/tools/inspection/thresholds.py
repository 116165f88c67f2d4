"""Limits on what an inspection may find, so that a pipeline stops before it trains on bad data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

from lightning_qlora.data.report import PreparationReport
from lightning_qlora.tools.inspection.findings import Inspection, Leakage, StageFindings, Verdict

__all__ = ["Thresholds", "describe_missed", "judge"]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The limits asked for; ``None`` for no limit.

    Attributes:
        max_refused_fraction: Share of the rows read that may be refused, for whatever reason.
        max_shortened_fraction: Share of the rows read that the length policy may shorten.
        min_supervised_share: Least share of supervised tokens.
        max_duplicates: Rows whose tokens equal an earlier row's.
        max_leakage: Validation or test rows that are training rows too.
        max_question_leakage: Validation or test rows whose question is trained on, whatever the answer.
        max_invalid_fraction: The data module's own limit, above which ``fit`` does not start.

    Raises:
        ValueError: If a limit is out of its range.
    """

    max_refused_fraction: float | None = None
    max_shortened_fraction: float | None = None
    min_supervised_share: float | None = None
    max_duplicates: int | None = None
    max_leakage: int | None = None
    max_question_leakage: int | None = None
    max_invalid_fraction: float | None = None

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            share = "fraction" in name or "share" in name
            if value is not None and not 0 <= value <= (1 if share else math.inf):
                allowed = "a share from 0 to 1" if share else "a whole number from 0"
                raise ValueError(f"{name} is {value}; write {allowed}.")


class _Rule(NamedTuple):
    what: str
    found: Callable[[StageFindings | Leakage], float | None]
    is_share: bool = True
    is_least: bool = False


def judge(inspection: Inspection, thresholds: Thresholds) -> list[Verdict]:
    """Hold each limit against each stage that it concerns."""
    return [
        verdict
        for name, rule in _RULES.items()
        if (allowed := getattr(thresholds, name)) is not None
        for verdict in _apply(inspection, name, rule, allowed)
    ]


def describe_missed(inspection: Inspection) -> str:
    """Return one message with every limit that is missed, what was found and what is allowed."""
    lines = [f"  {verdict.text}" for verdict in inspection.missed]
    noun = "limit is" if len(lines) == 1 else "limits are"
    return "\n".join([f"{len(lines)} {noun} not kept:", *lines, "Correct the data, or change the option named."])


def _apply(inspection: Inspection, name: str, rule: _Rule, allowed: float) -> Iterator[Verdict]:
    subjects: list[StageFindings | Leakage] = [*inspection.stages, *inspection.leakage]
    for subject in subjects:
        found = rule.found(subject)
        if found is None:
            continue
        passed = found >= allowed if rule.is_least else found <= allowed
        stage = subject.name if isinstance(subject, StageFindings) else subject.stage
        found_text, allowed_text = (_share(found), _share(allowed)) if rule.is_share else (f"{found:,}", f"{allowed:,}")
        word = "at least" if rule.is_least else "at most"
        text = f"{stage}: {rule.what} {found_text}, allowed {word} {allowed_text} ({name})"
        yield Verdict(name, stage, found, allowed, passed, text)


def _share(value: float) -> str:
    return f"{100 * value:.4g} %"


def _of_rows(count: Callable[[PreparationReport], int]) -> Callable[[StageFindings | Leakage], float | None]:
    def share(subject: StageFindings | Leakage) -> float | None:
        if not isinstance(subject, StageFindings) or subject.report is None:
            return None
        return count(subject.report) / max(1, subject.report.rows_read)

    return share


def _shortened(report: PreparationReport) -> int:
    return sum(count for outcome, count in report.truncation.items() if outcome not in ("fits", "too-long"))


_RULES: dict[str, _Rule] = {
    "max_refused_fraction": _Rule("refused rows", _of_rows(lambda report: sum(report.refused.values()))),
    "max_invalid_fraction": _Rule("unusable rows", _of_rows(lambda report: report.invalid_rows())),
    "max_shortened_fraction": _Rule("shortened rows", _of_rows(_shortened)),
    "min_supervised_share": _Rule(
        "supervised tokens", lambda s: s.supervised_fraction if isinstance(s, StageFindings) else None, is_least=True
    ),
    "max_duplicates": _Rule(
        "duplicate rows", lambda s: s.num_duplicates if isinstance(s, StageFindings) else None, is_share=False
    ),
    "max_leakage": _Rule(
        "rows that are trained on", lambda s: s.num_exact if isinstance(s, Leakage) else None, is_share=False
    ),
    "max_question_leakage": _Rule(
        "rows whose question is trained on",
        lambda s: s.num_same_question if isinstance(s, Leakage) else None,
        is_share=False,
    ),
}
