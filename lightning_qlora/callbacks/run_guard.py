"""Stops a run where going on would lose something: non-finite updates, preemption, exhausted memory."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_qlora.callbacks.checked_step import CheckedStep, Window, describe, has_scaler, named
from lightning_qlora.callbacks.loss_spikes import LossWatch
from lightning_qlora.ranks import gather_objects
from lightning_qlora.signals import SignalFlag, resolve_signals

__all__ = ["PREEMPTED_EXIT_CODE", "NonFiniteError", "RunGuard"]

log = logging.getLogger(__name__)

PREEMPTED_EXIT_CODE = 143
"""128 + SIGTERM: what batch systems read as "stopped from outside, start it again"."""

_TORN_UPDATE = (
    "\nIt ran out in the optimizer's own step: some tensors in memory may be updated and others not, which is the "
    "state of no step, and AdapterCheckpoint does not publish it. Start again from the last checkpoint (ckpt_path: "
    "last) rather than go on with this module. Optimizers with smaller states or steps help, such as PagedAdamW8bit "
    "of bitsandbytes."
)


class NonFiniteError(ValueError):
    """A loss or gradient was NaN or infinite, and training was stopped before the update."""


@runtime_checkable
class _Publisher(Protocol):
    """What RunGuard asks of a checkpoint callback (AdapterCheckpoint)."""

    @property
    def may_publish_now(self) -> bool:
        """Whether training stands between two optimizer steps."""

    def publish(self, trainer: L.Trainer) -> str:
        """Publish now; return the directory."""

    def publish_at_boundary(self, then: Callable[[str], None]) -> None:
        """Publish after the optimizer step that is under way, then call."""


class RunGuard(Callback):
    """Ends a run in good order instead of spoiling it.

    Non-finite numbers: one NaN gradient makes every adapter tensor NaN, whatever the clipping, and a run goes on as
    if nothing had happened. Here the loss and the gradients of each optimizer step are checked together before the
    update; what is not finite ends training with an error that names the rows, saves their batch for a look, and
    leaves the last checkpoint as it was. A GPU with a fused optimizer leaves such an update out by itself, so that no
    step waits for the answer: the error then comes before the next update or checkpoint. (With 16-mixed precision,
    gradients that overflow at a high loss scale are normal; the scaler skips them.)

    Preemption: a signal lets the optimizer step under way finish, on all ranks; then AdapterCheckpoint publishes, and
    the process exits with code 143. Where Lightning requeues SLURM jobs (SLURMEnvironment), its own handler is called
    at that moment instead of in the middle of a step.

    Memory: an out-of-memory error says which batch did not fit and what helps. The batch size is never changed.

    Args:
        on_nonfinite: Stop before the update (stop), or leave the update out and go on (skip).
        max_skips: How many updates of a run may be left out before it stops.
        spike_threshold: Warn when the mean loss of an optimizer step, or the median of the last 8, lies this many
            standard deviations (estimated robustly, on a logarithmic scale) and 0.5 nats per token above the last 64;
            null for no warning.
        signals: Signals that announce the end of the machine.
        report_dir: Where batches with non-finite results are saved; the default is the folder "nonfinite" in the
            trainer's default_root_dir.

    Raises:
        ValueError: If an option is out of its range.
    """

    def __init__(
        self,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        max_skips: int = 3,
        spike_threshold: float | None = 6.0,
        signals: Sequence[str] = ("SIGTERM", "SIGUSR1"),
        report_dir: str | None = None,
    ) -> None:
        super().__init__()
        if on_nonfinite not in ("stop", "skip"):
            raise ValueError(f"on_nonfinite is {on_nonfinite!r}; allowed are stop, skip.")
        if max_skips < 1:
            raise ValueError(f"max_skips is {max_skips}; write 1 or more, or on_nonfinite: stop.")
        if spike_threshold is not None and spike_threshold <= 0:
            raise ValueError(f"spike_threshold is {spike_threshold}; write a positive number, or null.")
        self.on_nonfinite = on_nonfinite
        self.max_skips = max_skips
        self.spike_threshold = spike_threshold
        self.report_dir = report_dir
        self.num_skipped = 0
        """Updates left out so far."""
        self._flag = SignalFlag(resolve_signals(signals))
        self._leaving = False
        self._batch: Any = None
        self._window: Window = []  # the micro-batches of the optimizer step under way, and their loss
        self._pending: CheckedStep | None = None  # the last one, whose numbers are on their way
        self._deciding: Optimizer | None = None  # what may leave an update out by itself
        self._step = 0
        self._is_updating = False
        self._losses = LossWatch(spike_threshold or math.inf)

    # Preemption

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._leaving = False
        self._flag.received = None
        self._losses = LossWatch(self._losses.threshold)
        if stage == "fit" and _publisher(trainer) is None:
            rank_zero_warn(
                "RunGuard finds no AdapterCheckpoint among the callbacks: when it is told to stop, it will end the run "
                "between two optimizer steps without saving."
            )

    @override
    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen(trainer)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen(trainer)
        self._window.clear()
        self._pending = None
        self._step, self._is_updating = trainer.global_step, False
        if self._any_rank_told(trainer):
            self._leave(trainer, None)

    def _listen(self, trainer: L.Trainer) -> None:
        # After Lightning has installed its handlers, in place of them. Its SIGTERM handler exits with code 0, may stop
        # inside a window of accumulated gradients, and starts a collective operation wherever it interrupts. Lightning
        # puts the handlers from before the run back by itself.
        if not self._flag.listen():
            rank_zero_warn("RunGuard runs outside the main thread and cannot notice signals.")
        if trainer.received_sigterm and self._flag.received is None:  # by Lightning, while it made the first loaders
            self._flag.received = signal.SIGTERM

    def _any_rank_told(self, trainer: L.Trainer) -> bool:
        told = self._flag.received is not None
        return trainer.strategy.reduce_boolean_decision(told, all=False) if trainer.world_size > 1 else told

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        at_boundary, self._step = trainer.global_step > self._step, trainer.global_step
        self._is_updating = False
        self._decide_no_more()
        if trainer.world_size == 1:  # several ranks agree once per optimizer step, before the update
            self._leaving = self._flag.received is not None
        if at_boundary and self._leaving:
            self._leave_after_publishing(trainer)

    @override
    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        # A validation may last longer than the grace period. What it has found so far is given up.
        publisher = _publisher(trainer)
        if not _is_validating_in_fit(trainer) or trainer.world_size > 1 or self._flag.received is None:
            return
        if publisher is None:
            self._leave(trainer, None)
        elif publisher.may_publish_now:
            self._leave(trainer, publisher.publish(trainer))

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if _is_validating_in_fit(trainer) and trainer.world_size > 1 and self._any_rank_told(trainer):
            self._leaving = True
            self._leave_after_publishing(trainer)

    def _leave_after_publishing(self, trainer: L.Trainer) -> None:
        publisher = _publisher(trainer)
        if publisher is None:
            self._leave(trainer, None)
        else:
            publisher.publish_at_boundary(lambda directory: self._leave(trainer, directory))

    def _leave(self, trainer: L.Trainer, directory: str | None) -> NoReturn:
        """End the process; all ranks call it at the same step."""
        received = self._flag.received
        name = "a signal to another rank" if received is None else received.name
        saved = f"published {directory}" if directory is not None else "nothing was saved"
        rank_zero_info(
            f"Stopped by {name} at step {trainer.global_step}; {saved}. To go on, run the same command with ckpt_path: "
            f"last. Exit code {PREEMPTED_EXIT_CODE}."
        )
        if received is not None and received != signal.SIGTERM and SLURMEnvironment.detect():
            requeue = self._flag.previous_handler(received)  # Lightning's, which it installs for auto_requeue
            if requeue is not None:
                requeue(received, None)
        trainer.strategy.barrier("RunGuard")
        raise SystemExit(PREEMPTED_EXIT_CODE)

    # Non-finite numbers

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch

    @override
    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        self._batch = batch

    @override
    def on_test_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        self._batch = batch

    @override
    def on_predict_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        self._batch = batch

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._window.append((self._batch, loss.detach()))

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Check the losses and gradients of the step, and ask all ranks whether to go on."""
        window, self._window = self._window, []
        step = CheckedStep(trainer, pl_module, optimizer, window, self._flag.received is not None)
        self.settle()  # the step before
        if self._device_decides(step):
            optimizer.found_inf = step.is_bad  # type: ignore[attr-defined]  # as torch's GradScaler tells it
            self._deciding, self._pending = optimizer, step
        elif self._leaves_out(step):
            for parameter in step.trained:
                parameter.grad = None  # optimizers pass over what has no gradient: no decay, no momentum
        self._is_updating = True

    def _device_decides(self, step: CheckedStep) -> bool:
        return step.device_can_decide()

    def _decide_no_more(self) -> None:
        if self._deciding is not None:
            del self._deciding.found_inf  # type: ignore[attr-defined]
            self._deciding = None

    def settle(self) -> None:
        """Wait for the numbers of the last optimizer step, if they are still on their way, and act on them.

        Raises:
            NonFiniteError: If they are not finite and training is to stop for that.
        """
        step, self._pending = self._pending, None
        if step is not None:
            self._leaves_out(step)  # where it says so, the device has done it

    def _leaves_out(self, step: CheckedStep) -> bool:
        """Say what there is to say of a step; return whether its update is to be left out."""
        verdict = step.verdict()
        self._leaving = verdict.any_told
        if not verdict.is_sound:
            self._warn_or_stop(step)
        elif verdict.loss is not None:
            self._watch_for_spike(step, verdict.loss)
        return not verdict.is_sound

    def _warn_or_stop(self, step: CheckedStep) -> None:
        folder = Path(self.report_dir or Path(step.trainer.default_root_dir) / "nonfinite")
        message = describe(step.number, gather_objects(step.account(folder)))
        if self.on_nonfinite == "skip" and self.num_skipped < self.max_skips:
            self.num_skipped += 1
            rank_zero_warn(f"{message}\nThe update is left out ({self.num_skipped} of at most {self.max_skips}).")
            return
        skipped = f" {self.num_skipped} updates have been left out before." if self.num_skipped else ""
        raise NonFiniteError(
            f"{message}\nTraining stops before the update: adapter and last checkpoint are as they were.{skipped} Look "
            "at these rows; lower the learning rate or raise its warm-up if they are sound. To leave such updates out "
            "and go on, write on_nonfinite: skip."
        )

    def _watch_for_spike(self, step: CheckedStep, loss: float) -> None:
        if self.spike_threshold is None or has_scaler(step.trainer):  # a scaler's losses are scaled
            return
        rise = self._losses.add(loss)
        if rise is None:
            return
        told = f"{rise.loss:.3f}"
        if rise.num_steps > 1:
            told = f"The loss has risen to about {told} over the {rise.num_steps} steps up to step {step.number}"
            rank_zero_warn(f"{told}, from about {rise.before:.3f}. If it stays there, lower the learning rate.")
        else:
            where = f"at step {step.number}, from about {rise.before:.3f}{named(step.rows())}"
            rank_zero_warn(f"The loss jumped to {told} {where}.")

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.settle()

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.settle()

    # Memory

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._decide_no_more()
        if isinstance(exception, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(exception):
            note = _out_of_memory_note(trainer, self._batch)
            if self._is_updating:
                note += _TORN_UPDATE
            exception.add_note(note)
            log.error(note)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._batch = self._pending = None
        self._window.clear()
        self._decide_no_more()

    # State

    @override
    def state_dict(self) -> dict[str, Any]:
        self.settle()  # a checkpoint is being made
        return {"num_skipped": self.num_skipped, "losses": list(self._losses.losses)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_skipped = state_dict["num_skipped"]
        self._losses = LossWatch(self._losses.threshold, state_dict["losses"])


def _publisher(trainer: L.Trainer) -> _Publisher | None:
    return next((c for c in trainer.checkpoint_callbacks if isinstance(c, _Publisher)), None)


def _is_validating_in_fit(trainer: L.Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def _out_of_memory_note(trainer: L.Trainer, batch: Any) -> str:
    lines = [f"Out of memory in {_stage(trainer)} at step {trainer.global_step}: {_batch_size(batch)}."]
    device = trainer.strategy.root_device
    if device.type == "cuda":
        gib = 1024.0**3
        free, total = torch.cuda.mem_get_info(device)
        lines += [
            f"  allocated {torch.cuda.memory_allocated(device) / gib:8.2f} GiB (tensors)",
            f"  reserved  {torch.cuda.memory_reserved(device) / gib:8.2f} GiB (tensors and their gaps)",
            f"  peak      {torch.cuda.max_memory_allocated(device) / gib:8.2f} GiB",
            f"  free      {free / gib:8.2f} GiB of {total / gib:.2f} GiB on {device}",
        ]
    if not trainer.training:
        lines.append("What helps: fewer tokens per batch (data.tokens_per_batch, data.max_length or data.batch_size).")
        return "\n".join(lines)
    lines.append(
        "This step is in no checkpoint, and the last checkpoint is as it was. What helps, in this order: "
        "model.activation_checkpointing: full; fewer tokens per batch (data.tokens_per_batch, data.max_length or "
        "data.batch_size) with trainer.accumulate_grad_batches raised to match, which computes the same update; a "
        "smaller lora.r. If reserved lies far above allocated, set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True."
    )
    return "\n".join(lines)


def _stage(trainer: L.Trainer) -> str:
    stages = {"training": trainer.training, "testing": trainer.testing, "prediction": trainer.predicting}
    return next((name for name, is_on in stages.items() if is_on), "validation")


def _batch_size(batch: Any) -> str:
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        return "a batch of unknown size"
    rows, width = batch["input_ids"].shape[0], batch["input_ids"].shape[-1]
    lengths = batch.get("document_lengths")
    documents = f", {len(lengths)} documents of at most {max(lengths)} tokens" if lengths else ""
    return f"a batch of {rows} x {width} = {rows * width} tokens{documents}"
