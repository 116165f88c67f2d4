"""Several ranks on one machine: forked processes that talk over gloo, as torchrun would start them."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def run_ranks(folder: Path, target: Callable[[], Any], *, ranks: int = 2, timeout: float = 60.0) -> list[Any]:
    """Call a function on each rank; return what each returned, or raise with the traceback of the first that failed.

    Results are tensors and plain values. Lightning learns its rank from the environment.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_on_rank, args=(r, ranks, port, folder, target)) for r in range(ranks)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
        if any(p.exitcode for p in processes):  # the others may wait for it for ever
            deadline = min(deadline, time.monotonic() + 10)
        time.sleep(0.02)
    hanging = [r for r, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    failed = [path.read_text() for r in range(ranks) if (path := folder / f"{r}.error").exists()]
    assert not failed, failed[0]
    assert not hanging, f"ranks {hanging} wait for ever"
    return [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(ranks)]


def _on_rank(rank: int, ranks: int, port: int, folder: Path, target: Callable[[], Any]) -> None:
    os.environ.update(_environment(rank, ranks, port))
    os.setpgid(0, 0)  # signals to the test are not for it
    try:
        torch.save(target(), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)


def _environment(rank: int, ranks: int, port: int, hosts: int = 1) -> dict[str, str]:
    """What torchrun tells a process, of which each host has as many."""
    local = ranks // hosts
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank % local), "GROUP_RANK": str(rank // local),
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Processes:
    """A script that runs on each rank, in interpreters of its own: a process that has used a GPU cannot be forked.

    Args:
        script: Called with the folder and one argument of JSON; it writes its result to ``RANK.pt`` in the folder.
        folder: Where results and output go.
        settings: Plain data.
        ranks: Processes.
        hosts: Ranks of several hosts have the same local ranks, and so the same device of the one that they run on.
    """

    def __init__(self, script: str, folder: Path, settings: dict[str, Any], *, ranks: int, hosts: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.port = folder, _free_port()
        self.running = [self._start(script, settings, rank, ranks, hosts) for rank in range(ranks)]

    def _start(
        self, script: str, settings: dict[str, Any], rank: int, ranks: int, hosts: int
    ) -> subprocess.Popen[bytes]:
        tests = Path(__file__).parent
        path = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, **_environment(rank, ranks, self.port, hosts), "PYTHONPATH": path}
        with (self.folder / f"{rank}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, script, str(self.folder), json.dumps(settings)],
                env=environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def failures(self, *, timeout: float) -> list[str]:
        """Wait for all of them, or for the first that fails; return how those ended that failed, or nothing."""
        deadline = time.monotonic() + timeout
        while any(p.poll() is None for p in self.running) and not any(p.poll() for p in self.running):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        codes = [process.poll() for process in self.running]
        self.end()
        ends = [
            f"rank {rank} {'had no end' if code is None else f'ended with {code}'}" for rank, code in enumerate(codes)
        ]
        logs = [(self.folder / f"{rank}.log").read_text()[-4000:] for rank in range(len(codes))]
        return [f"{end}:\n{log}" for end, log, code in zip(ends, logs, codes, strict=True) if code != 0]

    def results(self) -> list[Any]:
        """Return what each has written."""
        return [torch.load(self.folder / f"{rank}.pt", weights_only=True) for rank in range(len(self.running))]

    def end(self) -> None:
        """Leave no process behind."""
        for process in self.running:
            process.kill()
            process.wait()
