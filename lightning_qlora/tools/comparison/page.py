"""A comparison as one HTML page: scores, plots, and every answer beside the others."""

from __future__ import annotations

import json
import math
from typing import Any

from lightning_qlora.evaluation import METRICS, Question
from lightning_qlora.tools.comparison.charts import Interval, draw_intervals
from lightning_qlora.tools.comparison.findings import Comparison, Participant
from lightning_qlora.tools.comparison.limits import SIGNIFICANCE
from lightning_qlora.tools.comparison.marking import Piece, mark_differences
from lightning_qlora.tools.comparison.terminal import describe_difference, describe_estimate, number
from lightning_qlora.tools.html import render_document
from lightning_qlora.tools.inspection.samples import visible

__all__ = ["render_page"]


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
    """Draw all rates into one chart for each participant's colour, and perplexity, which has another axis, alone."""
    shares = [name for name in comparison.metrics if not METRICS[name].is_perplexity]
    charts = [("Scores, in per cent", draw_intervals(_share_rows(comparison, shares), "Scores", bounds=(0, 100)))]
    if "perplexity" in comparison.metrics:
        rows = [
            Interval(name, found.value, found.low, found.high, describe_estimate("perplexity", found), series)
            for series, (name, scores) in enumerate(comparison.scores.items())
            if (found := scores["perplexity"]).num_questions
        ]
        title = "Perplexity of the references, lower is better"
        charts.append((title, draw_intervals(rows, title, bounds=(1, 1.1))))
    return charts


def _share_rows(comparison: Comparison, metrics: list[str]) -> list[Interval]:
    rows = []
    for metric in metrics:
        for series, (name, scores) in enumerate(comparison.scores.items()):
            found = scores[metric]
            if found.num_questions:
                values = (100 * found.value, 100 * found.low, 100 * found.high)
                label = f"{METRICS[metric].title}: {name}" if len(comparison.scores) > 1 else METRICS[metric].title
                rows.append(Interval(label, *values, describe_estimate(metric, found), series))
    return rows


def _tag_chart(comparison: Comparison) -> Any:
    """Draw the rate of right answers by tag; ``None`` where there are no tags or no checks."""
    rows = []
    for tag, tagged in comparison.tags.items():
        for series, (name, scores) in enumerate(tagged.scores.items()):
            found = scores.get("exact")
            if found is not None and found.num_questions:
                values = (100 * found.value, 100 * found.low, 100 * found.high)
                rows.append(Interval(f"{tag}: {name}", *values, describe_estimate("exact", found), series))
    return draw_intervals(rows, "Exactly right answers by tag", bounds=(0, 100)) if rows else None


def _pair(comparison: Comparison, index: int) -> dict[str, Any]:
    pair = comparison.pairs[index]
    rows = [
        Interval(
            METRICS[name].title,
            100 * found.value,
            100 * found.low,
            100 * found.high,
            describe_difference(name, found, pair.p_corrected[name]),
            0 if pair.p_corrected[name] < SIGNIFICANCE else 5,
        )
        for name, found in pair.differences.items()
        if found.num_questions and not METRICS[name].is_perplexity
    ]
    counts: dict[str, int] = {}
    for verdict in pair.verdicts:
        if verdict is not None:
            counts[verdict] = counts.get(verdict, 0) + 1
    chart = draw_intervals(rows, f"{pair.after} against {pair.before}", bounds=(-10, 10), zero=True)
    return {"found": pair, "chart": chart, "counts": counts}


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
