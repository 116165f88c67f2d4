"""What a run's data is, before anything is trained: for people in the terminal and on a page, for pipelines as JSON."""

from __future__ import annotations

import json as json_format
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import lightning as L

from lightning_qlora.evaluation.files import write_whole
from lightning_qlora.tools.inspection.findings import Inspection
from lightning_qlora.tools.inspection.gathering import gather
from lightning_qlora.tools.inspection.page import render_page
from lightning_qlora.tools.inspection.terminal import Color, print_inspection
from lightning_qlora.tools.inspection.thresholds import Thresholds, describe_missed, judge

__all__ = ["inspect_data"]

WHAT_IF = [1024, 2048, 4096, 8192]


def inspect_data(
    datamodule: L.LightningDataModule,
    trainer: L.Trainer | None = None,
    *,
    json: bool = False,
    html: str | None = None,
    samples: int = 3,
    html_samples: int = 100,
    show: str | list[str] | None = None,
    what_if: list[int] = WHAT_IF,
    max_rows: int | None = None,
    world_size: int | None = None,
    color: Color = "auto",
    max_refused_fraction: float | None = None,
    max_shortened_fraction: float | None = None,
    min_supervised_share: float | None = None,
    max_duplicates: int | None = None,
    max_leakage: int | None = None,
    max_question_leakage: int | None = None,
) -> None:
    """Show what training would read: masks, refused rows, lengths, batches, leakage and the steps of the run.

    Takes the configuration of fit, needs no GPU and loads no base, and leaves the rows prepared for fit. It ends with
    an error if a limit is missed, also the configuration's own max_invalid_fraction, so it can guard a pipeline.

    Args:
        datamodule: The data of the run.
        trainer: Whose settings say how long the run is.
        json: Write everything as JSON to standard output, and nothing else.
        html: Write a page that needs nothing but itself to this file.
        samples: Rows to show in the terminal and the JSON.
        html_samples: Rows to show on the page.
        show: Places, FILE:LINE, of rows to show before those: also refused ones, with the reason.
        what_if: Other values of max_length to try, in tokens.
        max_rows: Read only the first so many rows of each source.
        world_size: Data-parallel ranks to count the steps for; by default the trainer's devices times its nodes.
        color: Whether the terminal is coloured. Nothing is said by colour alone.
        max_refused_fraction: Fail if a larger share of the rows is refused, for whatever reason; from 0 to 1.
        max_shortened_fraction: Fail if a larger share of the rows is shortened to max_length; from 0 to 1.
        min_supervised_share: Fail if a smaller share of the tokens is supervised; from 0 to 1.
        max_duplicates: Fail if more rows equal an earlier one.
        max_leakage: Fail if more validation or test rows are training rows too.
        max_question_leakage: Fail if the question of more validation or test rows is trained on, whatever the answer.

    Raises:
        ValueError: If a limit is missed, an option is out of its range, or no row can be used.
        MisconfigurationException: If there is no data, or the data module is none of this package.
    """
    for name, value, least in (
        ("samples", samples, 0),
        ("html_samples", html_samples, 0),
        *_counts(max_rows, world_size),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}; write a whole number from {least}.")
    if any(limit < 1 for limit in what_if):
        raise ValueError(f"what_if is {what_if}; write lengths in tokens, from 1.")
    thresholds = Thresholds(
        max_refused_fraction=max_refused_fraction,
        max_shortened_fraction=max_shortened_fraction,
        min_supervised_share=min_supervised_share,
        max_duplicates=max_duplicates,
        max_leakage=max_leakage,
        max_question_leakage=max_question_leakage,
        max_invalid_fraction=getattr(datamodule, "max_invalid_fraction", None),
    )
    drawn = max(samples, html_samples) if html else samples
    with redirect_stdout(sys.stderr):  # whatever a library has to say is no part of the result
        found = gather(
            datamodule,
            trainer,
            samples=drawn,
            show=[show] if isinstance(show, str) else show or (),
            what_if=what_if,
            max_rows=max_rows,
            world_size=world_size,
        )
    found = replace(found, verdicts=judge(found, thresholds))
    if html:
        write_whole(Path(html).expanduser(), render_page(found.with_samples(html_samples)))
    _print(found.with_samples(samples), json, color)
    if found.missed:
        raise ValueError(describe_missed(found))


def _counts(max_rows: int | None, world_size: int | None) -> list[tuple[str, int, int]]:
    given = {"max_rows": max_rows, "world_size": world_size}
    return [(name, value, 1) for name, value in given.items() if value is not None]


def _print(found: Inspection, json: bool, color: Color) -> None:
    if json:
        json_format.dump(found.to_dict(), sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        print_inspection(found, color=color)
    sys.stdout.flush()
