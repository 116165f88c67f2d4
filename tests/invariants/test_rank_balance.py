"""Ranks wait for the slowest in every step, so each must have as many tokens as the others, and as many batches."""

import numpy as np
import pytest

from lightning_qlora.data.batching import Batching
from lightning_qlora.data.loading import FILLER_INDEX, EpochSampler

BUDGET = 4096


@pytest.mark.parametrize("ranks", [2, 8])
def test_packed_batches_are_balanced_in_tokens_over_ranks(ranks):
    """Chat-length rows: what ranks would idle for, summed over an epoch, is under 1 % of its tokens."""
    lengths = np.clip(np.random.default_rng(0).lognormal(6.0, 0.8, 5001).astype(int), 32, 2048)
    plan = Batching(packing=True, tokens_per_batch=BUDGET, batch_size=1).plan(lengths, seed=0)
    tokens = np.array([lengths[rows].sum() for rows in plan] + [0])  # the last entry is a filler's
    assert FILLER_INDEX == -1
    orders = [list(EpochSampler(len(plan), num_replicas=ranks, rank=r, seed=5)) for r in range(ranks)]
    assert len({len(order) for order in orders}) == 1
    by_step = tokens[np.array(orders)]
    whole = by_step[:, :-1]  # in the last step some may have run out
    assert (whole.max(axis=0) - whole.mean(axis=0)).sum() < 0.01 * whole.sum() / ranks
    assert by_step.sum() == lengths.sum()
