"""Where Lightning's training loop stands: read exactly, and corrected where a checkpoint says it wrongly.

The one place that knows the counters of ``trainer.fit_loop``. Data modules read their position from here; modules
call :func:`repair_loops` in ``on_load_checkpoint``, the one public hook that sees the counters before Lightning does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import lightning as L

__all__ = ["BatchCounts", "count_batches", "logger_step", "repair_loops", "set_logger_step"]


class BatchCounts(NamedTuple):
    """The training batches of one rank.

    Attributes:
        started: Batches of this epoch that were begun.
        done: Batches of this epoch whose step is through.
        total: Batches of the whole run whose step is through.
        epoch_finished: Whether the last batch of the epoch is through.
    """

    started: int
    done: int
    total: int
    epoch_finished: bool


def count_batches(trainer: L.Trainer) -> BatchCounts:
    """Return how far the training loop has come.

    A batch counts once its step is through, so one that was fetched ahead, or whose step failed, does not. In
    ``on_train_batch_end``, where checkpoints are saved, it is.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    current = progress.current
    finished = progress.is_last_batch and current.processed == current.ready > 0
    return BatchCounts(current.ready, current.processed, progress.total.processed, finished)


def logger_step(trainer: L.Trainer) -> int:
    """Return the number of batches that ended an optimizer step, by which loggers count; it grows after their hooks."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def set_logger_step(trainer: L.Trainer, step: int) -> None:
    """Correct what loggers count by.

    Lightning 2.6 counts one too many when it resumes at the start of an epoch, under ``max_steps`` and with validation:
    it passes through the loop once without a batch, and counts that.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def repair_loops(checkpoint: dict[str, Any]) -> None:
    """Correct the loop counters of a checkpoint, in place, so that Lightning goes on with the right batch.

    Lightning 2.6 resumes wrongly from three kinds of checkpoint:

    - saved on the last training batch of an epoch: the next epoch is trained without being counted as started, so
      every checkpoint within it, and within later ones, is taken for one of a finished epoch, and resuming from it
      begins that epoch again;
    - saved at the end of an epoch, with ``max_steps`` set: the finished epoch is taken for one to be continued; a
      single batch of the next is trained as its last, and the others are skipped;
    - saved when ``max_steps`` ended the run inside an epoch, to be resumed with more steps: the rest of that epoch is
      counted as the next one.

    The first two become the beginning of the next epoch, the third the middle of its own.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop")
    if loops is None:
        return
    epoch, batch = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    current = batch["current"]
    epoch_closed = epoch["current"]["processed"] == epoch["current"]["started"] > 0
    all_batches_done = batch["is_last_batch"] and current["processed"] == current["ready"] > 0
    on_last_batch = all_batches_done and current["completed"] == current["processed"] - 1
    if on_last_batch and not epoch_closed:
        batch["total"]["completed"] = batch["total"]["processed"]
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1  # Lightning does it after saving
    if epoch_closed and not all_batches_done and current["ready"] > 0:
        for count in (epoch["total"], epoch["current"]):
            count["processed"] = count["completed"] = count["started"] - 1
    elif on_last_batch or epoch_closed:
        _begin_next_epoch(loops)


def _begin_next_epoch(loops: dict[str, Any]) -> None:
    """Set the counters to what they are when Lightning is about to start an epoch in an uninterrupted run."""
    epoch, batch = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    for count in (epoch["total"], epoch["current"]):
        count["processed"] = count["completed"] = count["started"]
    batch["is_last_batch"] = False
    optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    current = [batch, loops["epoch_loop.scheduler_progress"], optimizer["step"], optimizer["zero_grad"]]
    for counts in (
        *(progress["current"] for progress in current),
        loops["epoch_loop.val_loop.batch_progress"]["total"],
    ):
        for name in counts:
            counts[name] = 0
