"""Batches of a plan -> a loader that Lightning leaves alone, and that resumes at the exact batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from lightning_qlora.data.batching import Batching
from lightning_qlora.data.collators import Document
from lightning_qlora.data.packing import BatchPlan
from lightning_qlora.schema import SFTBatch

__all__ = ["FILLER_INDEX", "BatchDataset", "EpochSampler", "ResumableLoader", "pass_through"]

T = TypeVar("T")

FILLER_INDEX = -1
"""The index that a sampler gives to a rank that has no batch left for a step in which other ranks still have one."""


class BatchDataset(Dataset[SFTBatch]):
    """A data set whose items are whole batches: item ``i`` is batch ``i`` of the plan.

    So the loader needs no batch sampler, and Lightning's own samplers (``overfit_batches``) pick batches.

    Args:
        documents: The prepared rows.
        plan: Which rows make each batch.
        batching: Makes a batch of the rows.
    """

    def __init__(self, documents: Sequence[Document], plan: BatchPlan, batching: Batching) -> None:
        self.documents = documents
        self.plan = plan
        self.batching = batching

    def __len__(self) -> int:
        return len(self.plan)

    @override
    def __getitem__(self, index: int) -> SFTBatch:
        if index == FILLER_INDEX:
            return self.batching.filler()
        return self.batching.collate([self.documents[row] for row in self.plan[index].tolist()])


class EpochSampler(DistributedSampler[int]):
    """Give each rank its share of the batches, in an order that depends on the seed and the epoch only.

    Step ``s`` of an epoch covers the same batches whatever the number of ranks: with R ranks they are entries
    ``s R`` to ``(s + 1) R`` of one global order. Where the batches run out in the last step, ranks get
    :data:`FILLER_INDEX` instead of a repeated batch. It is a ``DistributedSampler`` so that Lightning does not
    replace it.

    Args:
        num_batches: Batches of the plan.
        num_replicas: Ranks.
        rank: This rank.
        shuffle: Whether the order changes each epoch; without it, the plan's order.
        seed: Of the order.
    """

    def __init__(
        self, num_batches: int, *, num_replicas: int = 1, rank: int = 0, shuffle: bool = True, seed: int = 0
    ) -> None:
        super().__init__(range(num_batches), num_replicas, rank, shuffle, seed)  # type: ignore[arg-type]
        self.num_batches = num_batches
        self.start = 0
        """Batches of this rank to leave out at the beginning, for a resumed epoch."""

    @override
    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            order = np.random.default_rng([self.seed, 3, self.epoch]).permutation(self.num_batches)
        else:
            order = np.arange(self.num_batches)
        padding = np.full(self.total_size - self.num_batches, FILLER_INDEX)
        own = np.concatenate((order, padding))[self.rank :: self.num_replicas]
        return iter(own[self.start :].tolist())


class ResumableLoader(DataLoader[SFTBatch]):
    """A loader that asks, when its first batch is needed, where the epoch begins.

    Iterating is a generator on purpose. Lightning creates the iterator when it sets the loaders up, before it has
    told the sampler the epoch and, where something asks for ``trainer.estimated_stepping_batches``, even before it
    has restored the checkpoint; a plain ``DataLoader`` with workers would fetch the wrong batches by then
    (Lightning-AI/pytorch-lightning#20550, Lightning-AI/pytorch-lightning#21938).

    ``len`` is that of the whole epoch also in a resumed one: Lightning counts the batches done before.

    Args:
        dataset: As of ``DataLoader``.
        first_batch: Called with the epoch; returns how many of this rank's batches are done already.
        kwargs: As of ``DataLoader``.
    """

    def __init__(self, dataset: Dataset[SFTBatch], *, first_batch: Callable[[int], int], **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        self.first_batch = first_batch

    @override
    def __iter__(self) -> Iterator[SFTBatch]:  # type: ignore[override]
        sampler = self.sampler
        skip = self.first_batch(getattr(sampler, "epoch", 0))
        if isinstance(sampler, EpochSampler):
            sampler.start, skip = skip, 0
        yield from itertools.islice(super().__iter__(), skip, None)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the position is the data module's; the method tells Lightning that it is kept."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Accept the nothing that :meth:`state_dict` returned."""


def pass_through(item: T) -> T:
    """Return the item: the items of a :class:`BatchDataset` are batches already."""
    return item
