"""A whole training run in a second: a tiny 4-bit base, a data module that keeps its position, a quiet Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from peft import LoraConfig
from tiny_models import random_batch, save_tiny_model
from tiny_preferences import as_batch, random_documents
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from lightning_qlora.callbacks import RunGuard
from lightning_qlora.losses import DPOLoss, ORPOLoss
from lightning_qlora.model import save_adapter
from lightning_qlora.modules import PreferenceModule, SFTModule


class Batches(Dataset[dict[str, Any]]):
    """Batch ``i`` holds two documents, whose ids are ``2 i`` and ``2 i + 1``."""

    def __init__(self, length: int, offset: int = 0) -> None:
        self.length, self.offset = length, offset

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = random_batch((5 + index % 4, 7), vocab_size=100, seed=index + self.offset)
        return {**batch, "row_ids": (2 * index, 2 * index + 1)}


class Pairs(Batches):
    """Batch ``i`` holds the two answers of a pair, whose ids are ``2 i`` and ``2 i + 1``."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        documents, masks = random_documents([(4, 3 + index % 4), (4, 5)], seed=index + self.offset)
        return as_batch(documents, masks, chosen=[0], rejected=[1], first_row=2 * index)


class Sampler(DistributedSampler[int]):
    start = 0

    def __iter__(self) -> Iterator[int]:
        return iter(list(super().__iter__())[self.start :])


class Loader(DataLoader[dict[str, Any]]):
    """Reads its position when the first batch is needed; Lightning counts the rest."""

    skip = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.sampler.start, self.skip = self.skip, 0
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class TinyData(L.LightningDataModule):
    """Shuffled training batches and some for validation; its position comes from the trainer's own count."""

    kind: type[Batches] = Batches

    def __init__(self, batches: int = 6, val_batches: int = 2, workers: int = 0, fingerprint: str = "tiny") -> None:
        super().__init__()
        self.batches, self.val_batches, self.workers, self.fingerprint = batches, val_batches, workers, fingerprint
        self._loader: Loader | None = None
        self._skip = 0

    def train_dataloader(self) -> Loader:
        ranks = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        sampler = Sampler(range(self.batches), shuffle=True, seed=1, **ranks)
        kwargs: dict[str, Any] = {"batch_size": None, "sampler": sampler, "num_workers": self.workers}
        self._loader = Loader(self.kind(self.batches), **kwargs)
        self._loader.skip = self._skip
        return self._loader

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(self.kind(self.val_batches, offset=1000), batch_size=None)

    def origins(self, row_ids: tuple[int, ...], stage: str = "train") -> list[str]:
        return [f"{stage}.jsonl:{row_id + 1}" for row_id in row_ids]

    def state_dict(self) -> dict[str, Any]:
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        done = progress.current.processed
        return {"done": 0 if progress.is_last_batch else done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._skip = state["done"]
        if self._loader is not None:
            self._loader.skip = self._skip


class TinyPairs(TinyData):
    """The same of pairs of answers."""

    kind = Pairs


class Record(L.Callback):
    """What a run saw and how it ended up, to be compared bit for bit."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, ...]] = []
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        self.rows.append(batch["row_ids"])
        self.losses.append(float(outputs["loss"]))


def tiny_module(
    base: str, *, dropout: float = 0.1, lora: dict[str, Any] | None = None, kind: Any = SFTModule, **kwargs: Any
) -> Any:
    options = {"r": 4, "lora_alpha": 8, "lora_dropout": dropout, "target_modules": "all-linear"}
    config = LoraConfig(**{**options, "task_type": "CAUSAL_LM", **(lora or {})})
    return kind(base, lora=config, **{"activation_checkpointing": "none", "lr": 1e-2, **kwargs})


@dataclass(frozen=True)
class Job:
    """What a tiny run trains: a kind of module on a base, and batches for it."""

    base: str
    kind: str = "SFT"
    adapter: str | None = None

    def module(self, **options: Any) -> Any:
        if self.kind == "SFT":
            return tiny_module(self.base, **options)
        if self.kind == "DPO":  # with a reference: the adapter that it goes on from
            return tiny_module(self.base, kind=PreferenceModule, loss=DPOLoss(), adapter=self.adapter, **options)
        return tiny_module(self.base, kind=PreferenceModule, loss=ORPOLoss(), mean_chosen_tokens=4.5, **options)

    def data(self, **options: Any) -> TinyData:
        return (TinyData if self.kind == "SFT" else TinyPairs)(**options)


def make_jobs(folder: Path, **model: Any) -> dict[str, Job]:
    """Write a base, and an adapter of it away from zero; return a job of each kind on them."""
    base = save_tiny_model(folder / "base", **model)
    started = tiny_module(base, untrained_tokens="ignore")
    started.configure_model()
    torch.nn.init.normal_(next(p for n, p in started.named_parameters() if "lora_B" in n), std=0.1)
    save_adapter(started.model, folder / "adapter")
    return {kind: Job(base, kind, str(folder / "adapter")) for kind in ("SFT", "DPO", "ORPO")}


def tiny_trainer(root: Path, *callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "default_root_dir": root,
        "gradient_clip_val": 1.0,
    }
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **kwargs})


def fit_to_exit(
    job: str | Job,
    root: Path,
    *callbacks: L.Callback,
    module: Any = None,
    data: Any = None,
    ckpt_path: Any = None,
    seed: int = 0,
    **trainer_options: Any,
) -> tuple[L.Trainer, Record, Any]:
    """Train for an epoch; return the trainer, what it saw, and the code with which it would have exited.

    ``job`` may be the base of a supervised one.
    """
    job = Job(job) if isinstance(job, str) else job
    L.seed_everything(seed)
    record = Record()
    trainer = tiny_trainer(root, record, *callbacks, **{"max_epochs": 1, **trainer_options})
    code = None
    try:
        trainer.fit(module or job.module(), datamodule=data or job.data(), ckpt_path=ckpt_path)
    except SystemExit as exit_:
        code = exit_.code
    return trainer, record, code


class LateGuard(RunGuard):
    """Learns what a step was like at the next one, as on a GPU; the fused optimizer of CPUs does its part too."""

    def _device_decides(self, step: Any) -> bool:
        return True


def trained_tensors(module: L.LightningModule) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def final_state(trainer: L.Trainer) -> dict[str, Any]:
    """Weights, optimizer, schedule, steps and the next random numbers."""
    module = trainer.lightning_module
    return {
        "weights": {k: v.clone() for k, v in module.state_dict().items()},
        "optimizer": [o.state_dict() for o in trainer.optimizers],
        "schedule": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
        "steps": trainer.global_step,
    }


def assert_equal(one: Any, other: Any, path: str = "") -> None:
    """Compare nested states bit for bit."""
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, path
        assert torch.equal(one, other), f"{path}: {(one - other).abs().max()}"
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_equal(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{path}[{index}]")
    else:
        assert one == other, path
