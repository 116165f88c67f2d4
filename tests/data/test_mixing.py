"""Weights, interleaving, shuffling, and going on at the exact row."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qlora.data.mixing import MixedRows, ShuffleBuffer, is_sampled, mix, weighted_indices
from lightning_qlora.data.sources import DataSource
from lightning_qlora.schema import RowRefused


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """300 rows of "a", 100 of "b", 7 of "c"; every tenth of "a" is broken."""
    folder = tmp_path_factory.mktemp("mix")
    for name, count in {"a": 300, "b": 100, "c": 7}.items():
        lines = [json.dumps({"prompt": f"{name} {n}", "completion": "x"}) for n in range(count)]
        if name == "a":
            lines[::10] = ["{"] * 30
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return [str(folder / f"{name}.jsonl") for name in "abc"]


def name_of(item):
    return str(item.origin) if isinstance(item, RowRefused) else item.messages[0].content


def test_each_row_comes_once_and_evenly_spread(files):
    names = [name_of(item) for item in mix(files)]
    assert len(names) == len(set(names)) == 407
    first_half = Counter(name[0] for name in names[:200])
    assert abs(first_half["b"] - 50) <= 2
    in_order = [name for name in names if name.startswith("b")]
    assert in_order == [f"b {n}" for n in range(100)]


@pytest.mark.parametrize(("weight", "least", "most"), [(2.0, 2, 2), (0.5, 0, 1), (1.5, 1, 2), (3.25, 3, 4)])
def test_weight_is_the_number_of_uses(weight, least, most, files):
    mixed = mix(files, [1.0, weight, 1.0], seed=3)
    uses = Counter(name_of(item) for item in mixed)
    of_b = [uses[f"b {n}"] for n in range(100)]
    assert {*of_b} == {least, most}
    assert abs(sum(of_b) - 100 * weight) <= 3
    counts = mixed.counts[files[1]]
    assert counts.adds_up
    assert counts.read == 100
    assert counts.kept + counts.repeats == sum(of_b)


def test_copies_of_a_row_are_far_apart(files):
    names = [name_of(item) for item in mix(files[1], [2.0])]
    assert names == [f"b {n}" for n in range(100)] * 2


def test_refused_rows_come_once_and_the_counts_add_up(files):
    mixed = mix(files, [2.0, 1.0, 0.5])
    refused = [item for item in mixed if isinstance(item, RowRefused)]
    assert len(refused) == 30
    total = mixed.counts.total
    assert total.adds_up
    assert (total.read, total.refused) == (407, {"broken-json": 30})
    assert mixed.counts[files[0]].repeats == 270


def test_order_depends_on_the_seed_alone(files):
    def names(seed):
        return [name_of(item) for item in mix(files, [0.5, 0.5, 1.0], seed)]

    assert names(1) == names(1)
    assert names(1) != names(2)


def test_shards_share_the_mix(files):
    whole = Counter(name_of(item) for item in mix(files, [2.0, 1.0, 1.0]))
    shares = [mix(files, [2.0, 1.0, 1.0], shard=shard, num_shards=3) for shard in range(3)]
    assert sum((Counter(name_of(item) for item in share) for share in shares), Counter()) == whole
    merged = shares[0].counts
    for share in shares[1:]:
        merged.merge(share.counts)
    assert merged.total.adds_up
    assert merged.total.read == 407


def resumed(files, at, *, size=None, num_shards=1):
    """The items after position ``at``, by going on in a new object from a state that went through JSON."""

    def build():
        rows = MixedRows([DataSource(files[0], weight=1.5), files[1], files[2]], seed=5, shard=0, num_shards=num_shards)
        return (rows, rows) if size is None else (ShuffleBuffer(rows, size, seed=9), rows)

    first, first_rows = build()
    head = [name_of(next(first)) for _ in range(at)]
    state = json.loads(json.dumps(first.state_dict()))
    counts = first_rows.counts.state_dict()
    second, second_rows = build()
    second.load_state_dict(state)
    assert second_rows.counts.state_dict() == counts
    tail = [name_of(item) for item in second]
    whole, whole_rows = build()
    assert head + tail == [name_of(item) for item in whole]
    assert second_rows.counts.state_dict() == whole_rows.counts.state_dict()
    return head + tail


@pytest.mark.parametrize("at", [0, 1, 200, 407, 520])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_mix_goes_on_at_the_exact_row(at, num_shards, files):
    resumed(files, at // num_shards, num_shards=num_shards)


@settings(max_examples=15, deadline=None)
@given(at=st.integers(0, 520), size=st.integers(1, 700))
def test_a_shuffled_mix_goes_on_at_the_exact_row(at, size, files):
    resumed(files, at, size=size)


def test_shuffling_keeps_all_and_moves_most(files):
    plain = [name_of(item) for item in mix(files)]
    shuffled = [name_of(item) for item in ShuffleBuffer(mix(files), 64, seed=1)]
    assert sorted(shuffled) == sorted(plain)
    assert sum(a != b for a, b in zip(plain, shuffled, strict=True)) > 350
    assert all(abs(shuffled.index(name) - n) < 64 for n, name in enumerate(plain))
    assert shuffled != [name_of(item) for item in ShuffleBuffer(mix(files), 64, seed=2)]
    assert [name_of(item) for item in ShuffleBuffer(mix(files), 1)] == plain


def test_a_shuffle_buffer_holds_two_blocks_at_most(files):
    class Counted:
        taken = 0

        def __init__(self, rows):
            self.rows, self.state_dict = rows, rows.state_dict

        def __next__(self):
            self.taken += 1
            return next(self.rows)

    rows = Counted(mix(files))
    buffer = ShuffleBuffer(rows, 20)
    for given_out in range(1, 200):
        next(buffer)
        assert rows.taken - given_out <= 2 * 20


def test_a_state_of_another_mix_is_refused(files):
    state = mix(files).state_dict()
    for other in (mix(files, seed=1), mix(files[:2]), mix(files, [1, 1, 2]), mix(files, num_shards=2)):
        with pytest.raises(ValueError, match="another mix of data: .* differ"):
            other.load_state_dict(state)
    buffered = ShuffleBuffer(mix(files), 8).state_dict()
    with pytest.raises(ValueError, match="size 8 and seed 0; found size 9"):
        ShuffleBuffer(mix(files), 9).load_state_dict(buffered)


def test_values_out_of_range(files):
    with pytest.raises(ValueError, match="2 weights for 3 sources"):
        mix(files, [1.0, 2.0])
    with pytest.raises(ValueError, match="size is 0"):
        ShuffleBuffer(mix(files), 0)


@settings(max_examples=50, deadline=None)
@given(num_rows=st.integers(0, 500), weight=st.floats(0.01, 4), seed=st.integers(0, 9))
def test_weighted_indices(num_rows, weight, seed):
    indices = weighted_indices(num_rows, weight, seed)
    uses = Counter(indices)
    assert len(indices) == round(num_rows * weight)
    assert all(int(weight) <= uses[n] <= int(weight) + 1 for n in range(num_rows))
    assert indices == weighted_indices(num_rows, weight, seed)


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 0.97])
def test_a_stream_holds_its_fraction_at_any_length(fraction):
    sampled = [is_sampled(n, fraction, seed=4) for n in range(3000)]
    assert all(abs(sum(sampled[:n]) - n * fraction) <= 5 for n in range(3000))
    assert sampled != [is_sampled(n, fraction, seed=5) for n in range(3000)]
