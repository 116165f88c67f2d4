"""A comparison as text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_qlora.evaluation import METRICS, AnswerSheet, Difference, Estimate
from lightning_qlora.evaluation.tables import draw_table, pick_rows, printable, side_by_side, verdict_line
from lightning_qlora.tools.comparison.findings import Comparison, PairFindings, Participant

__all__ = ["describe_difference", "describe_estimate", "draw_comparison", "number"]


def draw_comparison(comparison: Comparison, *, max_rows: int, color: bool = False) -> str:
    """Lay out everything but the whole answers.

    Args:
        comparison: What was found.
        max_rows: How many questions to show side by side.
        color: Whether the terminal is coloured.
    """
    names = [participant.name for participant in comparison.participants]
    parts = [*_answers(comparison, max_rows, color)]
    rows = [
        (METRICS[metric].title, *(describe_estimate(metric, comparison.scores[name][metric]) for name in names))
        for metric in comparison.metrics
    ]
    title = f"Scores on {len(comparison.questions)} questions, with 95 % intervals"
    parts.append(draw_table(title, ("", *names), rows, color=color))
    if comparison.tags and "exact" in comparison.metrics:
        rows = [
            (
                f"{tag} ({found.num_questions})",
                *(describe_estimate("exact", found.scores[name]["exact"]) for name in names),
            )
            for tag, found in comparison.tags.items()
        ]
        parts.append(draw_table("Exactly right answers by tag", ("tag", *names), rows, color=color))
    for pair in comparison.pairs:
        parts += ["", *_pair(pair)]
    for limit in comparison.limits:
        parts.append(f"{'ok    ' if limit.passed else 'MISSED'} {printable(limit.text)}")
    parts += [f"Note: {printable(note)}" for note in comparison.notes]
    return "\n".join(parts)


def _answers(comparison: Comparison, max_rows: int, color: bool) -> Iterator[str]:
    """Draw some questions with the answers of the baseline and the candidate."""
    pair = comparison.pair(comparison.baseline, comparison.candidate)
    if pair is None or not max_rows:
        return
    verdicts = [verdict for verdict in pair.verdicts if verdict is not None]
    asked = [i for i, verdict in enumerate(pair.verdicts) if verdict is not None]
    picked = pick_rows(verdicts, max_rows)
    rows = [asked[i] for i in picked]
    before, after = (_select(comparison.participant(name), rows) for name in (pair.before, pair.after))
    yield f"{len(rows)} of {len(comparison.questions)} questions"
    questions, shown = [comparison.questions[i] for i in rows], [verdicts[i] for i in picked]
    yield side_by_side(questions, before, after, shown, color=color)


def _select(participant: Participant, rows: list[int]) -> AnswerSheet:
    sheet = participant.sheet
    return AnswerSheet(
        sheet.name,
        tuple(sheet.answers[i] for i in rows),
        tuple(sheet.scores[i] for i in rows),
        tuple(sheet.reference_losses[i] for i in rows),
    )


def _pair(pair: PairFindings) -> Iterator[str]:
    yield f"{pair.after} against {pair.before}: {verdict_line([v for v in pair.verdicts if v is not None])}."
    for metric, found in pair.differences.items():
        if found.num_questions:
            described = ", ".join(describe_difference(metric, found, pair.p_corrected[metric]))
            yield f"  {METRICS[metric].title:26} {described}"


def describe_estimate(metric: str, found: Estimate) -> str:
    """Write a score with its interval: rates as counts and per cent."""
    if not found.num_questions:
        return ""
    if METRICS[metric].is_perplexity:
        return f"{number(found.value)} [{number(found.low)}, {number(found.high)}]"
    interval = f"[{100 * found.low:.1f}, {100 * found.high:.1f}]"
    if METRICS[metric].is_rate:
        count = round(found.value * found.num_questions)
        return f"{count}/{found.num_questions}, {100 * found.value:.1f} % {interval}"
    return f"{100 * found.value:.1f} % {interval}"


def describe_difference(metric: str, found: Difference, p_corrected: float) -> tuple[str, str, str]:
    """Write a difference with its interval, its p-value, and the test: rates in percentage points."""
    if METRICS[metric].is_perplexity:
        text = f"{found.value:+.3g} [{found.low:+.3g}, {found.high:+.3g}]"
    else:
        text = f"{100 * found.value:+.1f} points [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    p_value = "p < 0.001" if p_corrected < 0.001 else f"p = {p_corrected:.3f}"
    return text, p_value, found.test


def number(value: float) -> str:
    """Write a positive number in about four digits."""
    return "" if math.isnan(value) else f"{value:.3f}" if value < 1000 else f"{value:.3g}"
