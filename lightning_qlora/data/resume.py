"""Where training stands in its data, and the check that a resumed run continues in the same data."""

from __future__ import annotations

import hashlib
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException

__all__ = ["TrainingPosition", "check_identity", "gather_states", "hash_arrays"]

STATE_FORMAT = 1


class TrainingPosition:
    """How far training has come, in epochs and batches of one rank.

    It is read from Lightning's own progress, which counts a batch once its step is through, so a batch that was
    fetched ahead or interrupted is not lost. It is restored when the first batch of the resumed epoch is needed.
    """

    def __init__(self) -> None:
        self._resume: tuple[int, int] | None = None

    def state_dict(self, trainer: L.Trainer) -> dict[str, Any]:
        """Return the position as plain values."""
        loop: Any = trainer.fit_loop
        epoch, batch = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current
        finished = epoch.started == epoch.processed  # between two epochs; the batch counters are still the last one's
        return {
            "format": STATE_FORMAT,
            "epoch": epoch.processed,
            "batches_done": 0 if finished else batch.processed,
            "world_size": trainer.world_size,
        }

    def load_state_dict(self, state: dict[str, Any], world_size: int) -> None:
        """Continue at a position.

        Raises:
            MisconfigurationException: If it lies inside an epoch of another number of processes.
        """
        if state["batches_done"] and state["world_size"] != world_size:
            raise MisconfigurationException(
                f"The checkpoint was made in the middle of an epoch by {state['world_size']} processes; this run has "
                f"{world_size}. Resume with {state['world_size']}, or from a checkpoint of the end of an epoch."
            )
        self._resume = (state["epoch"], state["batches_done"])

    def first_batch(self, trainer: L.Trainer | None, epoch: int) -> int:
        """Return how many batches of the epoch are done already.

        Raises:
            MisconfigurationException: If Lightning is about to go on at another batch. It does so after the end of an
                epoch with ``max_steps`` set: ``_FitLoop.restarting`` takes the finished epoch for one to be continued,
                trains a single batch of the next, and skips the others.
        """
        resume, self._resume = self._resume, None
        if resume is None or resume[0] != epoch or trainer is None:
            return 0
        counted = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if counted != resume[1]:
            raise MisconfigurationException(
                f"Lightning resumes epoch {epoch} as if {counted} of its batches were done, but {resume[1]} are. It "
                "does so with trainer.max_steps and a checkpoint of the end of an epoch. Write max_epochs without "
                "max_steps, or resume from a checkpoint that was saved on a training step."
            )
        return resume[1]


def check_identity(saved: dict[str, Any], here: dict[str, Any]) -> None:
    """Check that a checkpoint's batches are those of this run.

    Args:
        saved: ``batches``, a hash that is equal exactly if the batches are, and ``made_of``, what they depend on.
        here: The same of this run.

    Raises:
        MisconfigurationException: If they are not; names what changed.
    """
    if saved["batches"] == here["batches"]:
        return
    changed = [name for name, value in here["made_of"].items() if saved["made_of"].get(name) != value]
    raise MisconfigurationException(
        f"The checkpoint was made with other training batches; changed: {', '.join(changed)}. Give back what was "
        "changed to resume, or start a new run on the new data without ckpt_path."
    )


def hash_arrays(*arrays: npt.NDArray[Any]) -> str:
    """Return a hash of the bytes of the arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(str((array.dtype, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]


def gather_states(own: dict[Any, Any], world_size: int) -> list[dict[Any, Any]]:
    """Return what every rank holds, in the order of the ranks; every rank must call it."""
    if world_size == 1:
        return [own]
    states: list[dict[Any, Any]] = [{} for _ in range(world_size)]
    dist.all_gather_object(states, own)
    return states
