from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qlora.data.batching import Batching
from lightning_qlora.data.collators import Document
from lightning_qlora.data.loading import FILLER_INDEX, BatchDataset, EpochSampler, ResumableLoader, pass_through
from lightning_qlora.schema import SFTBatch

DOCUMENTS = [Document(np.full(n % 7 + 2, n), np.asarray([[1, 2]]), n) for n in range(30)]


def dataset(batching: Batching | None = None) -> BatchDataset:
    batching = batching or Batching(True, 16, 1)
    return BatchDataset(DOCUMENTS, batching.plan([len(d.input_ids) for d in DOCUMENTS], 0), batching)


def loader(first_batch=lambda _: 0, **options) -> ResumableLoader:
    data = dataset()
    sampler = EpochSampler(len(data), seed=1)
    return ResumableLoader(
        data, first_batch=first_batch, sampler=sampler, batch_size=None, collate_fn=pass_through, **options
    )


def rows(batches) -> list[tuple[int, ...]]:
    return [batch["row_ids"] for batch in batches]


@settings(max_examples=60, deadline=None)
@given(
    num_batches=st.integers(1, 40),
    world_size=st.integers(1, 5),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
    start=st.integers(0, 4),
)
def test_ranks_share_one_order_and_nothing_is_repeated(num_batches, world_size, epoch, shuffle, start):
    alone = EpochSampler(num_batches, shuffle=shuffle, seed=3)
    alone.set_epoch(epoch)
    shares = []
    for rank in range(world_size):
        sampler = EpochSampler(num_batches, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=3)
        sampler.set_epoch(epoch)
        share = list(sampler)
        assert len(share) == len(sampler)
        sampler.start = start
        assert list(sampler) == share[start:]
        shares.append(share)
    assert len({len(share) for share in shares}) == 1
    # Step by step, the ranks together do what one rank does, and idle where it is done.
    together = list(itertools.chain.from_iterable(zip(*shares, strict=True)))
    assert together[:num_batches] == list(alone)
    assert together[num_batches:] == [FILLER_INDEX] * (len(together) - num_batches)
    assert sorted(alone) == list(range(num_batches))
    assert shuffle or list(alone) == list(range(num_batches))


def test_orders_differ_by_epoch_and_seed():
    orders = []
    for seed, epoch in itertools.product((0, 1), (0, 1)):
        sampler = EpochSampler(50, seed=seed)
        sampler.set_epoch(epoch)
        orders.append(tuple(sampler))
    assert len(set(orders)) == 4


def test_filler_of_each_layout_holds_no_row():
    for batching in (Batching(True, 16, 1, pad_token_id=5), Batching(False, None, 4, pad_token_id=5)):
        batch: SFTBatch = dataset(batching)[FILLER_INDEX]
        assert batch["row_ids"] == (-1,)
        assert batch["targets"].numel() == 0
        assert batch["input_ids"].tolist() == [[5]]


def test_plain_iteration_ends():
    data = dataset()
    assert sorted(itertools.chain.from_iterable(rows(data[i] for i in range(len(data))))) == list(range(30))
    with pytest.raises(IndexError):
        data[len(data)]


def test_nothing_is_asked_before_the_first_batch():
    asked = []
    batches = iter(loader(first_batch=lambda epoch: asked.append(epoch) or 0))
    assert asked == []
    next(batches)
    assert asked == [0]


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
def test_epoch_and_start_are_read_late(options):
    start = 0
    resumable = loader(first_batch=lambda _: start, **options)
    whole = {}
    for epoch in range(2):
        resumable.sampler.set_epoch(epoch)
        whole[epoch] = rows(resumable)
    assert whole[0] != whole[1]
    early = iter(resumable)  # as Lightning does, before it sets the epoch
    resumable.sampler.set_epoch(0)
    start = 3
    assert rows(early) == whole[0][3:]
    start = 0
    resumable.sampler.set_epoch(1)
    abandoned = iter(resumable)
    next(abandoned)
    assert rows(resumable) == whole[1]
    assert len(resumable) == len(whole[0])


def test_another_sampler_is_skipped_through():
    data = dataset()
    resumable = ResumableLoader(data, first_batch=lambda _: 2, batch_size=None, collate_fn=pass_through)
    assert rows(resumable) == rows(data[i] for i in range(2, len(data)))


def test_lightning_finds_it_resumable():
    from lightning.fabric.utilities.types import _Stateful

    resumable = loader()
    assert isinstance(resumable, _Stateful)
    resumable.load_state_dict(resumable.state_dict())


def test_datasets_travel_to_workers():
    data = dataset()
    assert rows([pickle.loads(pickle.dumps(data))[2]]) == rows([data[2]])
