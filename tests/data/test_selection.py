from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qlora.data.selection import hold_out, weigh_rows


def digests(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1 << 63, size=count, dtype=np.uint64)


@settings(max_examples=50, deadline=None)
@given(
    copies=st.lists(st.integers(1, 4), min_size=2, max_size=40), fraction=st.floats(0.01, 0.5), seed=st.integers(0, 3)
)
def test_copies_stay_together_and_the_share_is_exact(copies, fraction, seed):
    distinct = digests(len(copies))
    rows = np.random.default_rng(1).permutation(np.repeat(distinct, copies))
    expected = max(1, round(fraction * len(copies)))
    if expected >= len(copies):
        return
    held_out = hold_out(rows, fraction, seed=seed)
    assert not set(rows[held_out].tolist()) & set(rows[~held_out].tolist())
    assert len(set(rows[held_out].tolist())) == expected


def test_choice_goes_by_content_and_seed():
    rows = digests(1000)
    chosen = set(rows[hold_out(rows, 0.1)].tolist())
    assert set(rows[::-1][hold_out(rows[::-1], 0.1)].tolist()) == chosen
    more = np.concatenate((digests(1, seed=9), rows))
    assert len(set(more[hold_out(more, 0.1)].tolist()) & chosen) >= 99
    other = set(rows[hold_out(rows, 0.1, seed=1)].tolist())
    assert len(other & chosen) < 40
    rank = np.sort(rows).searchsorted(rows[hold_out(rows, 0.1)])
    assert 400 < rank.mean() < 600  # not simply the smallest


def test_nothing_left_to_train_on_is_refused():
    with pytest.raises(ValueError, match=r"validation_fraction=0.9 of 2 distinct rows leaves none"):
        hold_out(digests(2), 0.9)
    with pytest.raises(ValueError, match="of 1 distinct rows"):
        hold_out(np.repeat(digests(1), 5), 0.1)


def test_weights_say_how_often_a_row_is_used():
    parts = np.asarray([0, 1, 1, 1, 1, 2, 2])
    rows = weigh_rows(parts, [2.0, 0.5, 1.0])
    counts = np.bincount(rows, minlength=7)
    assert counts[0] == 2
    assert sorted(counts[1:5]) == [0, 0, 1, 1]
    assert counts[5:].tolist() == [1, 1]
    np.testing.assert_array_equal(rows, weigh_rows(parts, [2.0, 0.5, 1.0]))
    assert np.bincount(weigh_rows(np.zeros(4, dtype=int), [1.5])).sum() == 6
    assert weigh_rows(np.empty(0, dtype=int), [1.0]).tolist() == []
