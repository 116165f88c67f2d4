"""Who answered, how well, and who answered better: everything that the outputs show, without a model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from lightning_qlora.evaluation import (
    METRICS,
    AnswerSheet,
    Difference,
    Estimate,
    Question,
    Verdict,
    difference,
    estimate,
    holm,
    judge,
    measure,
)

__all__ = ["Comparison", "Limit", "PairFindings", "Participant", "TagFindings", "compare_participants"]


class Participant:
    """One who answered.

    Args:
        kind: The base, an adapter on it, a merged model, or an earlier comparison's candidate.
        path: Where it was loaded from.
        questions: Q questions.
        sheet: The answers to them.
        asked: (Q,) whether it was asked each; without it, all.
    """

    def __init__(
        self,
        kind: Literal["base", "adapter", "merged", "previous"],
        path: str,
        questions: Sequence[Question],
        sheet: AnswerSheet,
        asked: Sequence[bool] | None = None,
    ) -> None:
        self.kind = kind
        self.path = path
        self.sheet = sheet
        self.asked = tuple(asked or [True] * len(questions))
        weight = np.array(self.asked, dtype=np.float64)
        self.parts = {
            name: parts._replace(part=parts.part * weight, whole=parts.whole * weight)
            for name, parts in measure(questions, sheet).items()
        }

    @property
    def name(self) -> str:
        """What the outputs call it."""
        return self.sheet.name


class PairFindings(NamedTuple):
    """Two participants on the same questions.

    Attributes:
        before: The name of the earlier.
        after: The name of the later.
        verdicts: (Q,) how the later answer stands to the earlier; ``None`` where either was not asked.
        differences: By metric, later minus earlier.
        p_corrected: By metric, the p-value corrected for the number of pairs (Holm).
    """

    before: str
    after: str
    verdicts: tuple[Verdict | None, ...]
    differences: dict[str, Difference]
    p_corrected: dict[str, float]

    def which(self, *kinds: Verdict) -> list[int]:
        """The questions with one of these verdicts."""
        return [i for i, verdict in enumerate(self.verdicts) if verdict in kinds]


class TagFindings(NamedTuple):
    """The questions of one tag: how many, and the scores on them by participant and metric."""

    num_questions: int
    scores: dict[str, dict[str, Estimate]]


class Limit(NamedTuple):
    """A limit that was asked for, and whether it is kept."""

    name: str
    found: float
    allowed: float
    passed: bool
    text: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a comparison found.

    Attributes:
        questions: Q questions.
        participants: Who answered them: the base first, then in the order they were given.
        baseline: The name of whom the candidate is held against.
        candidate: The name of whom limits and failures are about.
        scores: By participant and metric; metrics that apply to no question are left out.
        tags: By tag.
        pairs: Every two participants, the earlier in the order first.
        settings: How the answers were made.
        notes: What a reader must know.
        limits: Those that were asked for.
    """

    questions: list[Question]
    participants: list[Participant]
    baseline: str
    candidate: str
    scores: dict[str, dict[str, Estimate]]
    tags: dict[str, TagFindings]
    pairs: list[PairFindings]
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    limits: list[Limit] = field(default_factory=list)

    @property
    def metrics(self) -> list[str]:
        """The metrics that apply to these questions."""
        return list(self.scores[self.candidate])

    @property
    def missed(self) -> list[Limit]:
        """The limits that are not kept."""
        return [limit for limit in self.limits if not limit.passed]

    def participant(self, name: str) -> Participant:
        """Return the participant of a name."""
        return next(participant for participant in self.participants if participant.name == name)

    def pair(self, before: str, after: str) -> PairFindings | None:
        """Return what is known of two participants; ``None`` where they are the same or in the other order."""
        return next((pair for pair in self.pairs if (pair.before, pair.after) == (before, after)), None)

    def judged_pairs(self) -> list[PairFindings]:
        """The pairs that the candidate is judged by: after the baseline, and after the earlier comparison's."""
        judges = [self.baseline, *(other.name for other in self.participants if other.kind == "previous")]
        found = [self.pair(name, self.candidate) for name in dict.fromkeys(judges)]
        return [pair for pair in found if pair is not None]

    def with_limits(self, limits: list[Limit]) -> Comparison:
        """Return the same with limits."""
        return replace(self, limits=limits)


def compare_participants(
    questions: list[Question],
    participants: list[Participant],
    *,
    baseline: str,
    candidate: str,
    settings: dict[str, Any] | None = None,
    notes: list[str] | None = None,
) -> Comparison:
    """Work out scores, tags and pairs.

    Args:
        questions: Q questions.
        participants: Who answered them, the earlier first; the baseline is put before all others.
        baseline: The name of whom the candidate is held against.
        candidate: The name of whom limits and failures are about.
        settings: How the answers were made.
        notes: What a reader must know.
    """
    ordered = sorted(participants, key=lambda participant: participant.name != baseline)
    everything = np.ones(len(questions), dtype=bool)
    tags = {tag: np.array([tag in question.tags for question in questions]) for tag in _tags(questions)}
    applying = [name for name in METRICS if any(p.parts[name].applies.any() for p in ordered)]
    return Comparison(
        questions,
        participants,
        baseline,
        candidate,
        {p.name: _scores(p, everything, applying) for p in participants},
        {
            tag: TagFindings(int(kept.sum()), {p.name: _scores(p, kept, applying) for p in participants})
            for tag, kept in tags.items()
        },
        _pairs(ordered, applying),
        settings or {},
        notes or [],
    )


def _tags(questions: Sequence[Question]) -> list[str]:
    return sorted({tag for question in questions for tag in question.tags})


def _scores(participant: Participant, kept: np.typing.NDArray[np.bool_], metrics: list[str]) -> dict[str, Estimate]:
    return {name: estimate(participant.parts[name].only(kept)) for name in metrics}


def _pairs(participants: list[Participant], metrics: list[str]) -> list[PairFindings]:
    pairs = list(itertools.combinations(participants, 2))
    found = [{name: difference(a.parts[name], b.parts[name]) for name in metrics} for a, b in pairs]
    corrected = {name: holm([differences[name].p_value for differences in found]) for name in metrics}
    return [
        PairFindings(
            before.name,
            after.name,
            tuple(
                verdict if was_asked and is_asked else None
                for verdict, was_asked, is_asked in zip(
                    judge(before.sheet, after.sheet), before.asked, after.asked, strict=True
                )
            ),
            found[i],
            {name: corrected[name][i] for name in metrics},
        )
        for i, (before, after) in enumerate(pairs)
    ]
