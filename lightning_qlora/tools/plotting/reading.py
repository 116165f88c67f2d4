"""The metrics and answers that runs left behind, read from their files."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Answers", "Run", "Series", "read_run", "read_runs"]

_FILE = "metrics.csv"
_ANSWERS = re.compile(r"step_(\d+)\.jsonl")


@dataclass(slots=True)
class Series:
    """The values of one metric.

    Attributes:
        steps: Optimizer steps, ascending.
        values: What was logged there; finite.
        num_nonfinite: How many values were NaN or infinite and are left out.
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    num_nonfinite: int = 0


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers to fixed questions after a number of steps, as AnswerComparison writes them."""

    step: int
    rows: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Run:
    """What one run logged.

    Attributes:
        name: What tells it from the other runs.
        files: The metrics that were read, oldest first; a resumed run has several.
        series: By metric, in the order of the file.
        resumed: Steps at which it went on.
        answers: By step, ascending.
    """

    name: str
    files: tuple[Path, ...]
    series: dict[str, Series]
    resumed: tuple[int, ...] = ()
    answers: tuple[Answers, ...] = ()


def read_runs(places: Sequence[str]) -> list[Run]:
    """Read several runs and name them by what tells their places apart.

    Raises:
        ValueError: If nothing is named, or a place holds no run.
    """
    if not places:
        raise ValueError("No run is named. Write one or more folders: plot runs/first runs/second.")
    runs = [read_run(place) for place in places]
    return [Run(name, *_rest(run)) for name, run in zip(_names(places), runs, strict=True)]


def _rest(run: Run) -> tuple[tuple[Path, ...], dict[str, Series], tuple[int, ...], tuple[Answers, ...]]:
    return run.files, run.series, run.resumed, run.answers


def read_run(place: str) -> Run:
    """Read the metrics of a run.

    Args:
        place: A ``metrics.csv``, the folder that holds it, or a folder above, such as the run's default_root_dir. Of a
            resumed run, which has a folder of metrics for each start, what was done again replaces what it repeats.

    Raises:
        ValueError: If there are no metrics, or those of several runs.
    """
    found = {file: _read_metrics(file) for file in _find(Path(place).expanduser())}
    trained = {file: read for file, read in found.items() if _is_of_training(read)}
    found = trained or found  # validate and test leave files of their own, which say nothing over time
    files = list(found)
    series: dict[str, Series] = {}
    resumed = []
    for read in found.values():
        first = min((s.steps[0] for s in read.values() if s.steps), default=None)
        if series and first is not None:
            if any(s.steps and s.steps[0] < first for s in series.values()):
                resumed.append(first)
            for known in series.values():
                _cut(known, first)
        for name, new in read.items():
            old = series.setdefault(name, Series())
            old.steps += new.steps
            old.values += new.values
            old.num_nonfinite += new.num_nonfinite
    kept = {name: s for name, s in series.items() if s.steps or s.num_nonfinite}
    if not kept:
        raise ValueError(f"{place!r} holds no logged values yet: {', '.join(map(str, files))}.")
    return Run(str(place), tuple(files), kept, tuple(resumed), _read_answers(files))


def _find(place: Path) -> list[Path]:
    """Find the metrics of one run, oldest first."""
    if place.is_file():
        return [place]
    if (place / _FILE).is_file():
        return [place / _FILE]
    found = sorted(place.rglob(_FILE), key=lambda path: _natural(str(path))) if place.is_dir() else []
    if not found:
        raise ValueError(
            f"{str(place)!r} holds no {_FILE}. Write the folder of a run that CSVLogger logged, which is the command "
            "line's default, such as its trainer.default_root_dir."
        )
    loggers = sorted({str(path.parent.parent) for path in found})
    if len(loggers) > 1:
        raise ValueError(f"{str(place)!r} holds several runs: {', '.join(loggers)}. Name one of them, or several.")
    return found


def _is_of_training(read: dict[str, Series]) -> bool:
    return any(series.steps for name, series in read.items() if name.startswith("train_"))


def _natural(text: str) -> list[tuple[int, str]]:
    """Sort version_10 after version_9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text)]


def _read_metrics(file: Path) -> dict[str, Series]:
    with file.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        names = [name for name in reader.fieldnames or () if name not in ("step", "epoch")]
        if "step" not in (reader.fieldnames or ()):
            raise ValueError(f"{file} has no column step, so it is not what CSVLogger writes.")
        found: dict[str, Series] = {name: Series() for name in names}
        for row in reader:
            step = _number(row["step"])
            for name in names:
                value = _number(row[name])
                if step is None or value is None:
                    continue
                series = found[name]
                if not math.isfinite(value):
                    series.num_nonfinite += 1
                else:
                    series.steps.append(int(step))
                    series.values.append(value)
    for series in found.values():  # a callback may log late; the sort keeps the order of one step's values
        order = sorted(range(len(series.steps)), key=series.steps.__getitem__)
        series.steps, series.values = [series.steps[i] for i in order], [series.values[i] for i in order]
    return found


def _number(text: str | None) -> float | None:
    """Return a number; nothing for an empty cell, a text, or the rest of a line that is still being written."""
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _cut(series: Series, first: int) -> None:
    """Leave out what was done again."""
    keep = sum(step < first for step in series.steps)
    del series.steps[keep:], series.values[keep:]


def _read_answers(files: Sequence[Path]) -> tuple[Answers, ...]:
    found: dict[int, Answers] = {}
    for file in files:
        for path in (file.parent / "answers").glob("step_*.jsonl"):
            name = _ANSWERS.fullmatch(path.name)
            if name is not None:
                rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
                found[int(name[1])] = Answers(int(name[1]), rows)
    return tuple(found[step] for step in sorted(found))


def _names(places: Sequence[str]) -> list[str]:
    """Shorten places to what differs between them."""
    parts = [Path(place).expanduser().parts or (".",) for place in places]
    while len(parts) > 1 and all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    if len(parts) == 1:
        return [parts[0][-1] if parts[0][-1] != "." else "run"]
    names = ["/".join(p) for p in parts]
    return [f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]
