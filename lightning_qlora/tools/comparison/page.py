"""A comparison as one HTML page: scores, plots, and every answer beside the others."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, get_args

from lightning_qlora.evaluation import METRICS, Estimate, Question, Verdict
from lightning_qlora.tools.comparison.charts import Group, Interval, draw_intervals
from lightning_qlora.tools.comparison.findings import Comparison, Participant
from lightning_qlora.tools.comparison.limits import SIGNIFICANCE
from lightning_qlora.tools.comparison.marking import Piece, mark_differences
from lightning_qlora.tools.comparison.terminal import describe_difference, describe_estimate, number
from lightning_qlora.tools.html import render_document, visible

__all__ = ["render_page"]

_SURE, _UNSURE = 1, 5  # colours of the style: blue, light grey


def render_page(comparison: Comparison) -> str:
    """Return the page as text.

    Args:
        comparison: What was found. Questions and answers come from anywhere, so all of it counts as hostile.
    """
    return render_document(
        "Comparison of answers",
        __package__,
        {"visible": visible},
        found=comparison,
        metrics={name: METRICS[name].title for name in comparison.metrics},
        describe=describe_estimate,
        describe_difference=describe_difference,
        significance=SIGNIFICANCE,
        charts=_score_charts(comparison),
        tag_chart=_tag_chart(comparison),
        pairs=[_pair(comparison, index) for index in range(len(comparison.pairs))],
        questions=[_question(comparison, index) for index in range(len(comparison.questions))],
        settings=_settings(comparison),
    )


def _score_charts(comparison: Comparison) -> list[tuple[str, Any]]:
    """Draw all rates into one chart, and perplexity, which has another axis, into its own."""
    shares = [name for name in comparison.metrics if not METRICS[name].is_perplexity]
    groups = [Group(METRICS[name].title, _intervals(comparison.scores, name)) for name in shares]
    charts = [("Scores, in per cent", draw_intervals(groups, "Scores", bounds=(0, 100)))]
    if "perplexity" in comparison.metrics:
        title = "Perplexity of the references: lower is better"
        groups = [Group("perplexity", _intervals(comparison.scores, "perplexity"))]
        charts.append((title, draw_intervals(groups, title, bounds=(1, 1.1))))
    return charts


def _tag_chart(comparison: Comparison) -> Any:
    """Draw the rate of right answers by tag; ``None`` where there are no tags or no checks."""
    if "exact" not in comparison.metrics:
        return None
    groups = [Group(tag, _intervals(tagged.scores, "exact")) for tag, tagged in comparison.tags.items()]
    groups = [group for group in groups if group.intervals]
    return draw_intervals(groups, "Exactly right answers by tag", bounds=(0, 100)) if groups else None


def _intervals(scores: Mapping[str, Mapping[str, Estimate]], metric: str) -> list[Interval]:
    """One interval for each participant, in per cent where the score is a share."""
    scale = 1 if METRICS[metric].is_perplexity else 100
    return [
        Interval(
            scale * found.value,
            scale * found.low,
            scale * found.high,
            f"{name} {describe_estimate(metric, found)}",
            series,
        )
        for series, (name, by_metric) in enumerate(scores.items())
        if (found := by_metric[metric]).num_questions
    ]


def _pair(comparison: Comparison, index: int) -> dict[str, Any]:
    pair = comparison.pairs[index]
    groups = []
    for name, found in pair.differences.items():
        if found.num_questions and not METRICS[name].is_perplexity:
            p_value = pair.p_corrected[name]
            text = ", ".join(describe_difference(name, found, p_value))
            series = _SURE if p_value < SIGNIFICANCE else _UNSURE
            interval = Interval(100 * found.value, 100 * found.low, 100 * found.high, text, series)
            groups.append(Group(METRICS[name].title, [interval]))
    chart = draw_intervals(groups, f"{pair.after} against {pair.before}", bounds=(-10, 10), zero=True)
    counts = Counter(verdict for verdict in pair.verdicts if verdict is not None)
    return {
        "found": pair,
        "chart": chart,
        "counts": [(kind, counts[kind]) for kind in get_args(Verdict) if counts[kind]],
    }


def _question(comparison: Comparison, index: int) -> dict[str, Any]:
    question = comparison.questions[index]
    verdicts = {f"{visible(pair.before)}\n{visible(pair.after)}": pair.verdicts[index] for pair in comparison.pairs}
    return {
        "question": question,
        "expect": None if question.expect is None else json.dumps(question.expect, ensure_ascii=False, indent=1),
        "verdicts": json.dumps(verdicts),
        "tags": json.dumps([visible(tag) for tag in question.tags]),
        "answers": [_answer(comparison, question, participant, index) for participant in comparison.participants],
        "failed": json.dumps(
            [visible(p.name) for p in comparison.participants if p.sheet.scores[index].exact is False]
        ),
    }


def _answer(comparison: Comparison, question: Question, participant: Participant, index: int) -> dict[str, Any]:
    sheet = participant.sheet
    text, loss = sheet.answers[index].text, sheet.reference_losses[index]
    wanted = question.reference
    if wanted is None and participant.name != comparison.baseline:
        wanted = comparison.participant(comparison.baseline).sheet.answers[index].text
    return {
        "name": participant.name,
        "asked": participant.asked[index],
        "answer": sheet.answers[index],
        "score": sheet.scores[index],
        "pieces": [Piece("same", text)] if wanted is None else mark_differences(text, wanted),
        "perplexity": None if loss is None else number(math.exp(min(loss.nll_sum / loss.num_tokens, 700.0))),
    }


def _settings(comparison: Comparison) -> list[tuple[str, str]]:
    rows = [(f"{p.name} ({p.kind})", p.path) for p in comparison.participants]
    return rows + [
        (name, value if isinstance(value, str) else repr(value)) for name, value in comparison.settings.items()
    ]
