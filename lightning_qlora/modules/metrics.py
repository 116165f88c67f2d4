"""Means that are exact over batches and ranks and never wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

__all__ = ["ExactMean", "MeanDifference", "MeanPerplexity"]


class ExactMean(Metric):
    """A sum divided by the number of its terms.

    torchmetrics' own ``MeanMetric`` either looks for NaN, which waits for the device at every batch, or, told not to,
    ignores the weights it is given (torchmetrics 1.8 and 1.9, ``nan_strategy="disable"``).
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "count"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")

    @override
    def update(self, total: Tensor, count: Tensor | int) -> None:
        """Add the sum of ``count`` terms."""
        self.total += total
        self.count += count

    @override
    def compute(self) -> Tensor:
        return self.total / self.count


class MeanPerplexity(ExactMean):
    """``exp`` of the mean cross-entropy in nats."""

    @override
    def compute(self) -> Tensor:
        return super().compute().exp()


class MeanDifference(Metric):
    """The mean of some values less the mean of others; for pairs, the mean of their differences."""

    full_state_update = False
    minuend: Tensor
    subtrahend: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("minuend", "subtrahend"):
            self.add_state(name, torch.zeros(2), dist_reduce_fx="sum")  # sum, count

    @override
    def update(self, these: Tensor, those: Tensor) -> None:
        """Add (A,) and (B,) values."""
        for state, values in ((self.minuend, these), (self.subtrahend, those)):
            state += torch.stack([values.sum(), values.new_full((), float(len(values)))])

    @override
    def compute(self) -> Tensor:
        return self.minuend[0] / self.minuend[1] - self.subtrahend[0] / self.subtrahend[1]
