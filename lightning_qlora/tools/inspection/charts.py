"""Histograms as SVG that a page carries inside itself; colours are the page's, so they follow light and dark."""

from __future__ import annotations

from markupsafe import Markup, escape

from lightning_qlora.tools.inspection.figures import Histogram

__all__ = ["draw_histogram"]

_WIDTH, _HEIGHT = 480, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 26, 34
_MOST_TICKS = 7


def draw_histogram(histogram: Histogram, title: str, rows: str = "rows") -> Markup:
    """Draw a histogram; each bar says what it counts when pointed at, and to a screen reader.

    Args:
        histogram: What to draw. Its mark, if any, becomes a vertical line.
        title: What it shows.
        rows: What is counted.
    """
    counts = histogram.counts
    top = _round_up(max(max(counts), 1))
    inner_width, inner_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    last = histogram.bounds[-1]
    first = histogram.bounds[0] - histogram.width
    mark = histogram.mark
    span = (max(last, mark) if mark is not None and mark <= 2 * last else last) - first

    def x(value: float) -> float:
        return _LEFT + inner_width * (value - first) / span

    def y(count: float) -> float:
        return _TOP + inner_height * (1 - count / top)

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
        *(_level(count, y(count)) for count in (0, top / 2, top)),
    ]
    for index, (bound, count) in enumerate(zip(histogram.bounds, counts, strict=True)):
        if count:
            left, width = x(bound - histogram.width), x(bound) - x(bound - histogram.width)
            label = escape(f"{histogram.label(index)}: {count:,} {rows}")
            size = f'width="{max(width - 1, 1):.2f}" height="{y(0) - y(count):.2f}"'
            parts.append(f'<rect class="bar" x="{left:.2f}" y="{y(count):.2f}" {size}><title>{label}</title></rect>')
    ticks = [first, *histogram.bounds]
    every = 1
    while len(ticks) > every * _MOST_TICKS:
        every *= 2
    for value in ticks[::every]:
        parts.append(f'<text x="{x(value):.2f}" y="{_HEIGHT - 16}" text-anchor="middle">{value:,}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 2}" text-anchor="end">{escape(histogram.unit)}</text>')
    if mark is not None:
        parts.append(_mark(mark, x(min(mark, first + span)), beyond=mark > first + span))
    parts.append("</svg>")
    return Markup("".join(parts))  # built of numbers and escaped text only


def _level(count: float, y: float) -> str:
    line = f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.2f}" y2="{y:.2f}"/>'
    return f'{line}<text x="{_LEFT - 6}" y="{y + 4:.2f}" text-anchor="end">{count:,.0f}</text>'


def _mark(value: int, x: float, *, beyond: bool) -> str:
    line = f'<line class="mark" x1="{x:.2f}" x2="{x:.2f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
    anchor = "end" if x > _WIDTH / 2 else "start"
    name = f"max_length {value:,}{' →' if beyond else ''}"
    return f'{line}<text class="marked" x="{x:.2f}" y="{_TOP - 10}" text-anchor="{anchor}">{name}</text>'


def _round_up(count: int) -> int:
    """Return 2, 4, 6, 8 or 10 times a power of ten at or above the count, so that its half is whole."""
    power = 1
    while count > 10 * power:
        power *= 10
    return next(step * power for step in (2, 4, 6, 8, 10) if step * power >= count)
