"""Processes that tokenise: they import what encodes rows and nothing else, so that they start in about a second.

Those of ``multiprocessing`` import the caller's main module first, with all that a training script needs. These do so
only where the encoder is made of something that the main module defines.
"""

from __future__ import annotations

import copyreg
import gc
import io
import os
import pickle
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from multiprocessing import spawn
from operator import attrgetter
from queue import SimpleQueue
from typing import IO, Any, cast

from lightning_qlora.data.encoding import RowEncoder, StoredChunk
from lightning_qlora.data.lines import JsonLine, ReadRow
from lightning_qlora.environment import WITHOUT_TOKENIZER_THREADS
from lightning_qlora.schema import Completion, Conversation, Message, Origin, PreferenceRow, UnpairedRow

__all__ = ["encode_in_workers", "serve"]

_START = f"""
import pickle, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process too; the one that started it ends it
sys.path[:] = pickle.load(sys.stdin.buffer)
from {__name__} import serve
serve()
"""


def encode_in_workers(
    chunks: Iterable[tuple[int, list[ReadRow]]], encoder: RowEncoder, num_proc: int
) -> Iterator[StoredChunk]:
    """Encode chunks of rows in processes, and yield them in their order.

    At most twice as many chunks as processes are under way, so memory does not grow with the data.

    Args:
        chunks: Rows, and before them the entry of the mix that they belong to.
        encoder: What the processes do with them.
        num_proc: Most processes; no more are started than there are chunks.

    Raises:
        RuntimeError: If a process ends by itself.
    """
    pickled = _pickled(encoder)
    setup = _pickled(_main_module() if b"__main__" in pickled else {}) + pickled
    workers: list[_Worker] = []
    idle: SimpleQueue[_Worker] = SimpleQueue()

    def encode(request: bytes) -> StoredChunk:
        worker = idle.get()
        try:
            return worker.encode(request)
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(num_proc, "encode")  # each waits for one process
    pending: deque[Future[StoredChunk]] = deque()
    try:
        for chunk in chunks:
            if len(workers) < num_proc:
                workers.append(_Worker(setup))
                idle.put(workers[-1])
            pending.append(threads.submit(encode, _pickled(chunk)))
            if len(pending) >= 2 * num_proc:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for worker in workers:
            worker.kill()  # first, because threads may be waiting for it
        threads.shutdown(cancel_futures=True)
        for worker in workers:
            worker.close()


class _Worker:
    """A process that encodes one chunk at a time.

    Args:
        setup: What it reads before its first chunk.
    """

    def __init__(self, setup: bytes) -> None:
        self._setup = setup
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **WITHOUT_TOKENIZER_THREADS},
        )
        self._requests, self._results = cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)
        self._requests.write(_pickled(sys.path))  # fits into the pipe, so nobody waits
        self._requests.flush()

    def encode(self, request: bytes) -> StoredChunk:
        """Have a pickled chunk encoded, and wait for it."""
        try:
            self._requests.write(self._setup + request)
            self._requests.flush()
            self._setup = b""
            result = pickle.load(self._results)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise RuntimeError(
                f"A process that prepares rows has ended by itself (exit code {self._process.wait()}); what it wrote "
                "above says why. Code -9 is what the system does when memory runs out: write a lower num_proc."
            ) from error
        if isinstance(result, StoredChunk):
            return result
        raise result

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()

    def close(self) -> None:
        """Release what is left of a process that was ended."""
        self._process.communicate()


def serve() -> None:
    """Encode the chunks that come through the standard input until it ends: the life of a worker."""
    requests, results = cast(io.BufferedReader, sys.stdin.buffer), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the results
    spawn.prepare(pickle.load(requests))
    encoder: RowEncoder = pickle.load(requests)
    gc.disable()  # it would look through the rows again and again; what a chunk leaves is collected after it
    gc.freeze()
    while requests.peek(1):
        part, rows = pickle.load(requests)
        result: StoredChunk | Exception
        try:
            result = encoder.store(part, rows)
        except Exception as error:  # goes on where the chunk was asked for
            error.add_note(f"In a process that prepares rows:\n{traceback.format_exc()}")
            result = error
        pickle.dump(result, results, pickle.HIGHEST_PROTOCOL)
        results.flush()
        del part, rows, result
        gc.collect()


def _main_module() -> dict[str, Any]:
    """Return what a worker imports the main module with."""
    found = spawn.get_preparation_data("encode")
    return {name: value for name, value in found.items() if name != "authkey"}  # which does not pickle


class _Pickler(pickle.Pickler):
    """Pickles rows in half the time that their own way, which looks up the fields of each anew, takes."""

    dispatch_table = copyreg.dispatch_table.copy()


def _reducer(row_type: type) -> Any:
    values = attrgetter(*(field.name for field in fields(row_type)))
    return lambda row: (row_type, values(row))


for _row_type in (Completion, Conversation, Message, PreferenceRow, UnpairedRow):
    _Pickler.dispatch_table[_row_type] = _reducer(_row_type)
for _tuple_type in (JsonLine, Origin):
    _Pickler.dispatch_table[_tuple_type] = lambda values: (type(values), tuple(values))


def _pickled(value: Any) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(value)
    return stream.getvalue()
