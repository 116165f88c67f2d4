"""Several ranks on one machine: forked processes that talk over gloo, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import socket
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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
    os.environ.update(
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        | {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    )
    os.setpgid(0, 0)  # signals to the test are not for it
    try:
        torch.save(target(), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)
