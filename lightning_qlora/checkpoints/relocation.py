"""The state of a checkpoint callback whose folder was moved since."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["relocated"]


def relocated(
    state: dict[str, Any], here: str, exists: Callable[[str], bool], mode: str, save_top_k: int
) -> dict[str, Any]:
    """Look for the checkpoints of a moved folder where they are now, and forget those that did not come along.

    Args:
        state: Of Lightning's ModelCheckpoint.
        here: The folder that checkpoints are published in now.
        exists: Whether there is something at a path.
        mode: ``min`` or ``max``, which scores are the best.
        save_top_k: How many of the best are kept.
    """
    before = str(state["dirpath"])
    if before == here:
        return state

    def moved(path: str) -> str:
        new = path.replace(before, here, 1)
        return new if path and exists(new) else ""

    best = {new: score for path, score in state["best_k_models"].items() if (new := moved(path))}
    worst = (max if mode == "min" else min)(best, key=best.__getitem__, default="")
    return {
        **state,
        "dirpath": here,
        "best_k_models": best,
        "kth_best_model_path": worst if len(best) == save_top_k else "",
        "best_model_path": moved(state["best_model_path"]) or state["best_model_path"],
        "last_model_path": moved(state["last_model_path"]),
    }
