"""Curves over optimizer steps as SVG that a page carries inside itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup, escape

from lightning_qlora.tools.html import round_ticks
from lightning_qlora.tools.plotting.panels import Panel, format_value
from lightning_qlora.tools.plotting.reading import Series

__all__ = ["draw_panel", "smooth", "thin_out"]

_WIDTH, _HEIGHT = 540, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 38
_MOST_POINTS = 400
_DOTS_UP_TO = 30
_LOG_RATIO = 30  # positive values that differ by more are shown on a logarithmic axis
_MOST_POWERS = 7  # marks of a logarithmic axis
_FEW = 40  # a curve of no more points is not smoothed
_TURNS = 0.2  # a curve that changes direction at more of its points is noise to the eye


def draw_panel(panel: Panel, names: Sequence[str], resumed: Iterable[int] = ()) -> Markup:
    """Draw the curves of a panel; each point says its value when pointed at, and the whole to a screen reader.

    Args:
        panel: What to draw.
        names: Of the runs, by number.
        resumed: Steps at which a run went on, marked by vertical lines.
    """
    values = [value for line in panel.lines for value in line.series.values]
    steps = [step for line in panel.lines for step in line.series.steps]
    label = escape(f"{panel.title}: {'; '.join(_describe(panel, names))}")
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">']
    if not values:
        return Markup("".join([*parts, f'<text x="{_WIDTH / 2}" y="{_HEIGHT / 2}">no finite value</text></svg>']))
    x, x_ticks = _horizontal(min(steps), max(steps))
    y, y_ticks = _vertical(min(values), max(values))
    bottom = _HEIGHT - _BOTTOM
    for value in y_ticks:
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        )
        parts.append(f'<text x="{_LEFT - 7}" y="{y(value) + 4:.1f}" text-anchor="end">{format_value(value)}</text>')
    for value in x_ticks:
        parts.append(f'<text x="{x(value):.1f}" y="{bottom + 17}" text-anchor="middle">{value:,.0f}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">optimizer steps</text>')
    for step in resumed:
        if min(steps) <= step <= max(steps):
            parts.append(f'<line class="mark" x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{_TOP}" y2="{bottom}"/>')
    for line in panel.lines:
        title = f"{names[line.run]}: {line.metric}" if len(names) > 1 else line.metric
        parts.append(f'<g class="run{line.run % 6} {line.style}">')
        parts += _curve(line.series, x, y, title)
        parts.append("</g>")
    return Markup("".join([*parts, "</svg>"]))  # built of numbers and escaped text only


def _curve(series: Series, x: Callable[[float], float], y: Callable[[float], float], title: str) -> list[str]:
    if not series.steps:
        return []
    points = thin_out(series, _MOST_POINTS)
    noisy = _is_noisy(series.values)
    parts = [_path(points, x, y, "raw" if noisy else "curve")]
    if noisy:
        parts.append(_path(thin_out(smooth(series), _MOST_POINTS), x, y, "curve"))
    shape = "dot" if len(points) <= _DOTS_UP_TO else "target"
    for step, value in points:
        text = escape(f"{title} {format_value(value)} at step {step:,}")
        place = f'cx="{x(step):.1f}" cy="{y(value):.1f}" r="{3 if shape == "dot" else 5}"'
        parts.append(f'<circle class="{shape}" {place}><title>{text}</title></circle>')
    return parts


def _is_noisy(values: Sequence[float]) -> bool:
    turns = sum((b - a) * (c - b) < 0 for a, b, c in zip(values, values[1:], values[2:], strict=False))
    return len(values) > _FEW and turns > _TURNS * len(values)


def _path(
    points: Sequence[tuple[int, float]], x: Callable[[float], float], y: Callable[[float], float], kind: str
) -> str:
    joined = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in points)
    return f'<path class="{kind}" d="M{joined}"/>'


def thin_out(series: Series, most: int) -> list[tuple[int, float]]:
    """Return at most about so many points; of each stretch its lowest and its highest, so that no spike is lost."""
    points = list(zip(series.steps, series.values, strict=True))
    if len(points) <= most:
        return points
    size = 2 * len(points) / most
    kept = []
    for index in range(most // 2):
        stretch = points[round(index * size) : round((index + 1) * size)]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def smooth(series: Series) -> Series:
    """Return the running mean of a curve, weighted towards its newest values over a twentieth of its length.

    It is unbiased at the beginning, as Adam's moments are (arXiv:1412.6980).
    """
    decay = 1 - 1 / max(2.0, len(series.values) / 20)
    mean = weight = 0.0
    values = []
    for value in series.values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        values.append(mean / weight)
    return Series(series.steps, values)


def _describe(panel: Panel, names: Sequence[str]) -> list[str]:
    return [
        f"{names[line.run]} {line.metric} from {format_value(line.series.values[0])} to "
        f"{format_value(line.series.values[-1])}"
        for line in panel.lines
        if line.series.values
    ]


def _horizontal(low: int, high: int) -> tuple[Callable[[float], float], list[float]]:
    low = 0 if low < 0.2 * high else low
    span = max(1, high - low)

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (step - low) / span

    return x, [tick for tick in round_ticks(low, low + span) if tick == round(tick)]


def _vertical(low: float, high: float) -> tuple[Callable[[float], float], list[float]]:
    """Return where a value stands, and the values to mark: by their logarithm where they differ by much."""
    inner = _HEIGHT - _TOP - _BOTTOM
    if low > 0 and high / low > _LOG_RATIO:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [10.0**power for power in powers[:: -(len(powers) // -_MOST_POWERS)]]
        bottom, top = math.log10(min(low, max(ticks[0], low / 1.5))), math.log10(high * 1.2)
        return (
            lambda value: _TOP + inner * (1 - (math.log10(value) - bottom) / (top - bottom)),
            [tick for tick in ticks if bottom <= math.log10(tick) <= top],
        )
    if low >= 0 and low < 0.5 * high:
        low = 0.0
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    bottom, top = low if low == 0 else low - margin, high + margin
    return lambda value: _TOP + inner * (1 - (value - bottom) / (top - bottom)), round_ticks(bottom, top)
