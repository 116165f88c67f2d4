"""Limits on what a comparison may find, so that a pipeline stops before a worse model ships."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lightning_qlora.evaluation import METRICS, Question
from lightning_qlora.tools.comparison.findings import Comparison, Limit, PairFindings

__all__ = ["SIGNIFICANCE", "Limits", "describe_missed", "judge_limits"]

SIGNIFICANCE = 0.05
"""The corrected p-value below which a difference counts."""

_CHECKED = ("exact", "valid", "fields")


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits asked for, all about the candidate; ``None`` for no limit.

    Attributes:
        at_least: Least value by metric, from 0 to 1.
        exact_of: Least rate of exactly right answers by tag.
        max_perplexity: Largest perplexity of the references.
        max_broken: Questions that the baseline (or the earlier comparison's candidate) got right and it gets wrong.
        fail_on_regression: Whether it may not be significantly worse than either of them.

    Raises:
        ValueError: If a limit is out of its range.
    """

    at_least: Mapping[str, float | None] = field(default_factory=dict)
    exact_of: Mapping[str, float] = field(default_factory=dict)
    max_perplexity: float | None = None
    max_broken: int | None = None
    fail_on_regression: bool = False

    def __post_init__(self) -> None:
        rates = {f"min_{name}": value for name, value in self.at_least.items()}
        rates |= {f"min_exact_of.{tag}": value for tag, value in self.exact_of.items()}
        for name, value in rates.items():
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; write a number from 0 to 1.")
        for name, value, least in (("max_perplexity", self.max_perplexity, 1), ("max_broken", self.max_broken, 0)):
            if value is not None and not least <= value < math.inf:
                raise ValueError(f"{name} is {value}; write a number from {least}.")

    def check(self, questions: list[Question]) -> None:
        """Refuse limits that these questions can say nothing about, before any is answered.

        Raises:
            ValueError: Names the limit.
        """
        checked = any(question.check is not None for question in questions)
        with_reference = any(question.reference is not None for question in questions)
        for name, value in {**self.at_least, "perplexity": self.max_perplexity}.items():
            found, needed = (checked, "check") if name in _CHECKED else (with_reference, "reference")
            if value is not None and not found:
                raise ValueError(f"No question has a {needed}, so that there is no {METRICS[name].title!r} to limit.")
        if not checked and (self.max_broken is not None or self.exact_of):
            raise ValueError("No question has a check, so that none is right or wrong, and there is nothing to limit.")
        for tag in self.exact_of:
            if not any(tag in question.tags and question.check is not None for question in questions):
                tags = sorted({tag for question in questions for tag in question.tags})
                raise ValueError(f"min_exact_of names {tag!r}, which no checked question has. Tags are: {tags}.")


def judge_limits(comparison: Comparison, limits: Limits) -> list[Limit]:
    """Hold each limit against the candidate."""
    found = comparison.scores[comparison.candidate]
    judged = [
        _at_least(f"min_{name}", METRICS[name].title, found[name].value, value)
        for name, value in limits.at_least.items()
        if value is not None
    ]
    judged += [
        _at_least(
            f"min_exact_of.{tag}",
            f"exactly right answers of {tag!r}",
            comparison.tags[tag].scores[comparison.candidate]["exact"].value,
            value,
        )
        for tag, value in limits.exact_of.items()
    ]
    if limits.max_perplexity is not None:
        value = found["perplexity"].value
        text = f"perplexity of references {value:.4g}, allowed at most {limits.max_perplexity:.4g} (max_perplexity)"
        judged.append(Limit("max_perplexity", value, limits.max_perplexity, value <= limits.max_perplexity, text))
    for pair in comparison.judged_pairs():
        judged += _regressions(comparison, pair, limits)
    return judged


def describe_missed(comparison: Comparison) -> str:
    """Return one message with every limit that is missed, what was found and what is allowed."""
    lines = [f"  {limit.text}" for limit in comparison.missed]
    noun = "limit is" if len(lines) == 1 else "limits are"
    return "\n".join([f"{len(lines)} {noun} not kept by {comparison.candidate}:", *lines])


def _at_least(name: str, title: str, found: float, allowed: float) -> Limit:
    text = f"{title} {100 * found:.4g} %, allowed at least {100 * allowed:.4g} % ({name})"
    return Limit(name, found, allowed, found >= allowed, text)


def _regressions(comparison: Comparison, pair: PairFindings, limits: Limits) -> Iterator[Limit]:
    if limits.max_broken is not None:
        broken = pair.which("broken")
        names = ", ".join(comparison.questions[i].id for i in broken[:10]) + (", ..." if len(broken) > 10 else "")
        text = f"right by {pair.before} and wrong now: {len(broken)}, allowed at most {limits.max_broken} (max_broken)"
        passed = len(broken) <= limits.max_broken
        yield Limit("max_broken", len(broken), limits.max_broken, passed, f"{text}{': ' * bool(names)}{names}")
    if not limits.fail_on_regression:
        return
    metrics = [name for name in _CHECKED if name in pair.differences and pair.differences[name].num_questions]
    for name in metrics or pair.differences:  # without checks, what the references say
        difference, p_value = pair.differences[name], pair.p_corrected[name]
        loss = -difference.value if not METRICS[name].is_perplexity else difference.value
        yield Limit(
            "fail_on_regression",
            difference.value,
            0.0,
            not (loss > 0 and p_value < SIGNIFICANCE),
            f"{METRICS[name].title} {difference.value:+.4g} against {pair.before} (p = {p_value:.2g}), "
            f"allowed no loss with p < {SIGNIFICANCE} (fail_on_regression)",
        )
