"""What the ranks of a run must agree on, so that none waits for another that has given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import lightning as L
import torch.distributed as dist

__all__ = ["RankZeroError", "gather_objects", "on_rank_zero"]

T = TypeVar("T")


class RankZeroError(RuntimeError):
    """Rank 0 failed at something that this rank depends on."""


def on_rank_zero(trainer: L.Trainer, action: Callable[[], T]) -> T:
    """Do something on rank 0 and give every rank the result; if it fails, all ranks raise.

    Raises:
        RankZeroError: On the other ranks, if rank 0 failed.
    """
    result: Any = None
    error: Exception | None = None
    if trainer.is_global_zero:
        try:
            result = action()
        except Exception as raised:
            error = raised  # raised below, once the other ranks know
    if trainer.world_size > 1:
        message = None if error is None else f"{type(error).__name__}: {error}"
        result, message = trainer.strategy.broadcast((result, message))
        if message is not None and error is None:
            raise RankZeroError(message)
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def gather_objects(value: T) -> list[T]:
    """Return every rank's value, by rank; all ranks must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
