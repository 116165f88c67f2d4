"""How training scales over the GPUs of a machine: tokens/s, memory of each GPU, efficiency, and resuming on fewer.

    python examples/benchmark/scaling.py                         # 1, 2, 4, 8, ... and all GPUs of this machine
    python examples/benchmark/scaling.py --devices 2 4 --only fsdp --out results.jsonl
    python examples/benchmark/scaling.py --shape 8b --peers /tmp/base --steps 12 --warmup 4        # TRL beside it
    python examples/benchmark/scaling.py --shape 8b --only fsdp --devices 2 --cap_gib 6 --tokens_per_batch 2048
    python examples/benchmark/scaling.py --shape tiny --accelerator cpu --devices 1 2     # two gloo processes

Measured are DDP of an 8B shape, once on packed chat rows (lengths lognormal(6.0, 0.8), clipped to 32..2048) and once on
full rows of 2048 tokens, and FSDP of a 70B shape on full rows. Bases are NF4 with random weights, quantised on the
device from the shape's configuration, so that nothing is downloaded; speed and memory do not depend on their values.
60 % of the tokens are supervised; LoRA of rank 16 on all linear layers; each rank has as many micro-batches.

Each case runs in processes of its own. At last the largest case of the last strategy publishes a checkpoint that half
as many devices go on from. With ``--peers`` each case is followed by TRL's on as many rows of the same kind
(peers.py, which says how it is set up), from a checkpoint on disk that is made where there is none.

One JSON line a case, which report.py draws, then its tables. ``start_seconds`` is from the start of a process, imports
included, to the first step; own runs make their base meanwhile, TRL reads and quantises its own.
``peak_memory_gib`` is the peak of each rank's steps, ``start_peak_gib`` that of all before.
Where a case fails, its line says why; the others are measured all the same, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from cases import SHAPES, SHRUNK
from report import failures, several_gpus

HERE = Path(__file__).parent
ROW = 2048
WARMUP = 10
_PEER_CASES = {"chat": "chat2k_pack", "full": "full2k"}
_RAISED = re.compile(r"^(?:\[rank\d+\]:\s*)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        trainer: ``lightning_qlora`` or ``trl``.
        strategy: ``ddp`` or ``fsdp``; on one device there is none.
        shape: A name of ``cases.SHAPES``.
        rows: ``chat`` or ``full``.
        devices: Processes, one for each device.
        accelerator: ``gpu`` or ``cpu``.
        steps: Optimizer steps that are measured, after the warm-up.
        warmup: Optimizer steps before them.
        tokens_per_batch: Of each rank's micro-batch, which is its whole step.
        cap_gib: GiB that torch may take of each GPU, from the start; ``None`` for all.
        folder: Where to publish at the end; ``None`` for nowhere.
        resume: Go on from what is published there, for an epoch more.
    """

    trainer: str
    strategy: str
    shape: str
    rows: str
    devices: int
    accelerator: str
    steps: int
    warmup: int
    tokens_per_batch: int
    cap_gib: float | None = None
    folder: str | None = None
    resume: bool = False

    @property
    def command(self) -> str:
        """What measures this case alone, and tells it from others."""
        if self.trainer == "trl":
            return shell(["torchrun", f"--nproc-per-node={self.devices}", *peer_words(self, "CHECKPOINT")])
        options = {
            "only": self.strategy, "shape": self.shape, "rows": self.rows, "devices": self.devices,
            "accelerator": self.accelerator, "steps": self.steps, "warmup": self.warmup,
            "tokens_per_batch": self.tokens_per_batch, "cap_gib": self.cap_gib,
        }  # fmt: skip
        words = [word for name, value in options.items() if value is not None for word in (f"--{name}", value)]
        if self.folder is None:
            return shell(["scaling.py", *words, "--no-resume"])
        return shell(["scaling.py", *words, "#", "resumed" if self.resume else "saved"])


def shell(words: Sequence[object]) -> str:
    return " ".join(map(str, words))


def peer_words(case: Case, checkpoint: str) -> list[str]:
    """Return the command line of a case that is TRL's: as many rows of each rank as one GPU would have."""
    row = min(ROW, case.tokens_per_batch)
    options = {
        "strategy": case.strategy, "shape": case.shape, "device": "cuda" if case.accelerator == "gpu" else "cpu",
        "steps": case.steps, "warmup": case.warmup, "rows": case.tokens_per_batch // row,
        "max_length": row * (SHRUNK if case.shape == "tiny" else 1), "cap_gib": case.cap_gib,
    }  # fmt: skip
    words = [str(word) for name, value in options.items() if value is not None for word in (f"--{name}", value)]
    return ["peers.py", "run", "trl", _PEER_CASES[case.rows], checkpoint, *words]


def launch(case: Case, checkpoint: str | None = None, timeout_s: float = 900, repetition: int = 0) -> dict[str, Any]:
    """Run one case in processes of its own; what goes wrong there is part of the record.

    Args:
        case: What to run.
        checkpoint: The folder that TRL loads.
        timeout_s: Seconds after which all processes are ended.
        repetition: The round that the record is of.
    """
    print(f"{case.command} ...", file=sys.stderr, flush=True)
    begun = time.monotonic()
    fields = asdict(case)
    saves = fields["folder"] is not None
    record = {"round": repetition, "group": "scaling", "command": case.command, **fields, "saves": saves}
    del record["folder"]
    if case.trainer == "trl":
        script, *words = peer_words(case, str(checkpoint))
    else:
        script, words = "scaling_rank.py", [json.dumps(fields)]
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.devices}"]
    found = _measure([*ranks, str(HERE / script), *words], timeout_s)
    took = {"took_s": round(time.monotonic() - begun, 1)}
    return record | took | (_as_own(found) if case.trainer == "trl" and "failed" not in found else found)


def _measure(command: list[str], timeout_s: float) -> dict[str, Any]:
    """Return the line that a command prints, or why there is none."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            said, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            ranks = psutil.Process(process.pid).children(recursive=True)  # torchrun's sessions are not its own
            for each in (process, *ranks):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            psutil.wait_procs(ranks, timeout=10)  # until what they hold is free for the next case
            return {"failed": f"more than {timeout_s:g} s: {process.communicate()[1][-300:]}"}
    lines = [line for line in said.splitlines() if line.startswith("{")]
    if process.returncode == 0 and lines:
        return json.loads(lines[-1])  # type: ignore[no-any-return]
    # Killed from outside, a process has said nothing; torchrun says by which signal.
    raised = [reason for reason in _RAISED.findall(errors) if "ChildFailedError" not in reason]
    return {"failed": raised[0] if raised else errors[-500:]}


def _as_own(found: dict[str, Any]) -> dict[str, Any]:
    """Give figures of peers.py the names of own ones."""
    return {
        "tokens_per_second": found["tok_s"],
        "step_seconds": round(found["mean_step_ms"] / 1000, 4),
        "peak_memory_gib": found["peak_gib"],
        "start_peak_gib": found["start_peak_gib"],
        "start_seconds": found["start_s"],
        **{name: found[name] for name in ("device_name", "torch", "transformers", "peft", "trl", "accelerate")},
    }


def plan(options: argparse.Namespace) -> list[Case]:
    """Return the cases to run, in order."""
    cases = []
    if options.only != "fsdp":
        for rows in options.rows or ("chat", "full"):
            cases += [_case(options, "ddp", rows, n) for n in options.devices]
    if options.only != "ddp":
        for rows in options.rows or ("full",):
            cases += [_case(options, "fsdp", rows, n) for n in options.devices if n > 1]
    return [each for case in cases for each in (case, *_beside(case, options))]


def _beside(case: Case, options: argparse.Namespace) -> list[Case]:
    """Return TRL's case beside an own one, where there is one: accelerate has FSDP for GPUs only."""
    if options.peers is None or (case.accelerator, case.strategy) == ("cpu", "fsdp"):
        return []
    return [replace(case, trainer="trl")]


def resuming(options: argparse.Namespace, folder: str) -> list[Case]:
    """Return the cases that publish on the most devices and go on with half of them."""
    most = max(options.devices)
    if most < 2 or not options.resume:
        return []
    few: dict[str, Any] = {"steps": 2, "folder": folder}
    strategy, rows = options.only or "fsdp", (options.rows or ("full",))[-1]
    return [
        _case(options, strategy, rows, most, **few),
        _case(options, strategy, rows, most // 2, **few, resume=True),
    ]


def _case(options: argparse.Namespace, strategy: str, rows: str, devices: int, **more: Any) -> Case:
    shape = options.shape or {"ddp": "8b", "fsdp": "70b"}[strategy]
    names = ("accelerator", "steps", "warmup", "tokens_per_batch", "cap_gib")
    common = {name: getattr(options, name) for name in names}
    return Case("lightning_qlora", strategy, shape, rows, devices, **{**common, **more})


def device_counts(available: int) -> list[int]:
    """Return what is measured unless told otherwise: powers of two, and all there are."""
    return sorted({2**i for i in range(available.bit_length())} | {available} if available else set())


def parse(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpus = torch.cuda.device_count()
    counts = device_counts(gpus)
    parser.add_argument("--devices", type=int, nargs="+", help=f"numbers of devices; here {counts}, or 1 2 on CPUs")
    parser.add_argument("--accelerator", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--shape", choices=SHAPES, help="one for all cases, instead of 8b for DDP and 70b for FSDP")
    parser.add_argument("--only", choices=("ddp", "fsdp"), help="one strategy; fsdp takes two devices and more")
    parser.add_argument("--rows", choices=("chat", "full"), nargs="+", help="for FSDP full, for DDP both if left out")
    parser.add_argument("--steps", type=int, default=40, help="measured steps")
    parser.add_argument("--warmup", type=int, default=WARMUP, help="steps before them")
    parser.add_argument(
        "--tokens_per_batch", type=int, default=8192, help="of each device's micro-batch, its whole step"
    )
    parser.add_argument("--cap_gib", type=float, help="GiB that torch may take of each GPU, from the start")
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True,
        help="also save on the most devices and go on with half of them",
    )  # fmt: skip
    parser.add_argument(
        "--peers", metavar="CHECKPOINT",
        help="also TRL, from a random checkpoint in this folder, made if there is none (8b: 16 GB); all cases are of "
        "one shape then, 8b unless --shape says another",
    )  # fmt: skip
    parser.add_argument("--round", type=int, default=0, help="which repetition this is; the page shows medians")
    parser.add_argument("--timeout_s", type=float, default=900, help="of one case")
    parser.add_argument("--out", type=Path, help="also add the JSON lines to this file, each as it comes")
    options = parser.parse_args(args)
    options.devices = sorted(set(options.devices or ([1, 2] if options.accelerator == "cpu" else counts or [1])))
    if options.accelerator == "gpu" and options.devices[-1] > gpus:
        parser.error(
            f"--devices {options.devices[-1]}: the GPUs of this machine are {gpus}. To see that everything runs, write "
            "--accelerator cpu --shape tiny --tokens_per_batch 256, which takes processes instead."
        )
    if options.only == "fsdp" and options.devices[-1] < 2:
        parser.error("--only fsdp: it shares a model among devices, two at least. Write --devices 2 or more.")
    if options.accelerator == "cpu" and options.cap_gib is not None:
        parser.error("--cap_gib: torch counts no memory of CPUs. Leave it out, or write --accelerator gpu.")
    if options.peers is not None:
        options.shape = options.shape or "8b"
    return options


def main(args: list[str] | None = None) -> int:
    """Measure all cases; return 1 if one failed."""
    options = parse(args)
    if options.peers is not None and not Path(options.peers).exists():
        device = "cuda" if options.accelerator == "gpu" else "cpu"
        make = ["peers.py", "make", options.peers, "--shape", options.shape, "--device", device]
        print(f"{shell(make)} ...", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, str(HERE / make[0]), *make[1:]], stdout=subprocess.DEVNULL, check=True)
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for case in [*plan(options), *resuming(options, folder)]:
            records.append(launch(case, options.peers, options.timeout_s, options.round))
            line = json.dumps(records[-1])
            print(line, flush=True)
            if options.out is not None:
                with options.out.open("a", encoding="utf-8") as lines:
                    lines.write(line + "\n")
    print("\n".join([*several_gpus(records), *failures(records)]))
    return int(any("failed" in record for record in records))


if __name__ == "__main__":
    sys.exit(main())
