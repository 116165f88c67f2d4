"""Counts that add up and do not depend on the order of merging."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qlora.data.accounting import RowCounts
from lightning_qlora.schema import Origin, RowRefused

EVENTS = st.lists(
    st.tuples(st.sampled_from(["a", "b"]), st.sampled_from(["kept", "left_out", "empty-answer", "broken-json"])),
    max_size=30,
)


def counted(events):
    counts = RowCounts()
    for line, (source, outcome) in events:
        counts[source].read += 1
        if outcome == "kept":
            counts[source].kept += 1
        elif outcome == "left_out":
            counts[source].left_out += 1
        else:
            counts[source].refuse(RowRefused(outcome, "found this", Origin(source, line)))
    return counts


@settings(max_examples=50, deadline=None)
@given(events=EVENTS, cut=st.integers(0, 30))
def test_shares_of_workers_merge_to_the_whole(events, cut):
    numbered = list(enumerate(events, 1))
    whole, left, right = counted(numbered), counted(numbered[:cut]), counted(numbered[cut:])

    right.merge(left)

    assert right.state_dict() == {name: whole.state_dict()[name] for name in right.sources}
    assert whole.total.adds_up
    assert whole.total.read == len(events)
    assert RowCounts.from_state(whole.state_dict()).state_dict() == whole.state_dict()


def test_a_row_without_a_verdict_is_noticed():
    counts = counted(enumerate([("a", "kept"), ("a", "broken-json")], 1))
    counts["a"].read += 1
    assert not counts.total.adds_up


def test_the_text_names_reasons_and_the_first_place():
    text = str(counted(enumerate([("a", "kept"), ("a", "broken-json"), ("a", "broken-json"), ("a", "left_out")], 1)))
    assert "a: 4 read, 1 kept, 2 refused, 1 left out by weight" in text
    assert "broken-json: 2, first a:2: found this" in text


def test_a_restored_copy_is_independent():
    counts = counted([(1, ("a", "broken-json"))])
    state = counts.state_dict()
    RowCounts.from_state(state)["a"].refuse(RowRefused("broken-json", "another", Origin("a", 2)))
    assert state == counts.state_dict()
