"""Telling a loss that jumped, or keeps rising, from one that is merely noisy."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["LossRise", "LossWatch"]

_HISTORY = 64
_WARM_UP = 16
_RECENT = 8
_LEAST_RISE = 0.5
"""Nats per token. Late in training a hard row among learned ones costs 20 times the median: 0.3, not 0.01."""
_LEAST_SPREAD = 0.05
"""Of the logarithm: losses of large batches lie within a few per cent, and chance within that is no jump either."""
_OFFSET = 0.05
"""Nats per token, added before the logarithm: what lies below is learned, and differences there mean nothing."""
_MEDIAN_ERROR = 1.2533 / math.sqrt(_RECENT)
"""Standard error of the median of so many, in standard deviations of one (normal distribution)."""


class LossRise(NamedTuple):
    """What a loss did.

    Attributes:
        loss: Of this step, or the median of the last steps if it kept rising.
        before: The median of the steps before.
        num_steps: Over how many steps: 1 for a jump.
    """

    loss: float
    before: float
    num_steps: int


class LossWatch:
    """Compares each step's loss with those of the last 64, on a logarithmic scale.

    Losses of small batches are about log-normal: as training goes on their median falls, while single steps stay ten
    or twenty times above it. Deviations are therefore measured in the logarithm, by the median and the median
    absolute deviation, which outliers do not move. Two things are told, once until the loss has come back:

    - a jump: one step far above the median, and above all of the 64;
    - a rise: the median of the last 8 steps far above the median of those before.

    Either must also be at least 0.5 nats per token above the median.

    Args:
        threshold: What is far, in standard deviations: of a step for a jump, of the median of 8 steps for a rise.
        losses: Of the steps before, oldest first, where a run is resumed.
    """

    def __init__(self, threshold: float, losses: Iterable[float] = ()) -> None:
        self.threshold = threshold
        self.losses: deque[float] = deque(losses, maxlen=_HISTORY)
        self._is_up = False

    def add(self, loss: float) -> LossRise | None:
        """Take the loss of one more step; return what it did if that is to be told."""
        earlier = list(self.losses)
        self.losses.append(loss)
        if len(earlier) < _WARM_UP:
            return None
        before, recent = earlier[: 1 - _RECENT], statistics.median([*earlier[1 - _RECENT :], loss])
        sustained = _deviation(recent, before) / _MEDIAN_ERROR
        rise = None
        if loss > max(earlier) and _deviation(loss, earlier) >= self.threshold:
            rise = LossRise(loss, statistics.median(earlier), 1)
        elif sustained >= self.threshold:
            rise = LossRise(recent, statistics.median(before), _RECENT)
        if rise is not None and rise.loss < rise.before + _LEAST_RISE:
            rise = None
        was_up, self._is_up = self._is_up, rise is not None or (self._is_up and sustained >= self.threshold / 2)
        return None if was_up else rise


def _deviation(loss: float, before: list[float]) -> float:
    """How many standard deviations of a step a loss lies above those before, in the logarithm."""
    logs = [_log(value) for value in before]
    center = statistics.median(logs)
    spread = 1.4826 * statistics.median(abs(value - center) for value in logs)
    return (_log(loss) - center) / max(spread, _LEAST_SPREAD)


def _log(loss: float) -> float:
    return math.log(max(loss, 0.0) + _OFFSET)
