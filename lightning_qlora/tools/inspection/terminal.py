"""An inspection as text: tables, bars of letters, and rows with a margin that says what is supervised."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Literal, TextIO

from lightning_qlora.tools.html import visible
from lightning_qlora.tools.inspection.figures import (
    Histogram,
    describe_leakage,
    describe_plan,
    describe_stage,
    describe_template,
    length_histogram,
    number,
    share_histogram,
)
from lightning_qlora.tools.inspection.findings import (
    Inspection,
    Leakage,
    LengthWhatIf,
    Repeat,
    Sample,
    Segment,
    StageFindings,
)

__all__ = ["Color", "print_inspection", "use_color", "write"]

Color = Literal["auto", "always", "never"]

_BARS = 40
_LENGTH_BINS = 24
_TITLE_WIDTH = 15
_CONTROL, _HEADING, _BAD = "36", "1", "1;31"
_COLOR_OF = {"+": "32", "-": "31"}

_LEGEND = "+ in the margin: supervised (the model learns to write it).  [[name]]: a control token.  |: the context."
_LEGEND_OF_ANSWERS = (
    "+ in the margin: a good answer.  -: a bad one.  [[name]]: a control token.  |: the prompt of both."
)


def use_color(color: Color, stream: TextIO) -> bool:
    """Whether to write colours: on a terminal, unless NO_COLOR is set (https://no-color.org) or it was said."""
    if color == "auto":
        return stream.isatty() and not os.environ.get("NO_COLOR")
    return color == "always"


def write(text: str, stream: TextIO) -> None:
    """Write text; characters that the stream's encoding lacks are written as escapes."""
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def print_inspection(inspection: Inspection, *, color: Color = "auto", stream: TextIO | None = None) -> None:
    """Print an inspection.

    Args:
        inspection: What was found.
        color: Whether to colour it. Nothing is said by colour alone.
        stream: Where to; standard output by default.
    """
    stream = stream or sys.stdout
    write("\n".join(_Text(use_color(color, stream)).lines(inspection)), stream)


class _Text:
    """Lays an inspection out as lines."""

    def __init__(self, color: bool) -> None:
        self.color = color

    def paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.color and text else text

    def lines(self, inspection: Inspection) -> Iterable[str]:
        yield from self._section("Template", describe_template(inspection))
        for stage in inspection.stages:
            yield from self._stage(stage)
        for leakage in inspection.leakage:
            yield from self._leakage(leakage)
        if inspection.plan is not None:
            yield from self._section("Plan of the run", describe_plan(inspection.plan))
        if inspection.samples:
            yield from self._heading(f"{number(len(inspection.samples), 'row', 'rows')} as the model sees them")
            has_answers = any(sample.answer is not None for sample in inspection.samples)
            yield f"  {_LEGEND_OF_ANSWERS if has_answers else _LEGEND}"
        for sample in inspection.samples:
            yield from self._sample(sample)
        yield from self._verdicts(inspection)

    def _heading(self, title: str) -> list[str]:
        return ["", self.paint(title, _HEADING)]

    def _section(self, title: str, rows: Iterable[tuple[str, str]]) -> list[str]:
        return [*self._heading(title), *(f"  {name.ljust(_TITLE_WIDTH)} {text}" for name, text in rows)]

    def _stage(self, stage: StageFindings) -> Iterable[str]:
        yield from self._section(stage.name.capitalize(), describe_stage(stage))
        if stage.duplicates:
            yield from self._heading(f"{stage.name.capitalize()}: the first duplicates")
            yield from self._repeats(stage.duplicates, "equals")
        if stage.report is not None:
            yield from self._heading(f"{stage.name.capitalize()}: sources and refused rows")
            yield from (f"  {visible(line)}" for line in stage.report.table().split("\n"))
        yield from self._heading(
            f"{stage.name.capitalize()}: rows by length{' before the limit' if stage.report else ''}"
        )
        yield from self._bars(length_histogram(stage, _LENGTH_BINS))
        if stage.what_if:
            yield from self._what_if(stage.name, stage.what_if)
        yield from self._heading(f"{stage.name.capitalize()}: rows by their share of supervised tokens")
        yield from self._bars(share_histogram(stage.supervised_share))

    def _what_if(self, stage: str, limits: list[LengthWhatIf]) -> Iterable[str]:
        yield from self._heading(f"{stage.capitalize()}: with another max_length")
        yield f"  {'max_length':>12} {'fit':>10} {'shortened':>10} {'refused':>10} {'tokens kept':>14}"
        for limit in limits:
            mark = "  <- configured" if limit.current else ""
            counts = f"{limit.fits:>10,} {limit.shortened:>10,} {limit.refused:>10,} {limit.num_tokens:>14,}"
            yield f"  {limit.max_length:>12,} {counts}{mark}"

    def _bars(self, histogram: Histogram) -> Iterable[str]:
        most = max(max(histogram.counts), 1)
        labels = [histogram.label(i) for i in range(len(histogram.counts))]
        width = max(len(label) for label in labels)
        marked = False
        filled = [i for i, count in enumerate(histogram.counts) if count]
        for i in range(filled[0], filled[-1] + 1):
            label, bound, count = labels[i], histogram.bounds[i], histogram.counts[i]
            bar = "#" * (-(-count * _BARS // most))
            mark = ""
            if histogram.mark is not None and not marked and bound >= histogram.mark:
                marked, mark = True, f"  <- max_length {histogram.mark:,}"
            yield f"  {label:>{width}} {count:>9,} {bar}{mark}"

    def _repeats(self, repeats: list[Repeat], word: str) -> list[str]:
        return [f"  {visible(r.place)} {word} {visible(r.of)}" for r in repeats]

    def _leakage(self, leakage: Leakage) -> Iterable[str]:
        yield from self._section("Leakage", [(leakage.stage.capitalize(), describe_leakage(leakage))])
        yield from self._repeats(leakage.exact, "equals")
        yield from self._repeats(leakage.same_question, "has the question of")

    def _sample(self, sample: Sample) -> Iterable[str]:
        yield ""
        place = f"  {self.paint(visible(sample.place), _HEADING)} ({sample.stage}"
        if sample.refused is not None:
            yield f"{place}) {self.paint('refused', _BAD)}: {visible(sample.refused)}"
            return
        judged = f", {sample.answer}" if sample.answer is not None and not sample.rejected else ""
        yield f"{place}, {sample.num_tokens:,} tokens, {sample.num_supervised_tokens:,} supervised{judged})"
        yield from self._segments(sample.segments, "-" if sample.answer == "undesirable" else "+")
        if sample.rejected:
            yield from self._segments(sample.rejected, "-")

    def _segments(self, segments: list[Segment], sign: str) -> Iterable[str]:
        line, supervised = "", segments[0].supervised
        for segment in segments:
            if segment.supervised != supervised and line:
                yield self._margin(line, supervised, sign)
                line = ""
            supervised = segment.supervised
            pieces = [f"[[{segment.text}]]"] if segment.control else segment.text.split("\n")
            for index, piece in enumerate(pieces):
                if index:
                    yield self._margin(line, supervised, sign)
                    line = ""
                line += self._piece(piece, supervised, segment.control, sign)
        if line:
            yield self._margin(line, supervised, sign)

    def _piece(self, text: str, supervised: bool, control: bool, sign: str) -> str:
        if control:
            return self.paint(visible(text), f"1;{_COLOR_OF[sign]}" if supervised else _CONTROL)
        escaped = visible(text).replace("[[", "[\\u005b")  # so that text cannot look like a control token
        return self.paint(escaped, _COLOR_OF[sign]) if supervised else escaped

    def _margin(self, line: str, supervised: bool, sign: str) -> str:
        return f"  {self.paint(sign, _COLOR_OF[sign]) if supervised else '|'} {line}"

    def _verdicts(self, inspection: Inspection) -> Iterable[str]:
        if inspection.verdicts:
            yield from self._heading("Limits")
        for verdict in inspection.verdicts:
            yield f"  {'ok    ' if verdict.passed else self.paint('MISSED', _BAD)} {visible(verdict.text)}"
        for note in inspection.notes:
            yield ""
            yield f"Note: {note}"
