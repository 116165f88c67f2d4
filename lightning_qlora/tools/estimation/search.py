"""The largest that fits: a batch, a context, a model."""

from __future__ import annotations

import itertools
from collections.abc import Callable

__all__ = ["largest_that_fits"]

_ENOUGH = 0.01
_LARGEST = 2**20


def largest_that_fits(peak: Callable[[int], int], budget: int, *, step: int = 1) -> int:
    """Return the largest size, a multiple of ``step``, whose peak stays within a budget; 0 if not even one step does.

    Memory grows nearly in proportion, so a line through the ends of the bracket finds the place in a trial or two.

    Args:
        peak: The peak at a size; it must grow with it.
        budget: Of the same unit.
        step: Sizes are multiples of this.

    Returns:
        A size whose peak is within 1 % of the budget, or the largest one below it.
    """
    low, low_peak = 0, 0
    high, high_peak = 1, peak(step)
    while high_peak <= budget:
        low, low_peak = high, high_peak
        if high * step >= _LARGEST:
            return high * step  # more than anyone asks for
        high *= 4
        high_peak = peak(high * step)
    aim = budget * (1 - _ENOUGH / 2)  # the middle of what is near enough, so that no curvature keeps missing it
    for trial in itertools.count():
        if low == 0 or high - low <= 1 or budget - low_peak <= _ENOUGH * budget:
            return low * step
        guess = low + int((high - low) * (aim - low_peak) / (high_peak - low_peak))
        middle = (low + high) // 2 if trial % 3 == 2 else min(high - 1, max(low + 1, guess))
        found = peak(middle * step)
        if found <= budget:
            low, low_peak = middle, found
        else:
            high, high_peak = middle, found
    raise AssertionError
