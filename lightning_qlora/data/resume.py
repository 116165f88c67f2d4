"""Where training stands in its data, and the check that a resumed run continues in the same data."""

from __future__ import annotations

import hashlib
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_qlora.checkpoints.loop_state import count_batches

__all__ = ["TrainingPosition", "check_identity", "gather_states", "hash_arrays"]

STATE_FORMAT = 1


class TrainingPosition:
    """How far training has come, in epochs and batches of one rank.

    It is read from Lightning's own counters (:mod:`lightning_qlora.checkpoints.loop_state`), and restored when the
    first batch of the resumed epoch is needed.
    """

    def __init__(self) -> None:
        self._epoch = 0
        self._resume: tuple[int, int] | None = None

    def state_dict(self, trainer: L.Trainer) -> dict[str, Any]:
        """Return the position as plain values: the epoch of the next batch, and the batches of it done before."""
        position = self._resume
        if position is None:
            counts = count_batches(trainer)
            position = (self._epoch + 1, 0) if counts.epoch_finished else (self._epoch, counts.done)
        return {
            "format": STATE_FORMAT,
            "epoch": position[0],
            "batches_done": position[1],
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

    def begin(self, trainer: L.Trainer | None, epoch: int) -> int:
        """Begin an epoch; return how many of its batches are done already.

        Raises:
            MisconfigurationException: If Lightning is about to go on at another batch than the next one.
        """
        resume, self._resume, self._epoch = self._resume, None, epoch
        if resume is None or trainer is None:
            return 0
        started = count_batches(trainer).started
        if resume != (epoch, started):
            raise MisconfigurationException(
                f"The checkpoint was saved before batch {resume[1]} of epoch {resume[0]}, and "
                f"{_what_happens_instead(trainer, resume, (epoch, started))}"
            )
        return resume[1]


def _what_happens_instead(trainer: L.Trainer, resume: tuple[int, int], here: tuple[int, int]) -> str:
    """Say why Lightning does not go on where a checkpoint was saved, and what to do about it."""
    if resume[1] >= trainer.num_training_batches:
        return (
            f"an epoch of this run has only {trainer.num_training_batches} batches. Give back limit_train_batches, "
            "overfit_batches or fast_dev_run as they were then, or resume from a checkpoint of the end of an epoch."
        )
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        return "overfit_batches trains on other batches. Resume without it, or begin with it without ckpt_path."
    if here == (0, 0):
        return (
            "training begins before that is restored, as LearningRateFinder and BatchSizeFinder begin it. Resume "
            "without them; the rate and the batches are the checkpoint's in any case."
        )
    return (
        f"Lightning goes on with batch {here[1]} of epoch {here[0]}: rows would be lost or repeated. Call "
        "lightning_qlora.checkpoints.loop_state.repair_loops(checkpoint) in your module's on_load_checkpoint, as "
        "SFTModule does."
    )


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
