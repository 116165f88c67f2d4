"""Learning rate schedules that know the run's length, as classes so that YAML can set their arguments."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["WarmupCosine", "WarmupLinear"]


class WarmupCosine(LambdaLR):
    """Linear warm-up to the optimizer's learning rate, then half a cosine down to a fraction of it.

    Args:
        optimizer: The optimizer.
        total_steps: Optimizer steps of the whole run.
        warmup_ratio: Share of the run that warms up, from 0 to 1.
        min_lr_ratio: Last learning rate as a share of the highest, from 0 to 1.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, warmup_ratio: float = 0.03, min_lr_ratio: float = 0.0
    ) -> None:
        _check_ratio("warmup_ratio", warmup_ratio)
        _check_ratio("min_lr_ratio", min_lr_ratio)
        warmup_steps = math.ceil(warmup_ratio * total_steps)

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / (warmup_steps + 1)
            progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
            return min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))

        super().__init__(optimizer, factor)


class WarmupLinear(LambdaLR):
    """Linear warm-up to the optimizer's learning rate, then a straight line down to a fraction of it.

    Args:
        optimizer: The optimizer.
        total_steps: Optimizer steps of the whole run.
        warmup_ratio: Share of the run that warms up, from 0 to 1.
        min_lr_ratio: Last learning rate as a share of the highest, from 0 to 1.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, warmup_ratio: float = 0.03, min_lr_ratio: float = 0.0
    ) -> None:
        _check_ratio("warmup_ratio", warmup_ratio)
        _check_ratio("min_lr_ratio", min_lr_ratio)
        warmup_steps = math.ceil(warmup_ratio * total_steps)

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / (warmup_steps + 1)
            progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
            return 1.0 - (1.0 - min_lr_ratio) * progress

        super().__init__(optimizer, factor)


def _check_ratio(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is {value}; allowed are numbers from 0 to 1.")
