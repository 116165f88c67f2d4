"""What runs logged, as curves: in the terminal, and on a page that needs nothing but itself."""

from __future__ import annotations

import json as json_format
import sys
from dataclasses import asdict
from pathlib import Path

from lightning_qlora.evaluation.files import write_whole
from lightning_qlora.tools.plotting.page import render_page
from lightning_qlora.tools.plotting.panels import arrange
from lightning_qlora.tools.plotting.reading import read_runs
from lightning_qlora.tools.plotting.terminal import print_panels

__all__ = ["plot"]


def plot(runs: list[str], *, html: str | None = None, metrics: list[str] | None = None, json: bool = False) -> None:
    """Show what runs logged: loss, learning rate, gradient norm, speed, memory, scores and answers over the steps.

    Reads what CSVLogger wrote, also while a run is under way. Several runs are drawn side by side: plot RUN1 RUN2.

    Args:
        runs: Folders of runs, such as their trainer.default_root_dir, a version_N folder, or a metrics.csv.
        html: Write a page with the curves, and the answers to fixed questions over time, to this file.
        metrics: Show only metrics whose name contains one of these words.
        json: Write the values as JSON to standard output, and nothing else.

    Raises:
        ValueError: If a folder holds no metrics, or those of several runs.
    """
    found = read_runs(runs)
    panels = arrange(found, metrics)
    if html is not None:
        write_whole(Path(html).expanduser(), render_page(found, panels))
    if json:
        shown = {line.metric for panel in panels for line in panel.lines}
        values = [
            {
                "name": run.name,
                "files": [str(file) for file in run.files],
                "resumed": list(run.resumed),
                "series": {name: asdict(series) for name, series in run.series.items() if name in shown},
            }
            for run in found
        ]
        json_format.dump(values, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        print_panels(found, panels)
