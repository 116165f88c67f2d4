"""Runs side by side on one page that loads nothing."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from lightning_qlora.tools.html import render_document
from lightning_qlora.tools.html.text import visible
from lightning_qlora.tools.plotting.curves import draw_panel
from lightning_qlora.tools.plotting.panels import Panel, format_value
from lightning_qlora.tools.plotting.reading import Run, Series

__all__ = ["render_page"]

_MOST_QUESTIONS = 20


def render_page(runs: Sequence[Run], panels: Sequence[Panel]) -> str:
    """Return the page as text.

    Args:
        runs: What was read. Names, metrics and answers come from files, so all of it counts as hostile.
        panels: Their curves.
    """
    names = [run.name for run in runs]
    drawn = [panel for panel in panels if any(len(line.series.values) > 1 for line in panel.lines)]
    single = [panel for panel in panels if panel not in drawn]
    resumed = sorted({step for run in runs for step in run.resumed})
    return render_document(
        "Runs" if len(runs) > 1 else visible(names[0]),
        __package__,
        {"visible": visible},
        runs=runs,
        tiles=[_tiles(run) for run in runs],
        charts=[
            (panel.title, draw_panel(panel, names, resumed), _key(panel, names), _nonfinite(panel, names))
            for panel in drawn
        ],
        single=_single_values(single, len(runs)),
        resumed=resumed,
        answers=[(run, _answer_rows(run)) for run in runs if run.answers],
        most_questions=_MOST_QUESTIONS,
    )


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """Return the figures to see first: name, value, remark."""
    steps = max((s.steps[-1] for s in run.series.values() if s.steps), default=0)
    tiles = [("optimizer steps", f"{steps:,}", "until the last logged value")]
    loss, validation = _values(run, "train_loss"), _values(run, "val_loss")
    if loss:
        tail = loss.values[-max(1, len(loss.values) // 10) :]
        tiles.append(("training loss", format_value(statistics.fmean(tail)), "mean of the last tenth"))
    if validation:
        best = min(range(len(validation.values)), key=validation.values.__getitem__)
        text = f"best, at step {validation.steps[best]:,}"
        tiles.append(("validation loss", format_value(validation.values[best]), text))
    if right := _values(run, "answers_exact"):
        tiles.append(("right answers", f"{100 * right.values[-1]:.1f} %", "of the fixed questions, at the end"))
    if speed := _values(run, "tokens_per_second"):
        tiles.append(("tokens per second", format_value(statistics.median(speed.values)), "median"))
    if memory := _values(run, "peak_memory_gib"):
        tiles.append(("peak memory", f"{max(memory.values):.2f} GiB", "at its end"))
    return tiles


def _values(run: Run, name: str) -> Series | None:
    series = run.series.get(name)
    return series if series is not None and series.values else None


def _key(panel: Panel, names: Sequence[str]) -> list[tuple[int, str, str]]:
    """Name the curves of a panel: number of the run, style, metric."""
    if len(names) == len(panel.lines) == 1:
        return []  # the title says it
    several = len(names) > 1
    return [
        (line.run % 6, line.style, f"{line.metric} of {names[line.run]}" if several else line.metric)
        for line in panel.lines
    ]


def _single_values(panels: Sequence[Panel], num_runs: int) -> list[tuple[str, list[str]]]:
    """Return what was logged once, by metric: a value for each run."""
    rows: dict[str, list[str]] = {}
    for panel in panels:
        for line in panel.lines:
            values = line.series.values
            row = rows.setdefault(line.metric, [""] * num_runs)
            row[line.run] = f"{format_value(values[0])} at step {line.series.steps[0]:,}" if values else "not finite"
    return list(rows.items())


def _nonfinite(panel: Panel, names: Sequence[str]) -> list[str]:
    return [
        f"{line.metric} of {names[line.run]}: {line.series.num_nonfinite} values are NaN or infinite"
        for line in panel.lines
        if line.series.num_nonfinite
    ]


def _answer_rows(run: Run) -> list[dict[str, Any]]:
    """Follow each question through the steps: what the base said, then what the adapters said when."""
    rows: dict[str, dict[str, Any]] = {}
    for answers in run.answers:
        for number, row in enumerate(answers.rows):
            found = rows.setdefault(
                str(row.get("id", number)),
                {"question": _question(row), "reference": row.get("reference"), "answers": []},
            )
            before, after = row.get("before"), row.get("after")
            if not found["answers"] and isinstance(before, dict):
                found["answers"].append(("base", str(before.get("answer", ""))))
            if isinstance(after, dict):
                found["answers"].append((f"step {answers.step:,}", str(after.get("answer", ""))))
    return list(rows.values())[:_MOST_QUESTIONS]


def _question(row: dict[str, Any]) -> str:
    messages = row.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        return str(messages[-1].get("content", ""))
    return str(row.get("prompt", ""))
