"""The longest batch of a run, found without making the others."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from lightning_qlora.data.loading import BatchDataset

__all__ = ["LongestBatch", "find_longest_batch", "repeating_loader"]

_LOOKED_AT = 64


@dataclass(frozen=True, slots=True)
class LongestBatch:
    """The longest batch.

    Attributes:
        batch: Itself.
        num_positions: Its tokens, padding included.
        longest_document: Tokens of its longest document, as far as the batch tells.
        num_supervised: Tokens that enter the loss, as far as the batch tells.
        among: What it is the longest of.
    """

    batch: Any
    num_positions: int
    longest_document: int
    num_supervised: int | None
    among: str


def find_longest_batch(loader: Any) -> LongestBatch:
    """Find it in the plan of a data module of this package; among the first batches of any other loader.

    Raises:
        ValueError: If there is no batch.
    """
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, BatchDataset) and len(dataset):
        return max((_measure(batch, f"all {len(dataset):,}") for batch in _candidates(dataset)), key=_size)
    batches = list(itertools.islice(iter(loader), _LOOKED_AT))
    if not batches:
        raise ValueError("The training data make no batch. Look at them with the subcommand inspect.")
    everything = isinstance(loader, Sized) and len(loader) == len(batches)
    among = f"{'all' if everything else 'the first'} {len(batches):,}"
    return max((_measure(batch, among) for batch in batches), key=_size)


def _candidates(dataset: BatchDataset) -> Iterator[Any]:
    """Make the batch of the most tokens, and that of the most positions were its documents padded."""
    lengths = np.asarray(getattr(dataset.documents, "lengths"))  # noqa: B009 - Documents has it, Sequence does not
    plan = dataset.plan
    of_batches = [lengths[plan[index]] for index in range(len(plan))]
    longest = [int(own.max()) for own in of_batches]
    packed = max(range(len(plan)), key=lambda i: (int(of_batches[i].sum()), longest[i]))
    padded = max(range(len(plan)), key=lambda i: (longest[i] * len(of_batches[i]), longest[i]))
    return (dataset[index] for index in {packed, padded})


def _measure(batch: Any, among: str) -> LongestBatch:
    fields: Mapping[str, Any] = batch if isinstance(batch, Mapping) else {"input_ids": batch}
    ids, targets, lengths = fields.get("input_ids"), fields.get("targets"), fields.get("document_lengths")
    positions, width = (ids.numel(), ids.shape[-1]) if isinstance(ids, torch.Tensor) else (0, 0)
    supervised = targets.numel() if isinstance(targets, torch.Tensor) else None
    return LongestBatch(batch, positions, max(lengths) if lengths else width, supervised, among)


def _size(found: LongestBatch) -> tuple[int, int]:
    return found.num_positions, found.longest_document


def repeating_loader(batch: Any, times: int) -> DataLoader[Any]:
    """Return a loader that gives this batch again and again."""
    return DataLoader([batch] * times, batch_size=None)  # type: ignore[arg-type]
