"""The states of every random generator that training draws from, as plain tensors."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

__all__ = ["RandomState", "are_equal", "capture_random_state", "restore_random_state"]

RandomState = dict[str, Any]
"""The states of Python's, NumPy's, torch's CPU and current CUDA generators; tensors and numbers only."""


def capture_random_state() -> RandomState:
    """Return the states of this process's generators; it costs microseconds and never waits for the device."""
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)
    state: RandomState = {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [
            torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            int(numpy["state"]["pos"]),
            int(numpy["has_gauss"]),
            float(numpy["gauss"]),
        ],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: RandomState) -> None:
    """Put this process's generators back into a captured state."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def are_equal(one: RandomState, two: RandomState) -> bool:
    """Whether nothing was drawn between two states."""
    pairs = zip(tree_leaves(one), tree_leaves(two), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)
