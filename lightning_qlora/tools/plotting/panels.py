"""Which metrics belong into one picture, in which order, and what they are called."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from lightning_qlora.tools.plotting.reading import Run, Series

__all__ = ["Line", "Panel", "arrange", "format_value"]

Style = Literal["plain", "dashed", "dotted"]

_STAGE = re.compile(r"(train|val|test)_(.+)")
_STYLES: dict[str, Style] = {"train": "plain", "val": "dashed", "test": "dotted", "base": "dotted"}

_TITLES = {
    "loss": "Loss, nats per supervised token",
    "perplexity": "Perplexity",
    "token_accuracy": "Token accuracy",
    "learning_rate": "Learning rate",
    "gradient_norm": "Norm of the gradient before clipping",
    "tokens_per_second": "Tokens per second",
    "supervised_tokens_per_second": "Supervised tokens per second",
    "step_seconds": "Seconds per optimizer step",
    "mfu": "Model FLOPs utilisation",
    "peak_memory_gib": "Peak memory, GiB",
    "peak_reserved_gib": "Peak memory reserved by torch, GiB",
    "answers_valid": "Fixed questions: valid answers",
    "answers_exact": "Fixed questions: right answers",
    "answers_fields": "Fixed questions: right fields",
    "answers_perplexity": "Fixed questions: perplexity of the references",
}
_ORDER = [*_TITLES]
_BETTER_BELOW = ("loss", "perplexity")
_BETTER_ABOVE = ("accuracy", "answers_valid", "answers_exact", "answers_fields")


class Line(NamedTuple):
    """One curve.

    Attributes:
        run: The number of its run.
        metric: As it was logged.
        style: What tells curves of one run apart.
        series: Its values.
    """

    run: int
    metric: str
    style: Style
    series: Series


class Panel(NamedTuple):
    """Curves that share their axes.

    Attributes:
        name: What they have in common.
        title: That in words.
        lines: The curves.
        best: Whether the best value is the lowest or the highest one; ``None`` where there is no better.
    """

    name: str
    title: str
    lines: list[Line]
    best: Literal["lowest", "highest"] | None


def arrange(runs: Sequence[Run], metrics: Sequence[str] | None = None) -> list[Panel]:
    """Put metrics of the same kind side by side: of training and validation, of base and adapters, of all runs.

    Args:
        runs: To be shown together.
        metrics: Only those that contain one of these words; ``None`` for all.

    Raises:
        ValueError: If no metric contains any of the words.
    """
    lines: dict[str, list[Line]] = {}
    for number, run in enumerate(runs):
        for metric, series in run.series.items():
            if metrics is None or any(word in metric for word in metrics):
                name, style = _kind(metric, run.series)
                lines.setdefault(name, []).append(Line(number, metric, style, series))
    if not lines:
        known = sorted({metric for run in runs for metric in run.series})
        raise ValueError(f"No metric contains {' or '.join(metrics or ())}. There are: {', '.join(known)}.")
    ordered = sorted(lines, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))
    return [Panel(name, _TITLES.get(name, name.replace("_", " ")), lines[name], _best(name)) for name in ordered]


def _kind(metric: str, known: Mapping[str, Series]) -> tuple[str, Style]:
    """Return the panel and the style of a metric."""
    if metric.endswith("_base") and metric.removesuffix("_base") in known:
        return metric.removesuffix("_base"), _STYLES["base"]
    if metric == "lr" or metric.startswith("lr-"):  # LearningRateMonitor's names
        return "learning_rate", "plain"
    staged = _STAGE.fullmatch(metric)
    return (metric, "plain") if staged is None else (staged[2], _STYLES[staged[1]])


def _best(name: str) -> Literal["lowest", "highest"] | None:
    if name.endswith(_BETTER_BELOW):
        return "lowest"
    return "highest" if name.endswith(_BETTER_ABOVE) else None


def format_value(value: float) -> str:
    """Write a value in at most four significant digits."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e+")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
