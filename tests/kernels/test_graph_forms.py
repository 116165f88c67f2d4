"""Sizes of recorded batches: room for what they were made for, and padding to one size."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lightning_qlora.kernels.graph_forms import Form

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@given(LENGTHS, st.none() | st.integers(1, 9000))
@example([1, 2], None)
def test_a_form_has_room_for_the_documents_it_was_made_for_and_pads_them_to_its_size(lengths, most_tokens):
    form = Form.around(lengths, most_tokens=most_tokens)
    padded = form.padded(lengths)
    assert padded[: len(lengths)] == lengths
    assert (sum(padded), len(padded)) == (form.tokens, form.documents)
    assert max(padded) <= form.longest
    assert (len(set(padded)) == 1) == form.are_alike == (len(set(lengths)) == 1)
    assert max(form.largest()) == form.longest
    assert (sum(form.largest()), len(form.largest())) == (form.tokens, form.documents)
    assert (len(set(form.largest())) == 1) == form.are_alike


@given(LENGTHS, LENGTHS)
def test_a_later_form_has_room_for_what_the_one_before_was_made_for(one, two):
    form = Form.around(two, Form.around(one))
    assert form.padded(two) is not None
    assert form.padded(one) is not None or form.are_alike


def test_where_the_most_tokens_of_a_batch_are_known_no_more_are_padded():
    assert Form.around([700, 290], most_tokens=1000).tokens == 1000
    assert Form.around([700, 290], most_tokens=980).tokens == 1024  # a longer one all the same
    assert Form.around([700, 90], most_tokens=1000).tokens == 896  # others are perhaps as short


def test_many_small_documents_fit_behind_few_large_ones():
    lengths = [1, 2] * 7 + [1]
    assert Form.around(lengths, Form.around([300] * 31)).padded(lengths) is not None


@pytest.mark.parametrize("lengths", [[40] * 4, [50] * 3, [100], [50, 50, 1]])
def test_documents_of_one_length_are_recorded_as_the_batch_they_are(lengths):
    form = Form.around([50, 50], Form.around([30, 30]))
    assert form.padded([50, 50]) == form.padded([50]) == [50, 50]
    assert form.padded(lengths) is None
    assert not Form.around([50, 50], Form.around([30, 20])).are_alike
