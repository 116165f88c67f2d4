"""What each process that scaling.py starts by torchrun does: an own run of one case, whose fields are its argument."""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import warnings  # noqa: E402
from contextlib import redirect_stdout  # noqa: E402
from importlib.metadata import version  # noqa: E402
from typing import Any  # noqa: E402

import lightning as L  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from cases import GIB, SHAPES, cap_memory  # noqa: E402
from random_base import random_base  # noqa: E402
from scaling import ROW, Case  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402
from typing_extensions import override  # noqa: E402

from lightning_qlora import AdapterCheckpoint, PerformanceMonitor, RunGuard, SFTModule  # noqa: E402
from lightning_qlora.data.batching import Batching  # noqa: E402
from lightning_qlora.data.collators import Document  # noqa: E402
from lightning_qlora.model import compute_dtype  # noqa: E402
from lightning_qlora.ranks import gather_objects  # noqa: E402


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
        wanted = (case.steps + case.warmup) * ranks
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

        batches: Any = [batching.collate([document(row) for row in rows]) for rows in plan]
        return DataLoader(batches, batch_size=None, pin_memory=torch.cuda.is_available())  # as own data modules do


class Started(L.Callback):
    """Notes when training began, after how many steps, and the GiB it had taken until then."""

    seconds = 0.0
    steps = 0
    peak_gib: float | None = None

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds = time.perf_counter() - STARTED
        self.steps = trainer.global_step
        if pl_module.device.type == "cuda":
            self.peak_gib = round(torch.cuda.max_memory_allocated() / GIB, 3)


def run(case: Case) -> dict[str, Any]:
    """Train one case on the ranks that torchrun has started; return its figures."""
    L.seed_everything(0, verbose=False)
    cap_memory(case.cap_gib, int(os.environ["LOCAL_RANK"]))
    started = Started()
    callbacks: list[L.Callback] = [started, PerformanceMonitor(window=case.steps), RunGuard()]
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
    # PerformanceMonitor takes its rank for all; unevenly packed ranks are added up here.
    rates = gather_objects(metrics["tokens_per_second"] / trainer.world_size)
    return {
        "tokens_per_second": round(sum(rates), 1),
        "step_seconds": round(metrics["step_seconds"], 4),
        "peak_memory_gib": [round(peak, 3) for peak in gather_objects(metrics["peak_memory_gib"])],
        "start_peak_gib": gather_objects(started.peak_gib),
        "start_seconds": round(started.seconds, 1),
        "steps_before": started.steps,
        "optimizer_steps": trainer.global_step,
        "train_loss": round(metrics["train_loss"], 4),
        "save_seconds": None if checkpoint is None else round(checkpoint.last_save_seconds, 2),
        "device_name": torch.cuda.get_device_name() if case.accelerator == "gpu" else "cpu",
        **{name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "lightning")},
    }


def main() -> None:
    with redirect_stdout(sys.stderr):
        figures = run(Case(**json.loads(sys.argv[1])))
    if os.environ["RANK"] == "0":
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
