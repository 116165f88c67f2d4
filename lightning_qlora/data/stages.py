"""Which rows each stage of a run uses: its own prepared sources, or a share of the training rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from lightning_qlora.data.encoding import RowEncoder
from lightning_qlora.data.packing import IntArray
from lightning_qlora.data.preparation import Prepared, prepare
from lightning_qlora.data.report import PreparationReport
from lightning_qlora.data.selection import hold_out, weigh_rows
from lightning_qlora.data.sources import Sources, as_sources

__all__ = ["PreparedStages", "Stage", "StageRows"]

Stage: TypeAlias = Literal["train", "validation", "test"]


class StageRows(NamedTuple):
    """The rows of one stage.

    Attributes:
        prepared: The prepared set that holds them.
        rows: Their numbers in it; a row of weight 2 stands there twice. A pair of answers is one row.
    """

    prepared: Prepared
    rows: IntArray


@dataclass
class PreparedStages:
    """Prepares the sources of a run, each once, and deals their rows out to the stages.

    The weight of a source holds in every stage: of 0.2, a seeded fifth of its rows is validated on. Rows that
    ``validation_fraction`` holds out are used once each, whatever the weight of their source.

    Args:
        sources: What each stage reads; ``None`` for nothing.
        encoder: Returns how a row becomes tokens.
        cache_dir: The folder of prepared sets.
        num_proc: Processes that tokenise.
        max_invalid_fraction: Largest share of refused rows.
        validation_fraction: Share of the training rows held out for validation.
        seed: Of the choice of rows.
    """

    sources: dict[Stage, Sources | None]
    encoder: Callable[[], RowEncoder]
    cache_dir: Path
    num_proc: int
    max_invalid_fraction: float
    validation_fraction: float
    seed: int
    _prepared: dict[Stage, Prepared] = field(default_factory=dict)
    _rows: dict[Stage, StageRows] = field(default_factory=dict)

    def prepare(self, stage: Stage) -> Prepared:
        """Fill the cache for a stage, or read it."""
        if stage not in self._prepared:
            sources = self.sources[stage]
            assert sources is not None
            self._prepared[stage] = prepare(
                sources,
                self.encoder(),
                cache_dir=self.cache_dir,
                num_proc=self.num_proc,
                max_invalid_fraction=self.max_invalid_fraction,
                name=stage,
            )
        return self._prepared[stage]

    def set_up(self, stage: Stage) -> None:
        """Decide which rows a stage uses, and with ``train`` those held out from it."""
        if stage in self._rows:
            return
        prepared = self.prepare(stage)
        first = prepared.documents.row_offsets[:-1]
        rows = weigh_rows(prepared.documents.parts[first], self._weights_of(stage), seed=self.seed)
        if stage == "train" and self.validation_fraction:
            held_out = hold_out(prepared.documents.digests[first], self.validation_fraction, seed=self.seed)
            self._rows["validation"] = StageRows(prepared, np.flatnonzero(held_out))
            rows = rows[~held_out[rows]]
        if not len(rows):
            raise ValueError(f"The weights of the {stage} sources leave no row. Raise them.")
        self._rows[stage] = StageRows(prepared, rows)

    def __contains__(self, stage: Stage) -> bool:
        return stage in self._rows

    def __getitem__(self, stage: Stage) -> StageRows:
        """Return the rows of a stage that was set up."""
        return self._rows[stage]

    @property
    def weights(self) -> list[float]:
        """How often a row of each training source is used in an epoch."""
        return self._weights_of("train")

    def _weights_of(self, stage: Stage) -> list[float]:
        sources = self.sources[stage]
        return [] if sources is None else [source.weight for source in as_sources(sources)]

    @property
    def reports(self) -> dict[str, PreparationReport]:
        """What became of the rows of each stage that has sources of its own."""
        return {stage: prepared.report for stage, prepared in self._prepared.items()}

    def num_leaked(self) -> int:
        """Count the distinct validation rows whose content is also trained on."""
        if "train" not in self._rows or "validation" not in self._rows:
            return 0
        digests = []
        for prepared, rows in (self["train"], self["validation"]):
            documents = prepared.documents
            digests.append(documents.digests[documents.row_offsets[:-1][rows]])
        return len(np.intersect1d(digests[0], digests[1]))
