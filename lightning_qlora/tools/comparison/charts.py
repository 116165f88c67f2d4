"""Scores with their intervals, and differences, as SVG that a page carries inside itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

__all__ = ["Interval", "draw_intervals"]

_WIDTH, _ROW, _TOP, _BOTTOM, _RIGHT = 520, 26, 8, 30, 22
_LETTER, _LONGEST_LABEL = 6.6, 210.0


class Interval(NamedTuple):
    """One row of a chart: a value between the ends of its interval, and what to say when it is pointed at."""

    label: str
    value: float
    low: float
    high: float
    text: str
    series: int = 0


def draw_intervals(rows: Sequence[Interval], title: str, *, bounds: tuple[float, float], zero: bool = False) -> Markup:
    """Draw each row as a dot with whiskers; the text says the same to a pointer and to a screen reader.

    Args:
        rows: From top to bottom. Their series decide the colour.
        title: What is shown.
        bounds: Of the axis; widened to hold every interval.
        zero: Whether to mark zero, of differences.
    """
    labels = [_shorten(row.label) for row in rows]
    left = min(_LONGEST_LABEL, max((len(label) for label in labels), default=0) * _LETTER) + 14
    low = min([bounds[0], *(row.low for row in rows)])
    high = max([bounds[1], *(row.high for row in rows)])
    height = _TOP + _ROW * len(rows) + _BOTTOM
    base = height - _BOTTOM

    def x(value: float) -> float:
        return left + (_WIDTH - _RIGHT - left) * (value - low) / (high - low)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    for value in _ticks(low, high):
        parts.append(f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{_TOP}" y2="{base}"/>')
        parts.append(f'<text x="{x(value):.1f}" y="{base + 18}" text-anchor="middle">{value:g}</text>')
    if zero:
        parts.append(f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{_TOP}" y2="{base}"/>')
    for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
        y = _TOP + _ROW * (index + 0.5)
        parts.append(f'<g class="series{row.series % 6}"><title>{escape(f"{row.label}: {row.text}")}</title>')
        parts.append(f'<rect class="target" x="0" y="{y - _ROW / 2:.1f}" width="{_WIDTH}" height="{_ROW}"/>')
        parts.append(f'<text x="{left - 12:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<line class="whisker" x1="{x(row.low):.1f}" x2="{x(row.high):.1f}" y1="{y}" y2="{y}"/>')
        for end in (row.low, row.high):
            parts.append(f'<line class="whisker" x1="{x(end):.1f}" x2="{x(end):.1f}" y1="{y - 4}" y2="{y + 4}"/>')
        parts.append(f'<circle cx="{x(row.value):.1f}" cy="{y}" r="5"/></g>')
    parts.append("</svg>")
    return Markup("".join(parts))  # built of numbers and escaped text only


def _shorten(label: str) -> str:
    limit = int(_LONGEST_LABEL / _LETTER)
    return label if len(label) <= limit else label[: limit - 1] + "…"


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers between two."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(step * n, 10) for n in range(first, math.floor(high / step + 1e-9) + 1)]
