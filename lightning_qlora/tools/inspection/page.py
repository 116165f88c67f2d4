"""An inspection as one HTML page that loads nothing: texts are escaped, and no script but its own can run in it."""

from __future__ import annotations

from typing import Any

from lightning_qlora.tools.html import render_document, visible
from lightning_qlora.tools.inspection import figures
from lightning_qlora.tools.inspection.charts import draw_histogram
from lightning_qlora.tools.inspection.findings import Inspection

__all__ = ["render_page"]

_LENGTH_BINS = 40


def render_page(inspection: Inspection) -> str:
    """Return the page as text.

    Args:
        inspection: What was found. Rows come from anywhere, so everything in it counts as hostile.
    """
    return render_document(
        "Data inspection",
        __package__,
        {"visible": visible, "count": lambda value: f"{value:,}", "share": figures.share},
        found=inspection,
        stages=[_stage(inspection, index) for index in range(len(inspection.stages))],
        template=figures.describe_template(inspection),
        plan=figures.describe_plan(inspection.plan) if inspection.plan else [],
        leakage=[(leakage, figures.describe_leakage(leakage)) for leakage in inspection.leakage],
        tiles=_tiles(inspection),
    )


def _stage(inspection: Inspection, index: int) -> dict[str, Any]:
    stage = inspection.stages[index]
    lengths = figures.length_histogram(stage, _LENGTH_BINS)
    shares = figures.share_histogram(stage.supervised_share)
    fill = figures.share_histogram(stage.batches.fill)
    return {
        "found": stage,
        "rows": figures.describe_stage(stage),
        "sources": figures.source_rows(stage),
        "examples": stage.report.examples if stage.report else [],
        "refused": stage.report.refused if stage.report else {},
        "length_chart": draw_histogram(lengths, f"{stage.name}: rows by length"),
        "share_chart": draw_histogram(shares, f"{stage.name}: rows by their share of supervised tokens"),
        "fill_chart": draw_histogram(fill, f"{stage.name}: batches by how full they are", "batches"),
    }


def _tiles(inspection: Inspection) -> list[tuple[str, str, str]]:
    """Return the figures to see first: name, value, remark."""
    first = inspection.stages[0]
    tiles = []
    if first.report is not None:
        refused = first.report.rows_read - first.report.rows_kept
        tiles.append(
            (
                f"{first.name} rows",
                f"{first.report.rows_kept:,}",
                f"of {first.report.rows_read:,} read, {refused:,} refused",
            )
        )
    tiles += [
        ("tokens an epoch", f"{first.num_tokens:,}", f"{figures.share(first.supervised_fraction)} supervised"),
        ("batches", f"{first.batches.num_batches:,}", f"{figures.share(first.batches.efficiency)} filled"),
        ("duplicates", f"{first.num_duplicates:,}", "rows equal an earlier one"),
    ]
    for leakage in inspection.leakage:
        tiles.append(
            (
                f"{leakage.stage} leakage",
                f"{leakage.num_exact:,}",
                f"of {leakage.num_rows:,} rows; {leakage.num_same_question:,} by question",
            )
        )
    if inspection.plan is not None:
        steps = inspection.plan.total_steps
        tiles.append(
            (
                "optimizer steps",
                "open" if steps is None else f"{steps:,}",
                f"about {inspection.plan.tokens_per_step:,.0f} tokens each",
            )
        )
    return tiles
