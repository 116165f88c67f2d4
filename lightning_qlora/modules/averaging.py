"""What Lightning's callbacks that average weights need of a module whose checkpoints hold adapters only."""

from __future__ import annotations

from collections.abc import Collection

import lightning as L
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException

__all__ = ["forget_missing", "refuse_early_averaging"]


def forget_missing(names: list[str], trained: Collection[str]) -> None:
    """Leave of the names that a load reports as missing, in place, only those of trained tensors.

    WeightAveraging loads into a module around this one, strictly: there each name has a prefix.
    """
    names[:] = [name for name in names if _ends_in(name, trained)]


def _ends_in(name: str, trained: Collection[str]) -> bool:
    while name and name not in trained:
        name = name.partition(".")[2]
    return bool(name)


def refuse_early_averaging(trainer: L.Trainer) -> None:
    """Refuse a callback that has copied the module before it had a model, and would average nothing."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
        raise MisconfigurationException(
            "StochasticWeightAveraging copies the module before the base is loaded, and would average nothing. Write "
            "lightning.pytorch.callbacks.WeightAveraging or EMAWeightAveraging instead."
        )
