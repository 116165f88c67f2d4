"""Publishes adapters, with all that a run needs to go on, as checkpoints that a crash cannot tear."""

from __future__ import annotations

import logging
import os
import time
import uuid
import warnings
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from weakref import proxy

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from typing_extensions import override

from lightning_qlora.callbacks.adapter_publisher import AdapterPublisher, NonFiniteAdapterError
from lightning_qlora.checkpoints.adapter_folder import refuse_base_weights
from lightning_qlora.checkpoints.boundary import OptimizerBoundary
from lightning_qlora.checkpoints.checkpoint_io import (
    TRAINER_FILE,
    PublishedCheckpointIO,
    published_directory,
    read_checkpoints_without_pickle,
    verify_published,
)
from lightning_qlora.checkpoints.identity import refuse_differences
from lightning_qlora.checkpoints.publishing import Published, open_store
from lightning_qlora.checkpoints.relocation import relocated
from lightning_qlora.checkpoints.run_record import describe_run, identify_run
from lightning_qlora.ranks import gather_objects, on_rank_zero
from lightning_qlora.redaction import scrub

__all__ = ["AdapterCheckpoint", "NonFiniteAdapterError"]

log = logging.getLogger(__name__)

_HYPER_PARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters")


class AdapterCheckpoint(ModelCheckpoint):
    """Publishes each checkpoint as one directory that is whole or not there.

    A checkpoint holds the PEFT folder (``adapter_model.safetensors``, ``adapter_config.json``, tokenizer, chat
    template, generation config with the trained stop tokens), which any PEFT program loads, and ``trainer.ckpt``,
    from which ``fit`` goes on: optimizer, schedule, loops, the data module's position and the random states of every
    rank. No file holds base weights. ``manifest.json`` says what was published; ``LATEST`` names the newest.

    ``fit --ckpt_path last`` goes on from the newest checkpoint that is whole, refuses if there are only damaged
    ones, and starts from the beginning if there never was one, which validate, test and predict refuse. A published
    directory may also be named itself, or a run's folder for its newest.

    On a CPU a resumed run is bit for bit the run that was not interrupted, if its data module keeps its position, as
    SFTDataModule does. For that, what validation draws from the random generators does not count.

    Training waits while the files are written, not until they are on the disk: flushing, hashing, publishing and
    pruning go on in a thread (``background``). What fails there ends training at the next batch or, on several ranks,
    at the next checkpoint; the end of training, whatever ends it, waits for the last one.

    On remote file systems (s3://, gs:// and whatever else fsspec knows) the manifest is uploaded last: a kill leaves
    no torn checkpoint, but an upload is only as durable as the service.

    Args:
        dirpath: Where checkpoints are published; the same at every start, so that ``last`` is found. The default is
            the folder "checkpoints" in the trainer's default_root_dir. One run at a time writes there.
        filename: Name of a checkpoint, as for Lightning's ModelCheckpoint: {epoch}, {step} and logged metrics. Two
            callbacks of one trainer need different metrics or names.
        monitor: Logged metric that ranks checkpoints, such as val_loss; null for none.
        mode: Whether the best metric is the least (min) or the greatest (max).
        save_top_k: How many of the best to keep; -1 for all; 0 for none. Without a monitor, 1 or -1.
        save_last: Publish whenever it is time, and at the end of training, also what is not among the best.
        every_n_train_steps: Optimizer steps between checkpoints.
        train_time_interval: Time between checkpoints.
        every_n_epochs: Epochs between checkpoints. Without any of the three: after each validation.
        save_on_train_epoch_end: Whether to publish at the end of the training epoch instead of after validation.
        save_on_exception: Publish when training fails between two optimizer steps (on a single device only).
        keep_at_least: Never fewer whole checkpoints of a run than this, whatever the options above say.
        background: Whether training goes on while a checkpoint is flushed to the disk, hashed and published.
        allow_mismatch: Parts of a checkpoint's identity that may differ when it is loaded: base, quantization,
            adapter, tokenizer, chat_template, data.
        verbose: Say which checkpoint entered the best.
        auto_insert_metric_name: As for Lightning's ModelCheckpoint.

    Raises:
        ValueError: If ``allow_mismatch`` names something else.
        MisconfigurationException: If the options contradict one another, or the module's ``state_dict`` holds the base.
    """

    FILE_EXTENSION = f"/{TRAINER_FILE}"

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        save_last: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        save_on_exception: bool = False,
        keep_at_least: int = 2,
        background: bool = True,
        allow_mismatch: Sequence[str] = (),
        verbose: bool = False,
        auto_insert_metric_name: bool = True,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_last=save_last,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=save_on_train_epoch_end,
            save_on_exception=save_on_exception,
            verbose=verbose,
            auto_insert_metric_name=auto_insert_metric_name,
        )
        if keep_at_least < 1:
            raise MisconfigurationException(f"keep_at_least is {keep_at_least}; write 1 or more (the default is 2).")
        refuse_differences("", {}, {}, allow_mismatch)  # checks the names
        self.keep_at_least = keep_at_least
        self.background = background
        self.allow_mismatch = tuple(allow_mismatch)
        self.last_save_seconds = 0.0
        """How long the last checkpoint kept training waiting."""
        self.last_save_bytes = 0
        """Size of the last checkpoint."""
        self.seconds_waited = 0.0
        """How long the checkpoints of this run kept training waiting, all together."""
        self._publisher = AdapterPublisher(open_store(self.dirpath or "."), PublishedCheckpointIO(TorchCheckpointIO()))
        self._run = ""
        self._identity: dict[str, Any] | None = None
        self._published_step = -1
        self._num_published = 0
        self._started = 0.0
        self._then: Callable[[str], None] | None = None
        self._boundary = OptimizerBoundary()
        self._validated_mid_window = False

    @property
    @override
    def state_key(self) -> str:
        # Without the intervals, so that changing them does not lose which checkpoints are the best.
        return self._generate_state_key(monitor=self.monitor, mode=self.mode, filename=self.filename)

    # Where checkpoints are

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.dirpath = self._root(trainer)
        self._identity = None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)
        self._publisher = AdapterPublisher(open_store(self.dirpath), self._install_io(trainer))
        if stage == "fit":
            self._run = uuid.uuid4().hex
            self._published_step = -1
            self._num_published, self.seconds_waited = 0, 0.0
            self._boundary = OptimizerBoundary()
            if not _is_trial(trainer):
                on_rank_zero(trainer, self._sweep)

    def _root(self, trainer: L.Trainer) -> str:
        # Not the logger's folder, as stock ModelCheckpoint: a new start gets a new version_N there and never finds
        # the checkpoints of the last one.
        return str(self.dirpath or os.path.join(trainer.default_root_dir, "checkpoints"))

    def _install_io(self, trainer: L.Trainer) -> PublishedCheckpointIO:
        io = read_checkpoints_without_pickle(trainer)
        io.check = lambda published: self._check(trainer, published)
        return io

    def _sweep(self) -> None:
        if swept := self._publisher.store.sweep():
            log.info("removed what an interrupted save left in %s: %s", self.dirpath, ", ".join(swept))

    @override
    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:
        """Answer ``ckpt_path="last"``: the newest that is whole, or none if nothing was ever published.

        Only training may start from the beginning then: answers of the bare base are not to pass for a run's.
        """
        newest = self._find_newest(trainer)
        if not newest and trainer.state.fn == TrainerFn.FITTING:
            rank_zero_info(f"There is no checkpoint in {self._root(trainer)} yet: training starts from the beginning.")
        elif not newest and not _finds_last(trainer):
            raise MisconfigurationException(
                f"There is no checkpoint in {self._root(trainer)}, so ckpt_path='last' names nothing to load. Write "
                "the trainer's default_root_dir or the callback's dirpath as in training, or the checkpoint's own "
                "folder as ckpt_path; without ckpt_path the model is taken as it is."
            )
        return newest

    def _find_newest(self, trainer: L.Trainer) -> set[str]:
        newest = open_store(self._root(trainer)).newest_valid()
        return set() if newest is None else {newest.path + self.FILE_EXTENSION}

    def _check(self, trainer: L.Trainer, published: Published) -> None:
        """Refuse to load a checkpoint into another base, quantisation, adapter, tokenizer, template or data set."""
        found = self._identify(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            found = {**found, "data": None}  # an adapter may be tried on any data
        recorded = published.metadata.get("identity", {})
        refuse_differences(f"The checkpoint {published.path!r}", recorded, found, self.allow_mismatch)

    def _identify(self, trainer: L.Trainer) -> dict[str, Any]:
        if self._identity is None:
            self._identity = identify_run(trainer)
        return self._identity

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        refuse_base_weights(pl_module)

    # When to publish: only between optimizer steps

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._boundary.start(trainer)
        self._started = time.monotonic()
        self._validated_mid_window, self._then = False, None
        _agree_on_resume_path(trainer)
        if trainer.ckpt_path is None:
            on_rank_zero(trainer, self._warn_of_another_run)
        else:  # what was just loaded need not be published again
            self._last_global_step_saved = self._published_step = trainer.global_step
            path = trainer.ckpt_path  # of a run's folder, the newest checkpoint was loaded
            directory = published_directory(path) or self._publisher.io.checked or str(path)
            self._last_checkpoint_saved = directory + self.FILE_EXTENSION

    def _warn_of_another_run(self) -> None:
        if found := self._publisher.store.candidates():
            rank_zero_warn(
                f"{self.dirpath} holds {len(found)} checkpoints of another run, and this one starts from the beginning "
                "beside them. To go on from the newest, write ckpt_path: last; else choose another dirpath."
            )

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.world_size == 1 and self._publisher.has_finished:
            self._settle(trainer)  # several ranks would have to talk to one another before each batch
        self._boundary.begin_batch(trainer, batch_idx)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        if not self._boundary.end_batch(trainer):
            return
        if self._validated_mid_window:
            self._validated_mid_window = False
            super().on_validation_end(trainer, pl_module)
        deferred, self._defer_save_until_validation = self._defer_save_until_validation, False
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._may_save_last(trainer) and (self._defer_save_until_validation or _is_ending(trainer)):
            # The metric is not there yet, or the epoch is about to be cut short; either way this state is due.
            self._save_extra(trainer)
        self._defer_save_until_validation |= deferred
        self._publish_as_asked(trainer)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._boundary.restore_random_state()
        if self._boundary.mid_window:
            self._validated_mid_window = True  # publish at the end of the optimizer step that is under way
            return
        super().on_validation_end(trainer, pl_module)
        if self._defer_save_until_validation:  # Lightning forgets about it if validation ends each epoch
            self._defer_save_until_validation = False
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        self._publish_as_asked(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._may_save_last(trainer):
            self._save_extra(trainer)
        waited = time.monotonic()
        self._settle(trainer)
        self.seconds_waited += time.monotonic() - waited
        if self._num_published:
            rank_zero_info(
                f"Published {self._num_published} checkpoints in {self.dirpath}, the last of "
                f"{self.last_save_bytes / 1e6:.1f} MB. Training waited {self.seconds_waited:.1f} s for them, "
                f"{self.seconds_waited / max(time.monotonic() - self._started, 1e-9):.1%} of its time."
            )

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if (
            error := self._publisher.give_up()
        ) is not None:  # the run ends for another reason, which must not be hidden
            log.error("The checkpoint %s was not published: %s", self._last_checkpoint_saved, error)
        if trainer.world_size == 1 and self._boundary.is_here and self._should_save_on_exception(trainer):
            rank_zero_info(f"{type(exception).__name__} was raised; published {self.publish(trainer)}.")

    def publish(self, trainer: L.Trainer) -> str:
        """Publish now, unless this step has been published already; return the directory.

        To be called on all ranks.

        Raises:
            RuntimeError: In the middle of an optimizer step. What an error leaves there, perhaps half updated, is not
                the state of any step.
        """
        if self._published_step != trainer.global_step:
            if not self._boundary.is_here:
                raise RuntimeError(
                    f"The optimizer step after step {trainer.global_step} is not finished, so there is nothing whole "
                    "to publish. Ask may_publish_now first, or use publish_at_boundary."
                )
            self._save_extra(trainer)
        self._settle(trainer)
        return self._last_checkpoint_saved.removesuffix(self.FILE_EXTENSION)

    @property
    def may_publish_now(self) -> bool:
        """Whether training stands between two optimizer steps."""
        return self._boundary.is_here

    def publish_at_boundary(self, then: Callable[[str], None]) -> None:
        """Publish when the optimizer step that is under way is done and all other callbacks have seen it.

        Args:
            then: Called with the published directory; it may raise to end training.
        """
        self._then = then

    def _publish_as_asked(self, trainer: L.Trainer) -> None:
        if self._then is not None:
            then, self._then = self._then, None
            then(self.publish(trainer))

    def _may_save_last(self, trainer: L.Trainer) -> bool:
        skip = _is_trial(trainer) or trainer.state.fn != TrainerFn.FITTING
        return bool(self.save_last) and not skip and self._published_step != trainer.global_step

    @override
    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        if self._may_save_last(trainer):
            self._save_extra(trainer)

    @override
    def _save_last_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Do nothing: each checkpoint is the last when it is published, and ``LATEST`` names it."""

    def _save_extra(self, trainer: L.Trainer) -> None:
        """Publish a state for its being recent, not for being among the best."""
        candidates = self._monitor_candidates(trainer)
        if self.monitor is None and self.save_top_k != 0:
            super()._save_none_monitor_checkpoint(trainer, candidates)
            return
        saved = self._last_global_step_saved
        self._save_checkpoint(trainer, self._get_metric_interpolated_filepath_name(candidates, trainer))
        self._last_global_step_saved = saved  # it may still turn out to be among the best

    @override
    def _monitor_candidates(self, trainer: L.Trainer) -> dict[str, Tensor]:
        candidates = super()._monitor_candidates(trainer)
        if "epoch" not in trainer.callback_metrics and self._boundary.epoch is not None:
            # The epoch of the last step; the trainer counts on before the end of training is published.
            candidates["epoch"] = torch.tensor(self._boundary.epoch)
        return candidates

    # Names

    @override
    def format_checkpoint_name(
        self,
        metrics: dict[str, Tensor],
        filename: str | None = None,
        ver: int | None = None,
        prefix: str | None = None,
    ) -> str:
        path = super().format_checkpoint_name(metrics, filename, ver, prefix)
        root = f"{self.dirpath}{os.sep}" if self.dirpath else ""
        name = path.removeprefix(root).removesuffix(self.FILE_EXTENSION)
        return root + name.replace("/", "_") + self.FILE_EXTENSION  # a metric may be called val/loss

    @override
    def _get_metric_interpolated_filepath_name(
        self, monitor_candidates: dict[str, Tensor], trainer: L.Trainer, del_filepath: str | None = None
    ) -> str:
        # A published directory is never written again, not even one that is about to go.
        return super()._get_metric_interpolated_filepath_name(monitor_candidates, trainer, None)

    @override
    def file_exists(self, filepath: str | Path, trainer: L.Trainer) -> bool:
        self._settle(trainer)
        return super().file_exists(str(filepath).removesuffix(self.FILE_EXTENSION), trainer)

    # Publishing

    @override
    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        started = time.monotonic()
        self._settle(trainer)
        kept = {_name(path) for path in (filepath, *self.best_k_models)}
        self._publisher.start(trainer, _name(filepath), lambda: self._describe(trainer), lambda: self._prune(kept))
        self._last_global_step_saved = self._published_step = trainer.global_step
        self._last_checkpoint_saved = self.last_model_path = filepath
        if not self.background:
            self._settle(trainer)
        self.last_save_seconds = time.monotonic() - started
        self.seconds_waited += self.last_save_seconds

    def _settle(self, trainer: L.Trainer) -> None:
        """Wait for the checkpoint that is being published, if one is; all ranks call it, and raise if it failed."""
        published = self._publisher.settle(trainer)
        if published is None:
            return
        self._num_published += 1
        self.last_save_bytes = published.num_bytes
        log.info("published %s: %.1f MB", published.path, published.num_bytes / 1e6)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    def _describe(self, trainer: L.Trainer) -> dict[str, Any]:
        record = describe_run(trainer)
        record["epoch"] = trainer.current_epoch if self._boundary.epoch is None else self._boundary.epoch
        return {**record, "monitor": self.monitor, "run": self._run, "callback": self.state_key} | {
            "identity": self._identify(trainer)
        }

    # Pruning

    @override
    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        """Leave it to :meth:`_prune`, which looks at what there is instead of at what this process remembers."""

    def _prune(self, kept: Collection[str]) -> None:
        if self.save_top_k == -1:
            return
        mine = [p for p in self._publisher.store.published() if self._is_mine(p)]
        doomed = [p.name for p in mine if p.name not in kept]
        # A step that was published before its validation and again after it counts once.
        self._publisher.store.prune(doomed, self.keep_at_least, {p.name for p in mine}, _step_of)

    def _is_mine(self, published: Published) -> bool:
        return (published.metadata.get("run"), published.metadata.get("callback")) == (self._run, self.state_key)

    # State

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "run": self._run, "dirpath": str(self.dirpath)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._run = state_dict.get("run", self._run)
        here = str(self.dirpath)
        super().load_state_dict(relocated(state_dict, here, self._fs.exists, self.mode, self.save_top_k))

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # Not in state_dict, which only a callback with the same options gets back.
        self._boundary.save(checkpoint)
        for key in _HYPER_PARAMETERS:
            if key in checkpoint:
                checkpoint[key] = scrub(checkpoint[key])

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # Sharded strategies read checkpoints by themselves, not through the plugin.
        directory = published_directory(trainer.ckpt_path) if trainer.ckpt_path is not None else None
        if directory is not None and self._publisher.io.checked != directory:
            self._check(trainer, verify_published(directory))
        if trainer.state.fn == TrainerFn.FITTING:
            self._boundary.load(checkpoint, trainer)


def _agree_on_resume_path(trainer: L.Trainer) -> None:
    """Each rank has looked for the newest checkpoint by itself; refuse if they found different ones."""
    paths = gather_objects(None if trainer.ckpt_path is None else str(trainer.ckpt_path))
    if len(set(paths)) > 1:
        found = "\n".join(f"  rank {rank}: {path}" for rank, path in enumerate(paths))
        raise MisconfigurationException(
            f"The ranks found different checkpoints to go on from:\n{found}\nWrite a dirpath that all machines share."
        )


def _finds_last(trainer: L.Trainer) -> bool:
    """Whether any callback, of this kind or of Lightning's own, has what ``ckpt_path="last"`` may mean."""
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    return any(
        c._find_newest(trainer) if isinstance(c, AdapterCheckpoint) else c._find_last_checkpoints(trainer)
        for c in callbacks
    )


def _is_ending(trainer: L.Trainer) -> bool:
    """Whether training ends here, in the middle of an epoch or not."""
    return trainer.should_stop or trainer.global_step == trainer.max_steps


def _is_trial(trainer: L.Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _step_of(published: Published) -> Any:
    return published.metadata.get("step", published.name)


def _name(filepath: str) -> str:
    """The published directory's name, from the path of the ``trainer.ckpt`` in it."""
    return PurePosixPath(filepath.replace(os.sep, "/")).parent.name
