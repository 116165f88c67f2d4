"""What a fit of the benchmark is made of: batches, modules on a random base, and a clock."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import bitsandbytes
import lightning as L
import numpy as np
import torch
from cases import Case, cap_memory, random_pairs, random_rows
from peft import LoraConfig
from random_base import random_base
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_qlora import PreferenceModule, SFTModule
from lightning_qlora.data import Document, PackedCollator, pack_documents
from lightning_qlora.data.documents import AnswerKind
from lightning_qlora.data.preference_batching import PreferenceBatching
from lightning_qlora.kernels.lora import is_fused
from lightning_qlora.memory import MemoryModel, memory_of_run

# Data


def make_documents(case: Case, count: int, vocab: int, learnable: bool = False) -> list[Document]:
    """Return so many rows as documents."""
    return [
        Document(np.array(ids, dtype=np.int32), np.array([[cut, len(ids)]], dtype=np.int32), number)
        for number, (ids, cut) in enumerate(random_rows(case, count, vocab, learnable))
    ]


def make_answers(case: Case, count: int, vocab: int) -> list[Document]:
    """Return the two answers of so many pairs, side by side, each behind its prompt."""
    documents: list[Document] = []
    for prompt, *answers in random_pairs(case, count, vocab):
        for answer, kind in zip(answers, (AnswerKind.CHOSEN, AnswerKind.REJECTED), strict=True):
            ids = np.array(prompt + answer, dtype=np.int32)
            spans = np.array([[len(prompt), len(ids)]], dtype=np.int32)
            documents.append(Document(ids, spans, len(documents), kind))
    return documents


class Batches(L.LightningDataModule):
    """The case's batches, each one flat row of isolated documents."""

    def __init__(self, case: Case, steps: int, vocab: int, learnable: bool = False) -> None:
        super().__init__()
        self.tokens_per_batch = case.max_length * case.rows
        collate: Any = PackedCollator()
        if case.kind == "pairs":
            documents, each = make_answers(case, steps * case.rows, vocab), 2 * case.rows
            collate = PreferenceBatching(True, self.tokens_per_batch, case.rows, share_prompts=True).collate
        else:
            each = case.rows
            documents = make_documents(case, steps * each * (8 if case.packed else 1), vocab, learnable)
        numbers: Any = [range(i * each, (i + 1) * each) for i in range(steps)]
        if case.packed:
            numbers = list(pack_documents([len(row.input_ids) for row in documents], self.tokens_per_batch))[:steps]
        groups = [[documents[i] for i in group] for group in numbers]
        self.batches = [collate(group) for group in groups]
        # A prompt counts with each of its answers, however often it is computed.
        self.num_tokens = [sum(len(document.input_ids) for document in group) for group in groups]
        assert len(self.batches) == steps

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        pinned = torch.cuda.is_available()  # as the package's own data modules do
        return DataLoader(self.batches, batch_size=None, num_workers=0, pin_memory=pinned)  # type: ignore[arg-type]


# The model


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, weight_decay=0.0, fused=True),
    "adamw_foreach": partial(torch.optim.AdamW, weight_decay=0.0, foreach=True),
    "adamw_8bit": partial(bitsandbytes.optim.AdamW8bit, weight_decay=0.0),
    "paged_adamw_8bit": partial(bitsandbytes.optim.PagedAdamW8bit, weight_decay=0.0),
}


class Measured:
    """A module on a random base, whose memory may be capped once the base is there, before auto looks what is free."""

    shape = "8b"
    cap_gib: float | None = None

    def load_base(self, device: torch.device | None) -> PreTrainedModel:
        """Make the base where it trains."""
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return random_base(self.shape, device, dtype_on(device))

    def on_model_built(self) -> None:
        """Count memory from here on."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            cap_memory(self.cap_gib, 0)


class Module(Measured, SFTModule):
    """SFTModule whose adapters begin where their gradients are all there."""

    @override
    def on_model_built(self) -> None:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in self.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(0.01 * torch.randn(parameter.shape, generator=generator, device="cpu"))
        super().on_model_built()


class Preferences(Measured, PreferenceModule):
    """PreferenceModule, whose reference is the base without adapters."""


def dtype_on(device: torch.device) -> torch.dtype:
    """Return what products are computed in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def lora_of(options: argparse.Namespace) -> LoraConfig:
    return LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM")


def make_module(options: argparse.Namespace) -> Module | Preferences:
    kind: Any = Preferences if options.case == "dpo" else Module
    choices = {"true": True, "false": False, "auto": "auto"}
    module: Module | Preferences = kind(
        "random", lora=lora_of(options), lr=options.lr, lr_scheduler=None, activation_checkpointing=options.plan,
        fused_lora=choices[options.fused_lora],
        untrained_tokens="ignore", compile_layers=options.compile_layers, cuda_graphs=choices[options.cuda_graphs],
        optimizer=OPTIMIZERS[options.optimizer],
    )  # fmt: skip
    module.shape, module.cap_gib = options.shape, options.cap_gib
    return module


def make_trainer(options: argparse.Namespace, steps: int, callbacks: list[L.Callback]) -> L.Trainer:
    return L.Trainer(
        accelerator="gpu" if options.device == "cuda" else "cpu", devices=1, max_steps=steps, max_epochs=1,
        precision="bf16-mixed" if options.device == "cuda" else "32-true", logger=False, callbacks=callbacks,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


# Time


class Clock(L.Callback):
    """Times steps by events that nobody waits for, and notes when the first step is over."""

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.marks: list[Any] = []
        self.losses: list[Tensor] = []
        self.first_step = self.built = 0.0
        self.plan: Any = None
        self.fused = False
        self.graph_replays = 0
        self.memory: MemoryModel | None = None

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.built = time.perf_counter()
        self.plan, self.fused = pl_module.layer_plan, is_fused(pl_module)

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        self.marks.append(self.mark())

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        terms = len(batch["chosen"]) if "chosen" in batch else batch["targets"].numel()
        self.losses.append(outputs["loss"].detach() / terms)
        if index == 0:
            if self.on_gpu:
                torch.cuda.synchronize()
            self.first_step = time.perf_counter()

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.marks.append(self.mark())
        if self.on_gpu:
            torch.cuda.synchronize()
        self.graph_replays = pl_module.graph_replays
        self.memory = memory_of_run(trainer, pl_module.model, trainer.optimizers, recorded=self.graph_replays > 0)

    def mark(self) -> Any:
        """Return this moment on the device, or on the host where there is none."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> list[float]:
        """Return how long each step took."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [one.elapsed_time(two) / 1000 if self.on_gpu else two - one for one, two in pairs]
