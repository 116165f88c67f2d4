"""Preference batches and modules of a tiny model, for tests that need no data module."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from tiny_models import pack_batch, pad_batch

from lightning_qlora.modules import PreferenceModule

ANSWERS = ((3, 14), (5, 9), (2, 21), (7, 11), (12, 4), (6, 6))
"""Lengths of the chosen and rejected answers of pairs: ragged on purpose."""


def random_documents(lengths: list[tuple[int, int]], seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Token ids of documents of (prompt, answer) tokens, equal prompts for neighbours; and what is supervised."""
    generator = torch.Generator().manual_seed(seed)
    documents, masks = [], []
    for number, (prompt, answer) in enumerate(lengths):
        if number % 2 == 0:
            asked = torch.randint(3, 500, (prompt,), generator=generator)
        documents.append(torch.cat([asked[:prompt], torch.randint(3, 500, (answer,), generator=generator)]))
        masks.append(torch.arange(prompt + answer) >= prompt)
    return documents, masks


def as_batch(
    documents: list[torch.Tensor],
    masks: list[torch.Tensor],
    *,
    chosen: list[int],
    rejected: list[int],
    mismatched: list[int] | None = None,
    packed: bool = True,
    first_row: int = 0,
) -> dict[str, Any]:
    """Put documents into a batch; ``chosen`` and the others are their numbers in it."""
    counts = [int(mask.sum()) for mask in masks]
    return {
        **(pack_batch if packed else pad_batch)(documents, masks),
        "row_ids": tuple(range(first_row, first_row + len(documents))),
        "target_documents": torch.arange(len(documents)).repeat_interleave(torch.tensor(counts)),
        "num_targets": tuple(counts),
        "chosen": torch.tensor(chosen, dtype=torch.int64),
        "rejected": torch.tensor(rejected, dtype=torch.int64),
        "mismatched": torch.tensor(mismatched or [], dtype=torch.int64),
        "reference_log_probs": None,
    }


def pair_batches(per_batch: int, *, packed: bool = True, seed: int = 3, answers: Any = ANSWERS) -> list[dict[str, Any]]:
    """The pairs of ``answers``, ``per_batch`` of them in a batch."""
    lengths = [(4, n) for pair in answers for n in pair]
    documents, masks = random_documents(lengths, seed)
    batches = []
    for start in range(0, len(answers), per_batch):
        rows = slice(2 * start, 2 * (start + per_batch))
        count = len(documents[rows])
        batches.append(
            as_batch(
                documents[rows],
                masks[rows],
                chosen=[*range(0, count, 2)],
                rejected=[*range(1, count, 2)],
                packed=packed,
                first_row=2 * start,
            )
        )
    return batches


def unpaired_batches(per_batch: int, *, seed: int = 3, answers: Any = ANSWERS) -> list[dict[str, Any]]:
    """Single answers, every third undesirable, each beside a mismatched one; ``per_batch`` of them in a batch."""
    lengths = [(4, n) for pair in answers for n in pair]  # answer, mismatched answer, answer, ...
    documents, masks = random_documents(lengths, seed)
    batches = []
    for start in range(0, len(answers), per_batch):
        numbers = range(start, min(start + per_batch, len(answers)))
        rows = slice(2 * start, 2 * (start + per_batch))
        batches.append(
            as_batch(
                documents[rows],
                masks[rows],
                first_row=2 * start,
                chosen=[2 * (n - start) for n in numbers if n % 3],
                rejected=[2 * (n - start) for n in numbers if n % 3 == 0],
                mismatched=[2 * (n - start) + 1 for n in numbers],
            )
        )
    return batches


def filler_batch() -> dict[str, Any]:
    """A document that supervises nothing and belongs to no pair."""
    documents, masks = random_documents([(4, 3)], 0)
    batch = as_batch(documents, [torch.zeros_like(masks[0])], chosen=[], rejected=[])
    return {**batch, "row_ids": (-1,)}


def tiny_preference_module(base: str, **options: Any) -> PreferenceModule:
    lora = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options.pop("lora", {})}
    defaults = {"lora": LoraConfig(**lora), "lr_scheduler": None, "activation_checkpointing": "none"}
    torch.manual_seed(0)
    return PreferenceModule(base, **{**defaults, **options})


def perturb(module: PreferenceModule, scale: float = 0.05, seed: int = 1) -> None:
    """Move the trained adapter away from where it started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
