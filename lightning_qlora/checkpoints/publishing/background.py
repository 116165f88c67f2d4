"""Doing the slow half of a save beside training."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

__all__ = ["BackgroundJob"]

T = TypeVar("T")


class BackgroundJob(Generic[T]):
    """At most one job in a thread, whose outcome is kept until it is asked for.

    The thread is no daemon: the interpreter does not exit before the job is done. Without a job there is no thread,
    so that what holds this can be copied and sent to other processes.
    """

    def __init__(self) -> None:
        self._future: Future[T] | None = None

    def start(self, action: Callable[[], T]) -> None:
        """Begin; the outcome of the job before must have been taken."""
        assert self._future is None, "the last job's outcome was not taken"
        executor = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._future = executor.submit(action)
        executor.shutdown(wait=False)  # the thread ends with its job

    @property
    def is_done(self) -> bool:
        """Whether there is an outcome to take, so that taking it does not wait."""
        return self._future is not None and self._future.done()

    def take(self) -> T:
        """Wait for the job; return what it returned, or raise what it raised."""
        return self._finished().result()

    def take_error(self) -> BaseException | None:
        """Wait for the job if there is one; return what it raised."""
        return None if self._future is None else self._finished().exception()

    def _finished(self) -> Future[T]:
        assert self._future is not None, "there is no job"
        wait([self._future])  # interrupted here, by Ctrl-C, the outcome can still be taken
        future, self._future = self._future, None
        return future
