"""How an adapter becomes a published checkpoint; AdapterCheckpoint decides when, and under which name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_qlora.checkpoints.adapter_folder import (
    REQUIRED_FILES,
    find_peft_model,
    gather_adapter_state,
    nonfinite_adapters,
    saved_adapter_state,
    write_adapter_folder,
)
from lightning_qlora.checkpoints.checkpoint_io import TRAINER_FILE, PublishedCheckpointIO
from lightning_qlora.checkpoints.publishing import BackgroundJob, CheckpointStore, Published
from lightning_qlora.checkpoints.run_record import stop_tokens_of, tokenizer_of
from lightning_qlora.ranks import on_rank_zero

__all__ = ["AdapterPublisher", "NonFiniteAdapterError"]


class NonFiniteAdapterError(ValueError):
    """The adapter holds NaN or infinity and is not published."""


class AdapterPublisher:
    """Writes one checkpoint at a time, and has it flushed, published and pruned in a thread.

    The files are the snapshot: once they are written, hidden, training may change what they were written from. All
    ranks call :meth:`start` and :meth:`settle`; rank 0 does the work, and what fails there is raised on every rank.

    Args:
        store: Where checkpoints go.
        io: Writes the resumable half into the staging directory.
    """

    def __init__(self, store: CheckpointStore, io: PublishedCheckpointIO) -> None:
        self.store = store
        self.io = io
        self._is_pending = False  # known to every rank
        self._job: BackgroundJob[tuple[Published, OSError | None]] = BackgroundJob()  # on rank 0

    def start(
        self, trainer: L.Trainer, name: str, describe: Callable[[], dict[str, Any]], prune: Callable[[], None]
    ) -> None:
        """Write the files of a checkpoint where nobody looks for them yet, and begin to publish them.

        Args:
            trainer: Stands between two optimizer steps.
            name: Of the new checkpoint.
            describe: Returns what the manifest is to say; called on rank 0.
            prune: Removes older checkpoints; called in the thread.

        Raises:
            NonFiniteAdapterError: If the adapter holds NaN or infinity.
            OSError: If something could not be written.
        """
        self._refuse_nonfinite(trainer)
        staging = on_rank_zero(trainer, lambda: self.store.begin(name))
        try:
            saved = self._write_trainer_state(trainer, staging)
            state = gather_adapter_state(trainer.lightning_module)
            if state is None:
                state = saved_adapter_state(trainer.lightning_module, saved)
            metadata = on_rank_zero(trainer, lambda: self._write_folder(trainer, staging, state, describe))
        except BaseException:
            if trainer.is_global_zero:
                self.store.abort(staging)
            raise
        self._is_pending = True
        if trainer.is_global_zero:
            self._job.start(lambda: self._publish(staging, name, metadata, prune))

    @property
    def has_finished(self) -> bool:
        """Whether :meth:`settle` would not wait; known to rank 0 only."""
        return self._job.is_done

    def settle(self, trainer: L.Trainer) -> Published | None:
        """Wait for the checkpoint that is being published and return it; ``None`` if none is.

        Raises:
            OSError: If it could not be published.
        """
        if not self._is_pending:
            return None
        self._is_pending = False
        published, not_removed = on_rank_zero(trainer, self._job.take)
        if not_removed is not None:
            rank_zero_warn(f"Old checkpoints in {self.store.root} could not be removed: {not_removed}.")
        return published

    def give_up(self) -> BaseException | None:
        """Wait on this rank alone, because the run has failed otherwise; return what failed here too."""
        self._is_pending = False
        return self._job.take_error()

    def _refuse_nonfinite(self, trainer: L.Trainer) -> None:
        bad = nonfinite_adapters(trainer.lightning_module)
        if trainer.strategy.reduce_boolean_decision(bool(bad), all=False):
            raise NonFiniteAdapterError(
                f"The adapter is not published at step {trainer.global_step}, because it holds NaN or infinity"
                f"{' in ' + ', '.join(bad[:3]) if bad else ' on another rank'}. The checkpoints before it are as they "
                "were. RunGuard stops training before such an update."
            )

    def _write_trainer_state(self, trainer: L.Trainer, staging: Path) -> dict[str, Any]:
        """Return the weights that were written, where Lightning hands them over whole, else nothing."""
        self.io.expect(staging)
        try:
            trainer.save_checkpoint(staging / TRAINER_FILE, weights_only=False)
            on_rank_zero(trainer, self.io.raise_error)
            return self.io.saved_weights
        finally:
            self.io.expect(None)

    def _write_folder(
        self,
        trainer: L.Trainer,
        staging: Path,
        state: Mapping[str, Tensor] | None,
        describe: Callable[[], dict[str, Any]],
    ) -> dict[str, Any]:
        _, model = find_peft_model(trainer.lightning_module)
        tokenizer, stop_token_ids = tokenizer_of(trainer), stop_tokens_of(trainer)
        write_adapter_folder(staging, model, state=state, tokenizer=tokenizer, stop_token_ids=stop_token_ids)
        return describe()

    def _publish(
        self, staging: Path, name: str, metadata: Mapping[str, Any], prune: Callable[[], None]
    ) -> tuple[Published, OSError | None]:
        """Publish what is staged; return also why older checkpoints could not be removed, which costs nothing."""
        # Distributed checkpoints are a directory of that name; their files are in the manifest like any other.
        required = REQUIRED_FILES if (staging / TRAINER_FILE).is_dir() else (*REQUIRED_FILES, TRAINER_FILE)
        try:
            published = self.store.commit(staging, name, metadata, required)
        except BaseException:
            self.store.abort(staging)
            raise
        try:
            prune()
        except OSError as error:
            return published, error
        return published, None
