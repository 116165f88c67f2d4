"""How training scales over the GPUs of a machine: tokens/s, memory of each GPU, efficiency, and resuming on fewer.

    python examples/benchmark/scaling.py                         # 1, 2, 4, 8, ... and all GPUs of this machine
    python examples/benchmark/scaling.py --devices 2 4 --only fsdp --out scaling.jsonl
    python examples/benchmark/scaling.py --shape tiny --accelerator cpu --devices 1 2     # two gloo processes

Measured are DDP of an 8B shape, once on packed chat rows (lengths lognormal(6.0, 0.8), clipped to 32..2048) and once on
full rows of 2048 tokens, and FSDP of a 70B shape on full rows. Bases are NF4 with random weights, quantised on the
device from the shape's configuration, so that nothing is downloaded; speed and memory do not depend on their values.
60 % of the tokens are supervised; LoRA of rank 16 on all linear layers; each rank has as many micro-batches.

Each case runs in processes of its own. At last the largest FSDP case publishes a checkpoint that half as many devices
go on from. One JSON line a case, then a table; efficiency is tokens/s for each device against the fewest devices.
Where a case fails, its line says why; the others are measured all the same, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from cases import SHAPES
from random_base import random_base
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_qlora import AdapterCheckpoint, PerformanceMonitor, SFTModule
from lightning_qlora.data.batching import Batching
from lightning_qlora.data.collators import Document
from lightning_qlora.model import compute_dtype
from lightning_qlora.ranks import gather_objects

ROW = 2048
WARMUP = 10


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        strategy: ``ddp`` or ``fsdp``.
        shape: A name of ``cases.SHAPES``.
        rows: ``chat`` or ``full``.
        devices: Processes, one for each device.
        accelerator: ``gpu`` or ``cpu``.
        steps: Optimizer steps that are measured, after the warm-up.
        tokens_per_batch: Of each rank's micro-batch, which is its whole step.
        folder: Where to publish at the end; ``None`` for nowhere.
        resume: Go on from what is published there, for an epoch more.
    """

    strategy: str
    shape: str
    rows: str
    devices: int
    accelerator: str
    steps: int
    tokens_per_batch: int
    folder: str | None = None
    resume: bool = False


class RandomBase(SFTModule):
    """SFTModule on a base of random NF4 weights, made on the device from a configuration."""

    def __init__(self, shape: str, **options: Any) -> None:
        super().__init__(shape, untrained_tokens="ignore", lr_scheduler=None, **options)

    @override
    def load_base(self, device: torch.device | None) -> PreTrainedModel:
        assert device is not None
        return random_base(self.model_name, device, compute_dtype(device))


class RandomRows(L.LightningDataModule):
    """Packed rows of random tokens; every rank gets as many micro-batches as every other."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        case, ranks = self.case, self.trainer.world_size
        wanted = (case.steps + WARMUP) * ranks
        random = np.random.default_rng(0)
        number = 2 * wanted * max(1, case.tokens_per_batch // (ROW if case.rows == "full" else 400)) + wanted
        lengths = np.full(number, min(ROW, case.tokens_per_batch))
        if case.rows == "chat":
            lengths = np.clip(random.lognormal(6.0, 0.8, number).astype(int), 32, min(ROW, case.tokens_per_batch))
        batching = Batching(packing=True, tokens_per_batch=case.tokens_per_batch, batch_size=1)
        plan = list(batching.plan(lengths, seed=0))[:wanted][self.trainer.global_rank :: ranks]
        vocabulary = SHAPES[case.shape]["vocab_size"]

        def document(row: int) -> Document:
            length = int(lengths[row])
            supervised = np.array([[length - int(0.6 * length), length]], dtype=np.int32)
            return Document(random.integers(0, vocabulary, length, dtype=np.int32), supervised, row)

        return DataLoader([batching.collate([document(row) for row in rows]) for rows in plan], batch_size=None)


class Started(L.Callback):
    """Notes when training began."""

    seconds = 0.0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds = time.perf_counter()


def run(case: Case) -> dict[str, Any]:
    """Train one case on the ranks that torchrun has started; return its figures."""
    begun = time.perf_counter()
    L.seed_everything(0, verbose=False)
    started = Started()
    callbacks: list[L.Callback] = [started, PerformanceMonitor(window=case.steps)]
    checkpoint = None
    if case.folder is not None:
        checkpoint = AdapterCheckpoint(case.folder, background=False)
        callbacks.append(checkpoint)
    trainer = L.Trainer(
        accelerator=case.accelerator,
        devices=case.devices,
        strategy="auto" if case.devices == 1 else f"{case.strategy}_qlora",
        precision="bf16-mixed" if case.accelerator == "gpu" else "32-true",
        max_epochs=2 if case.resume else 1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=checkpoint is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=case.folder,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(RandomBase(case.shape), datamodule=RandomRows(case), ckpt_path="last" if case.resume else None)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    peaks = gather_objects(metrics["peak_memory_gib"])
    # PerformanceMonitor takes its rank for all; unevenly packed ranks are added up here.
    rates = gather_objects(metrics["tokens_per_second"] / trainer.world_size)
    return {
        "tokens_per_second": round(sum(rates), 1),
        "step_seconds": round(metrics["step_seconds"], 4),
        "peak_memory_gib": [round(peak, 3) for peak in peaks],
        "start_seconds": round(started.seconds - begun, 1),
        "optimizer_steps": trainer.global_step,
        "train_loss": round(metrics["train_loss"], 4),
        "save_seconds": None if checkpoint is None else round(checkpoint.last_save_seconds, 2),
        "device": torch.cuda.get_device_name() if case.accelerator == "gpu" else "cpu",
        "torch": torch.__version__,
    }


def name(case: Mapping[str, Any]) -> str:
    """Say what is run, as the table does."""
    suffix = "" if not case["saves"] else " (resumed)" if case["resume"] else " (saved)"
    return f"{case['strategy']} {case['shape']} {case['rows']}{suffix}"


def launch(case: Case) -> dict[str, Any]:
    """Run one case in processes of its own; what goes wrong there is part of the record."""
    record = asdict(case)
    record["saves"] = record.pop("folder") is not None
    print(f"{name(record)} on {case.devices} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.devices}"]
        command += [__file__, "--case", json.dumps(asdict(case)), "--result", str(result)]
        done = subprocess.run(command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1", **os.environ})
        if done.returncode == 0:
            return {**record, **json.loads(result.read_text())}
        errors = sorted(Path(folder).glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
        # Killed from outside, a process has written nothing; torchrun says by which signal.
        return {**record, "error": errors[0].read_text() if errors else done.stderr[-500:]}


def run_rank(case: Case, result: Path) -> None:
    """Be one of the processes that :func:`launch` has started."""
    rank = os.environ["RANK"]
    try:
        figures = run(case)
    except Exception as error:
        result.with_name(f"{rank}.error").write_text(f"{type(error).__name__}: {error}")
        raise
    if rank == "0":
        result.write_text(json.dumps(figures))


def plan(options: argparse.Namespace) -> list[Case]:
    """Return the cases to run, in order."""
    common = {"accelerator": options.accelerator, "steps": options.steps, "tokens_per_batch": options.tokens_per_batch}
    cases = []
    if options.only != "fsdp":
        for rows in ("chat", "full"):
            cases += [Case("ddp", options.shape or "8b", rows, n, **common) for n in options.devices]
    several = [n for n in options.devices if n > 1]
    if options.only != "ddp":
        cases += [Case("fsdp", options.shape or "70b", "full", n, **common) for n in several]
    return cases


def resuming(options: argparse.Namespace, folder: str) -> list[Case]:
    """Return the cases that publish on the most devices and go on with half of them."""
    most = max(options.devices)
    if most < 2 or options.only == "ddp":
        return []
    shape = options.shape or "70b"
    few: dict[str, Any] = {"accelerator": options.accelerator, "steps": 2, "tokens_per_batch": options.tokens_per_batch}
    return [
        Case("fsdp", shape, "full", most, folder=folder, **few),
        Case("fsdp", shape, "full", most // 2, folder=folder, resume=True, **few),
    ]


def add_efficiency(records: list[dict[str, Any]]) -> None:
    """Compare tokens/s for each device with the same case on the fewest."""
    base: dict[tuple[str, ...], float] = {}
    for record in sorted((r for r in records if "error" not in r and not r["saves"]), key=lambda r: r["devices"]):
        each = record["tokens_per_second"] / record["devices"]
        key = record["strategy"], record["shape"], record["rows"]
        record["efficiency"] = round(each / base.setdefault(key, each), 3)


def table(records: list[dict[str, Any]]) -> str:
    """Draw the records as a Markdown table."""
    lines = ["| case | devices | tokens/s | efficiency | peak GiB | start s |", "|---|---|---|---|---|---|"]
    for r in records:
        if "error" in r:
            reason = " ".join(r["error"].replace("|", "/").split())
            lines.append(f"| {name(r)} | {r['devices']} | failed: {reason[:80]} | | | |")
            continue
        peaks, efficiency = r["peak_memory_gib"], r.get("efficiency")
        shown = "" if efficiency is None else f"{efficiency:.1%}"
        figures = f"{r['tokens_per_second']:,.0f} | {shown} | {max(peaks):.2f} | {r['start_seconds']}"
        lines.append(f"| {name(r)} | {r['devices']} | {figures} |")
    return "\n".join(lines)


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
    parser.add_argument("--steps", type=int, default=40, help="measured steps, after 10 of warm-up")
    parser.add_argument(
        "--tokens_per_batch", type=int, default=8192, help="of each device's micro-batch, its whole step"
    )
    parser.add_argument("--out", type=Path, help="also write the JSON lines to this file, each as it comes")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    if options.case is not None:
        return options
    options.devices = sorted(set(options.devices or ([1, 2] if options.accelerator == "cpu" else counts or [1])))
    if options.accelerator == "gpu" and options.devices[-1] > gpus:
        parser.error(
            f"--devices {options.devices[-1]}: the GPUs of this machine are {gpus}. To see that everything runs, write "
            "--accelerator cpu --shape tiny --tokens_per_batch 256, which takes processes instead."
        )
    if options.only == "fsdp" and options.devices[-1] < 2:
        parser.error("--only fsdp: it shares a model among devices, two at least. Write --devices 2 or more.")
    return options


def main(args: list[str] | None = None) -> int:
    """Measure all cases; return 1 if one failed."""
    options = parse(args)
    if options.case is not None:
        run_rank(Case(**json.loads(options.case)), options.result)
        return 0
    records: list[dict[str, Any]] = []
    if options.out is not None:
        options.out.write_text("")
    with tempfile.TemporaryDirectory() as folder:
        for case in [*plan(options), *resuming(options, folder)]:
            records.append(launch(case))
            add_efficiency(records)
            print(json.dumps(records[-1]), flush=True)
            if options.out is not None:
                with options.out.open("a") as lines:
                    lines.write(json.dumps(records[-1]) + "\n")
    print(table(records))
    return int(any("error" in record for record in records))


if __name__ == "__main__":
    sys.exit(main())
