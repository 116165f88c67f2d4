"""The moment between two optimizer steps, the only one that a run can go on from exactly."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_qlora.checkpoints.loop_state import logger_step, set_logger_step
from lightning_qlora.random_state import RandomState, capture_random_state, restore_random_state
from lightning_qlora.ranks import gather_objects

__all__ = ["OptimizerBoundary"]

_RANDOM_STATES = "random_states"
_LOGGER_STEP = "logger_step"


class OptimizerBoundary:
    """Follows training from batch to batch, and knows what belongs to the end of the last optimizer step.

    A checkpoint may be made long after that step: after validation, at the end of the epoch, or of training. What is
    drawn from the random generators in between (seeds for the workers of a loader, samples of a callback) is undone
    before training goes on, and Lightning's loops are recorded as they were right after the step. So it makes no
    difference to a resumed run when its checkpoint was made, or what the interrupted run did afterwards.
    """

    def __init__(self) -> None:
        self.in_batch = False
        """Whether a batch is under way."""
        self.mid_window = False
        """Whether gradients of an unfinished optimizer step are held."""
        self.epoch: int | None = None
        """The epoch of the last batch, counted from 0."""
        self._step = 0
        self._loops: dict[str, Any] | None = None
        self._logger_step: int | None = None
        self._random_state: RandomState | None = None
        self._is_resumed = False

    @property
    def is_here(self) -> bool:
        """Whether training stands between two optimizer steps."""
        return not self.in_batch and not self.mid_window

    def start(self, trainer: L.Trainer) -> None:
        """Training starts, afresh or from a checkpoint."""
        self.in_batch = self.mid_window = False
        self._step = trainer.global_step

    def begin_batch(self, trainer: L.Trainer, batch_idx: int) -> None:
        """Put the random generators where the last batch left them, if an epoch begins or training is resumed."""
        self.in_batch = True
        if self._is_resumed and self._logger_step is not None:
            set_logger_step(trainer, self._logger_step)
        if self._is_resumed or batch_idx == 0:
            self.restore_random_state()
        self._is_resumed = False

    def end_batch(self, trainer: L.Trainer) -> bool:
        """Record the end of a batch; return whether an optimizer step ended with it."""
        self.in_batch = False
        self.epoch = trainer.current_epoch
        self._random_state = capture_random_state()
        self.mid_window = trainer.global_step == self._step
        self._step = trainer.global_step
        if not self.mid_window:
            self._loops = trainer.fit_loop.state_dict()
            self._logger_step = logger_step(trainer) + 1  # Lightning counts the step after this hook
        return not self.mid_window

    def restore_random_state(self) -> None:
        """Put the random generators where the last batch left them."""
        if self._random_state is not None:
            restore_random_state(self._random_state)

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Write the boundary's state into Lightning's checkpoint; all ranks must call it."""
        if _RANDOM_STATES not in checkpoint:
            state = self._random_state if self._random_state is not None else capture_random_state()
            checkpoint[_RANDOM_STATES] = gather_objects(state)
        if self._loops is not None:
            # Resumed from the loops of an epoch's end under max_steps, Lightning would leave out the next epoch.
            checkpoint["loops"] = {**checkpoint["loops"], "fit_loop": self._loops}
            checkpoint[_LOGGER_STEP] = self._logger_step

    def load(self, checkpoint: dict[str, Any], trainer: L.Trainer) -> None:
        """Take the boundary's state from Lightning's checkpoint; it takes effect at the first batch."""
        self._logger_step = checkpoint.get(_LOGGER_STEP)
        states = checkpoint.get(_RANDOM_STATES, [])
        if states and len(states) != trainer.world_size:
            rank_zero_warn(
                f"The checkpoint holds the random states of {len(states)} ranks and this run has {trainer.world_size}: "
                "dropout goes on otherwise than it would have."
            )
        if trainer.global_rank < len(states):
            self._random_state, self._is_resumed = states[trainer.global_rank], True
