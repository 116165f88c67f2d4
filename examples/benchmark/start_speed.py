"""How long the command line takes to its first optimizer step, from a checkpoint that is on this machine.

    python examples/benchmark/peers.py make /tmp/base --shape 8b        # a random checkpoint in bfloat16, 16 GB
    python examples/benchmark/start_speed.py /tmp/base --repeats 3

Each run is `python -m lightning_qlora fit` in a process of its own: it imports, reads the checkpoint and quantises it,
prepares 256 short chats (once; later runs find them), and takes a step. A callback notes when each of it was over, in
seconds since the process was started. Whether the checkpoint is still in the host's memory decides how fast it is read:
right after it was written, it is. Prints one JSON line: what each run noted, and the seconds of all of it in the first
run, which on a fresh machine compiles kernels, and in the median of those behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import torch
from cases import SHAPES
from typing_extensions import override

HERE = Path(__file__).parent
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
_LINE = "start_speed "


class FirstStep(L.Callback):
    """Prints the seconds from the start of the process to the end of its parts."""

    def __init__(self) -> None:
        self.seconds = {"imported_s": self.now()}

    @staticmethod
    def now() -> float:
        """Return the seconds since this process was started."""
        return round(time.time() - psutil.Process().create_time(), 2)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds["built_s"] = self.now()

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        self.seconds.setdefault("first_batch_s", self.now())

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds["first_step_s"] = self.now()
        print(_LINE + json.dumps(self.seconds), flush=True)


def chats(count: int) -> Iterator[dict[str, Any]]:
    """Return short chats, each another one."""
    for i in range(count):
        texts = {"user": f"What is {i} plus {i}?", "assistant": f"It is {2 * i}, as anybody can see."}
        yield {"messages": [{"role": role, "content": text} for role, text in texts.items()]}


def start(checkpoint: str, folder: Path, device: str) -> dict[str, Any]:
    """Run a fit of one step; return what was noted."""
    options = {
        "model.model_name": checkpoint,
        "data.train": folder / "chats.jsonl",
        "data.chat_template": folder / "template.jinja",
        "trainer.accelerator": "gpu" if device == "cuda" else "cpu",
        "trainer.devices": 1,
        "trainer.max_steps": 1,
        "trainer.default_root_dir": folder / "run",
        "trainer.callbacks": "start_speed.FirstStep",
    }
    command = [
        sys.executable,
        "-m",
        "lightning_qlora",
        "fit",
        *(f"--{name}={value}" for name, value in options.items()),
    ]
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "LIGHTNING_QLORA_CACHE": str(folder / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith(_LINE)]
    if not found:
        raise RuntimeError(
            f"No step was taken (exit code {done.returncode}):\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    noted: dict[str, Any] = json.loads(found[0].removeprefix(_LINE))
    return noted


def measure(checkpoint: str, device: str, repeats: int) -> dict[str, Any]:
    """Start so many times, one after the other; return what each noted."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
        lines = (json.dumps(chat) + "\n" for chat in chats(256))
        (folder / "chats.jsonl").write_text("".join(lines), encoding="utf-8")
        runs = [start(checkpoint, folder, device) for _ in range(repeats)]
    first, *later = [run["first_step_s"] for run in runs]
    return {"first_s": first, "later_s": round(statistics.median(later), 2) if later else None, "runs": runs}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a base with a tokenizer")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shape", default="8b", choices=sorted(SHAPES), help="of the checkpoint, which is noted")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print one JSON line."""
    options = parse(sys.argv[1:])
    print(json.dumps({**vars(options), **measure(options.checkpoint, options.device, options.repeats)}), flush=True)


if __name__ == "__main__":
    main()
