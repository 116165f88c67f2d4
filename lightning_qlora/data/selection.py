"""Which rows are trained on: how often those of each source, and which are held out for validation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lightning_qlora.data.mixing import weighted_indices
from lightning_qlora.data.packing import IntArray

__all__ = ["hold_out", "weigh_rows"]


def weigh_rows(parts: npt.NDArray[np.integer], weights: Sequence[float], *, seed: int = 0) -> IntArray:
    """Return the row numbers of an epoch: a row of weight 2 stands there twice, of weight 0.5 with half of its peers.

    Args:
        parts: The source of each row.
        weights: How often a row of each source is used; above 0.
        seed: Decides which rows of a source a fraction stands for; they are the same in every epoch.
    """
    rows = [np.empty(0, dtype=np.int64)]
    for part, weight in enumerate(weights):
        own = np.flatnonzero(parts == part)
        rows.append(own[np.asarray(weighted_indices(len(own), weight, seed + part), dtype=np.int64)])
    return np.concatenate(rows)


def hold_out(digests: npt.NDArray[np.uint64], fraction: float, *, seed: int = 0) -> npt.NDArray[np.bool_]:
    """Choose rows for validation: a share of the distinct rows, with all copies of each.

    The choice goes by content, not by position, so a row that is added to the file moves few others.

    Args:
        digests: 64 bits of the content of each row.
        fraction: Share of the distinct rows; at least one is chosen.
        seed: Of the choice.

    Returns:
        For each row whether it is held out.

    Raises:
        ValueError: If no row would be left to train on.
    """
    distinct, copies = np.unique(digests, return_inverse=True)
    count = max(1, round(fraction * len(distinct)))
    if count >= len(distinct):
        raise ValueError(
            f"validation_fraction={fraction} of {len(distinct)} distinct rows leaves none to train on. Give more rows, "
            "or a validation source."
        )
    key = np.random.default_rng([seed, 4]).integers(1 << 63, dtype=np.uint64)
    chosen = np.zeros(len(distinct), dtype=bool)
    chosen[np.argsort(_scramble(distinct ^ key), kind="stable")[:count]] = True
    held_out: npt.NDArray[np.bool_] = chosen[copies]
    return held_out


def _scramble(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix the bits of each value (the finaliser of splitmix64), so that another key gives another order."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
