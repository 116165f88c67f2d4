"""Being told by a signal that the machine is about to go away, without being interrupted by it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_qlora.transfers import Readback

__all__ = ["SignalFlag", "resolve_signals", "tell_ranks_without_waiting"]

_TELL = "_broadcast_sigterm_tensor"  # Lightning's method of the training loop


def resolve_signals(names: Iterable[str]) -> tuple[signal.Signals, ...]:
    """Turn names such as ``SIGTERM`` into signals.

    Raises:
        ValueError: If there is no such signal, or it cannot be handled.
    """
    allowed = sorted(s.name for s in signal.Signals if s.name not in ("SIGKILL", "SIGSTOP"))
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise ValueError(f"signals names {', '.join(unknown)}; allowed are {', '.join(allowed)}.")
    return tuple(signal.Signals[name] for name in names)


class SignalFlag:
    """Notes that a signal has come, and does nothing else in its handler: not even a second one interrupts anything.

    Args:
        signals: What to listen to.
    """

    def __init__(self, signals: Iterable[signal.Signals]) -> None:
        self.signals = tuple(signals)
        self.received: signal.Signals | None = None
        """The first signal that came."""
        self._previous: dict[int, Any] = {}
        self._process = 0

    def listen(self) -> bool:
        """Take the signals over; return whether that was possible (only a main thread may)."""
        if threading.current_thread() is not threading.main_thread():
            return False
        self._process = os.getpid()
        for number in self.signals:
            handler = signal.getsignal(number)
            if handler != self._note:
                self._previous[number] = handler
                signal.signal(number, self._note)
        return True

    def previous_handler(self, number: int) -> Callable[[int, FrameType | None], Any] | None:
        """The function that handled a signal before, if one did."""
        handler = self._previous.get(number)
        return handler if callable(handler) and handler is not signal.default_int_handler else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Worker processes of a loader inherit the handler; a signal to the whole group must not end them while the
        # optimizer step that they feed is being finished.
        if os.getpid() == self._process and self.received is None:
            self.received = signal.Signals(number)


def tell_ranks_without_waiting(trainer: L.Trainer) -> None:
    """Let ranks go on while rank 0 tells them whether it has received SIGTERM.

    Before each micro-batch Lightning's loop sends that, and every rank waits for the answer, which comes behind all
    that its GPU still has to do: no rank can prepare what is next. From now on each reads the answer of the micro-batch
    before, which has come by then. All end at the same micro-batch, one later than they would have.

    Args:
        trainer: With several ranks; one that is alone has nobody to tell.
    """
    loop = trainer.fit_loop.epoch_loop
    if hasattr(loop, _TELL):
        setattr(loop, _TELL, _Relay(trainer))


class _Relay:
    """Sends at each call what rank 0 knows, and reads what it sent at the call before.

    Args:
        trainer: Which notes that it received SIGTERM.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self._trainer = trainer
        self._sent: Readback | None = None

    def __call__(self) -> None:
        """Send and read.

        Raises:
            SIGTERMException: On all ranks, if rank 0 had received it at the call before.
        """
        told = torch.full((1,), float(self._trainer.received_sigterm), device=self._trainer.strategy.root_device)
        dist.broadcast(told, src=0)
        before, self._sent = self._sent, Readback(told)
        if before is not None and before.wait().item():
            raise SIGTERMException
