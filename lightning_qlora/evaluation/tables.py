"""Answers and scores as text for a terminal: with rich where it is installed, plain otherwise."""

from __future__ import annotations

import html
import importlib.util
import io
import math
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from typing import get_args

from lightning_qlora.evaluation.questions import Question
from lightning_qlora.evaluation.scores import AnswerSheet, AnswerSummary, Verdict

__all__ = [
    "answer_rows",
    "draw_table",
    "markdown_table",
    "pick_rows",
    "printable",
    "score_rows",
    "score_table",
    "side_by_side",
    "verdict_line",
]

_STYLES: dict[Verdict, str] = {
    "fixed": "green",
    "better": "cyan",
    "right": "green",
    "wrong": "yellow",
    "worse": "magenta",
    "broken": "bold red",
    "same": "",
    "changed": "cyan",
}
_MEANINGS: dict[Verdict, str] = {
    "fixed": "fixed",
    "better": "better though not right",
    "right": "right both times",
    "wrong": "as wrong as before",
    "worse": "worse",
    "broken": "right before and wrong now",
    "same": "unchanged",
    "changed": "changed",
}


def score_rows(summaries: Sequence[AnswerSummary]) -> list[tuple[str, ...]]:
    """Lay out summaries as the rows of a table: a title, then one cell per summary. Empty rows are left out."""
    rows = [
        ("valid answers", *(_count(s.num_valid, s.num_checked) for s in summaries)),
        ("exactly right answers", *(_count(s.num_exact, s.num_checked) for s in summaries)),
        ("right fields", *(_count(s.fields_right, s.num_fields) for s in summaries)),
        ("answers ended by themselves", *(_count(s.num_stopped, s.num_questions) for s in summaries)),
        ("perplexity of the references", *(_number(s.perplexity) for s in summaries)),
        ("chrF against the references", *(_number(s.chrf) for s in summaries)),
    ]
    return [row for row in rows if any(row[1:])]


def score_table(names: Sequence[str], summaries: Sequence[AnswerSummary], *, color: bool = False) -> str:
    """Draw the scores of sheets beside one another."""
    title = f"Scores on {summaries[0].num_questions} questions"
    return draw_table(title, ("", *names), score_rows(summaries), color=color)


def draw_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, color: bool = False) -> str:
    """Draw a table of short cells.

    Args:
        title: Stands above it, where rich is installed.
        columns: The heads of the columns.
        rows: The cells, row by row.
        color: Whether the terminal is coloured.
    """
    if importlib.util.find_spec("rich") is not None:
        from rich.table import Column, Table
        from rich.text import Text

        table = Table(*(Column(Text(column)) for column in columns), title=Text(title))
        for row in rows:
            table.add_row(*map(Text, row))
        return _render(table, color)
    cells = [columns, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def side_by_side(
    questions: Sequence[Question],
    before: AnswerSheet,
    after: AnswerSheet,
    verdicts: Sequence[Verdict],
    *,
    max_characters: int = 300,
    color: bool = False,
) -> str:
    """Draw questions with their reference and two answers each; longer texts are cut."""
    columns, rows = answer_rows(questions, before, after, verdicts, max_characters=max_characters)
    if importlib.util.find_spec("rich") is not None:
        return _rich_side_by_side(columns, rows, color)
    width = max(map(len, columns))
    blocks = ("\n".join(f"{c.ljust(width)}  {cell}" for c, cell in zip(columns, row, strict=True)) for row in rows)
    return "\n\n".join(blocks)


def answer_rows(
    questions: Sequence[Question],
    before: AnswerSheet,
    after: AnswerSheet,
    verdicts: Sequence[Verdict],
    *,
    max_characters: int = 300,
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Lay out questions, references, two answers each and the verdicts: the columns' heads, and the rows."""
    rows: list[tuple[str, ...]] = []
    for question, first, second, verdict in zip(questions, before.answers, after.answers, verdicts, strict=True):
        texts = (question.messages[-1].content, question.reference or "", first.text, second.text)
        rows.append((*(_shorten(text, max_characters) for text in texts), verdict))
    return ("question", "reference", before.name, after.name, "verdict"), rows


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown; its cells are text, whatever HTML or Markdown they spell."""
    lines = [columns, ["---"] * len(columns), *([_as_markdown(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _as_markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]()#+.!|~-])", r"\\\1", html.escape(text, quote=False))


def _rich_side_by_side(columns: Sequence[str], rows: Sequence[tuple[str, ...]], color: bool) -> str:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True, expand=True)
    for column in columns[:-1]:
        table.add_column(column, ratio=1, overflow="fold")
    table.add_column(columns[-1], no_wrap=True)
    for *texts, verdict in rows:
        table.add_row(*map(Text, texts), Text(verdict, style=_STYLES[verdict]))  # type: ignore[index]
    return _render(table, color)


def verdict_line(verdicts: Sequence[Verdict]) -> str:
    """Count the verdicts in one line; regressions are always named, also when there are none."""
    counts = Counter(verdicts)
    kinds = get_args(Verdict)
    shown = [kind for kind in kinds if counts[kind] or (kind == "broken" and counts.keys() - {"same", "changed"})]
    return ", ".join(f"{counts[kind]} {_MEANINGS[kind]}" for kind in shown)


def pick_rows(verdicts: Sequence[Verdict], limit: int) -> list[int]:
    """Choose which questions to show: every kind of verdict in turn, each kind spread evenly over the questions."""
    groups = [[i for i, v in enumerate(verdicts) if v == kind] for kind in get_args(Verdict)]
    shares = [0] * len(groups)
    for _ in range(min(limit, len(verdicts))):
        open_groups = [g for g, group in enumerate(groups) if shares[g] < len(group)]
        shares[min(open_groups, key=lambda g: shares[g])] += 1
    return sorted(
        group[n * len(group) // share] for group, share in zip(groups, shares, strict=True) for n in range(share)
    )


def _render(table: object, color: bool) -> str:
    from rich.console import Console

    width = max(80, shutil.get_terminal_size((120, 24)).columns)
    buffer = io.StringIO()
    Console(file=buffer, width=width, force_terminal=color, no_color=not color, legacy_windows=False).print(table)
    return buffer.getvalue().rstrip("\n")


def printable(text: str) -> str:
    """Replace the control characters of a text, which could move the cursor or rewrite what the terminal shows."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _shorten(text: str, limit: int) -> str:
    text = printable(" ".join(text.split()))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _count(part: int, whole: int) -> str:
    return f"{part}/{whole} ({100 * part / whole:.1f} %)" if whole else ""


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}" if value < 1000 else f"{value:.3g}"
