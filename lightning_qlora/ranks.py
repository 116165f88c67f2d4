"""What the ranks of a run must agree on, so that none waits for another that has given up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import lightning as L
import torch.distributed as dist
from torch import Tensor

__all__ = ["RankError", "RankZeroError", "add_up", "agree", "gather_objects", "on_rank_zero", "together"]

T = TypeVar("T")


class RankError(RuntimeError):
    """Another rank failed at something that all ranks do together."""


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


def add_up(numbers: Tensor) -> Tensor:
    """Return the sums over all ranks, which all must ask for; a GPU's are on their way then.

    A strategy's ``reduce`` lets the host wait for all that its GPU has been given before, by a barrier.

    Args:
        numbers: Of any shape, on the device of the ranks' backend; overwritten.
    """
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(numbers)
    return numbers


@contextmanager
def together() -> Iterator[None]:
    """Do something on all ranks; where one fails, all the others raise at once, with its message.

    Ranks that wait for one another inside the context call :func:`agree` each time before they do.

    Raises:
        RankError: On the ranks that did not fail themselves.
    """
    try:
        yield
    except RankError:  # every rank has been told
        raise
    except Exception as error:
        agree(error)
        raise
    else:
        agree()


def agree(error: Exception | None = None) -> None:
    """Tell the other ranks that this one has come so far, or why it comes no further; all ranks must call it.

    Raises:
        RankError: If others have failed, and this one has not.
    """
    messages = gather_objects(None if error is None else f"{type(error).__name__}: {error}")
    failed = [f"Rank {rank} failed: {message}" for rank, message in enumerate(messages) if message is not None]
    if failed and error is None:
        raise RankError("\n".join(failed))
