"""A run's curves as lines of blocks in the terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TextIO

from lightning_qlora.tools.html.text import visible
from lightning_qlora.tools.inspection.terminal import write
from lightning_qlora.tools.plotting.panels import Line, Panel, format_value
from lightning_qlora.tools.plotting.reading import Run, Series

__all__ = ["print_panels", "sparkline"]

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 32


def print_panels(runs: Sequence[Run], panels: Sequence[Panel], stream: TextIO | None = None) -> None:
    """Print one line a curve: its shape, first and last value, and the best one with its step."""
    rows = [["", "", "first", "last", "lowest", "highest", "best"]]
    for panel in panels:
        rows += [_row(panel, line, runs) for line in panel.lines]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for run in runs:
        steps = max((s.steps[-1] for s in run.series.values() if s.steps), default=0)
        resumed = f", resumed at {', '.join(f'{step:,}' for step in run.resumed)}" if run.resumed else ""
        lines.append(f"{visible(run.name)}: {steps:,} steps{resumed}, from {visible(str(run.files[-1]))}")
    lines.append("")
    for row in rows:
        cells = [row[0].ljust(widths[0]), row[1].ljust(widths[1]), *map(str.rjust, row[2:6], widths[2:6]), row[6]]
        lines.append("  ".join(cells).rstrip())
    write("\n".join(lines), stream or sys.stdout)


def _row(panel: Panel, line: Line, runs: Sequence[Run]) -> list[str]:
    name = visible(line.metric)
    if len(runs) > 1:
        name = f"{name} [{visible(runs[line.run].name)}]"
    values = line.series.values
    note = f"{line.series.num_nonfinite} not finite" if line.series.num_nonfinite else ""
    if not values:
        return [name, "", "", "", "", "", note]
    best = ""
    if panel.best is not None and len(values) > 1:
        chosen = (min if panel.best == "lowest" else max)(range(len(values)), key=values.__getitem__)
        best = f"{format_value(values[chosen])} at step {line.series.steps[chosen]:,}"
    figures = (values[0], values[-1], min(values), max(values))
    return [name, sparkline(line.series), *map(format_value, figures), ", ".join(filter(None, (best, note)))]


def sparkline(series: Series, width: int = _WIDTH) -> str:
    """Draw a curve in one line; each block is the mean of its share of the steps, blank where nothing was logged.

    A single value has no shape.
    """
    if len(series.values) < 2:
        return ""
    first, last = series.steps[0], series.steps[-1]
    cells: list[list[float]] = [[] for _ in range(min(width, last - first + 1, len(series.values)))]
    for step, value in zip(series.steps, series.values, strict=True):
        cells[min(len(cells) - 1, (step - first) * len(cells) // max(1, last - first + 1))].append(value)
    means = [math.fsum(cell) / len(cell) if cell else None for cell in cells]
    known = [mean for mean in means if mean is not None]
    low, span = min(known), max(known) - min(known)
    return "".join(" " if mean is None else _BLOCKS[_height(mean - low, span)] for mean in means)


def _height(above: float, span: float) -> int:
    return len(_BLOCKS) // 2 if span == 0 else min(len(_BLOCKS) - 1, int(above / span * len(_BLOCKS)))
