"""How long a checkpoint keeps training waiting, for the adapters of an 8B model.

    python examples/benchmark/save_stall.py --folder /path/on/the/disk/of/the/run

A LoRA of rank 16 on all linear layers of Llama 3.1 8B has 41.9 million parameters in 448 tensors: 168 MB of weights and
336 MB of AdamW state. Here a base of an eighth of the width carries adapters of eight times the rank, which are as many
parameters in as many tensors, so that everything a save does is done, on any machine and in minutes.

AdapterCheckpoint publishes after each step, and a step takes as long as ``--interval``; once in the background, its
default, and once with training waiting for it. The figures are its own ``last_save_seconds`` and ``last_save_bytes``.
The first save also reads the base once to identify it. Beside them: how long the same bytes take to be written and
flushed as one plain file, and to be hashed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM
from typing_extensions import override

from lightning_qlora import AdapterCheckpoint, SFTModule

ADAPTER_PARAMETERS = 41_943_040  # of LoRA r=16 on all linear layers of Llama 3.1 8B


class Timer(L.Callback):
    """Notes what AdapterCheckpoint says of each save, and trains slowly."""

    def __init__(self, checkpoint: AdapterCheckpoint, interval_s: float) -> None:
        self.checkpoint, self.interval_s = checkpoint, interval_s
        self.seconds: list[float] = []

    @override
    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step:
            self.seconds.append(self.checkpoint.last_save_seconds)
            time.sleep(self.interval_s)


def save_base(folder: Path) -> str:
    """Write a random base with the layers of Llama 3.1 8B at an eighth of its width."""
    size: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 32}
    heads: dict[str, Any] = {"num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **size, **heads)).save_pretrained(folder)
    return str(folder)


def batch() -> dict[str, Any]:
    """Return one document of four tokens."""
    ids = torch.tensor([5, 6, 7, 8])
    return {
        "input_ids": ids[None],
        "position_ids": torch.arange(4)[None],
        "labels": ids[None],
        "attention_mask": None,
        "cu_seq_lens": torch.tensor([0, 4], dtype=torch.int32),
        "document_lengths": (4,),
        "target_positions": torch.arange(3),
        "targets": ids[1:],
        "row_ids": (0,),
    }


def plain_file(folder: Path, num_bytes: int) -> dict[str, float]:
    """Time how long one file of so many bytes takes to be written and flushed, and to be hashed."""
    block = os.urandom(1 << 22)
    start = time.perf_counter()
    with open(folder / "plain", "wb") as stream:
        for _ in range(num_bytes >> 22):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    written = time.perf_counter()
    digest = hashlib.sha256()
    for _ in range(num_bytes >> 22):
        digest.update(block)
    hashed = time.perf_counter()
    (folder / "plain").unlink()
    return {"plain_write_seconds": round(written - start, 2), "hash_seconds": round(hashed - written, 2)}


def measure(folder: Path, num_saves: int, interval_s: float, background: bool) -> dict[str, Any]:
    """Train and publish; return the figures."""
    torch.manual_seed(0)
    lora = LoraConfig(r=128, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    module = SFTModule(save_base(folder / "base"), lora=lora, lr_scheduler=None, activation_checkpointing="none")
    checkpoint = AdapterCheckpoint(folder / "checkpoints", every_n_train_steps=1, background=background)
    timer = Timer(checkpoint, interval_s)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=num_saves,
        callbacks=[timer, checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        batches: Any = [batch()] * num_saves
        trainer.fit(module, DataLoader(batches, batch_size=None))
    timer.seconds.append(checkpoint.last_save_seconds)
    num_parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert num_parameters == ADAPTER_PARAMETERS, num_parameters
    median = statistics.median(timer.seconds[1:])
    return {
        "background": background,
        "bytes": checkpoint.last_save_bytes,
        "first_wait_seconds": round(timer.seconds[0], 2),
        "wait_seconds": [round(seconds, 2) for seconds in timer.seconds[1:]],
        "one_percent_at_minutes_between_saves": round(100 * median / 60, 2),
        **plain_file(folder, checkpoint.last_save_bytes),
    }


def main() -> None:
    """Measure and print two JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where to write; a temporary folder by default")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--interval", type=float, default=15.0, help="seconds that a step takes")
    options = parser.parse_args()
    for background in (True, False):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            print(json.dumps(measure(Path(folder), options.saves, options.interval, background)), flush=True)


if __name__ == "__main__":
    main()
