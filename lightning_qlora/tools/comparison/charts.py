"""Scores with their intervals, and differences, as SVG that a page carries inside itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

from lightning_qlora.tools.html import round_ticks, visible

__all__ = ["Group", "Interval", "draw_intervals"]

_WIDTH, _ROW, _GAP, _TOP, _BOTTOM, _RIGHT = 520, 15, 9, 6, 26, 20
_LETTER, _LONGEST_LABEL = 7.2, 200.0


class Interval(NamedTuple):
    """A value between the ends of its interval, what to say when it is pointed at, and the number of its colour."""

    value: float
    low: float
    high: float
    text: str
    series: int = 0


class Group(NamedTuple):
    """What stands behind one label: an interval for each participant."""

    label: str
    intervals: list[Interval]


def draw_intervals(groups: Sequence[Group], title: str, *, bounds: tuple[float, float], zero: bool = False) -> Markup:
    """Draw each interval as a dot with whiskers; a text says the same to a pointer and to a screen reader.

    Args:
        groups: From top to bottom.
        title: What is shown.
        bounds: Of the axis; widened to hold every interval.
        zero: Whether to mark zero, of differences.
    """
    labels = [_shorten(visible(group.label)) for group in groups]
    left = max((len(label) for label in labels), default=0) * _LETTER + 18
    intervals = [interval for group in groups for interval in group.intervals]
    low, high = min([bounds[0], *(i.low for i in intervals)]), max([bounds[1], *(i.high for i in intervals)])
    base = _TOP + sum(_ROW * len(group.intervals) + _GAP for group in groups)

    def x(value: float) -> float:
        return left + (_WIDTH - _RIGHT - left) * (value - low) / (high - low)

    height = base + _BOTTOM
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(visible(title))}">']
    for value in round_ticks(low, high):
        parts.append(f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{_TOP}" y2="{base}"/>')
        parts.append(f'<text x="{x(value):.1f}" y="{base + 18}" text-anchor="middle">{value:g}</text>')
    if zero:
        parts.append(f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{_TOP}" y2="{base}"/>')
    top = _TOP + _GAP / 2
    for group, label in zip(groups, labels, strict=True):
        middle = top + _ROW * len(group.intervals) / 2
        parts.append(f'<text x="{left - 12:.1f}" y="{middle + 4:.1f}" text-anchor="end">{escape(label)}</text>')
        for interval in group.intervals:
            ends = (x(interval.low), x(interval.value), x(interval.high))
            parts.append(_draw(interval, ends, top + _ROW / 2, group.label))
            top += _ROW
        top += _GAP
    return Markup("".join([*parts, "</svg>"]))  # built of numbers and escaped text only


def _draw(interval: Interval, ends: tuple[float, float, float], y: float, label: str) -> str:
    low, value, high = ends
    parts = [f'<g class="series{interval.series % 6}"><title>{escape(visible(f"{label}: {interval.text}"))}</title>']
    parts.append(f'<rect class="target" x="0" y="{y - _ROW / 2:.1f}" width="{_WIDTH}" height="{_ROW}"/>')
    parts.append(f'<path class="whisker" d="M{low:.1f} {y - 4}v8m0 -4H{high:.1f}m0 -4v8"/>')
    parts.append(f'<circle cx="{value:.1f}" cy="{y}" r="4.5"/></g>')
    return "".join(parts)


def _shorten(label: str) -> str:
    limit = int(_LONGEST_LABEL / _LETTER)
    return label if len(label) <= limit else label[: limit - 1] + "…"
