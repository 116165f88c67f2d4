from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qlora.data.collators import (
    Document,
    PackedCollator,
    PaddedCollator,
    PromptCollator,
    expand_spans,
    spans_of,
)
from lightning_qlora.schema import IGNORE_INDEX, Origin, SFTBatch, TokenizedRow

Flags = list[bool]


@st.composite
def rows(draw: st.DrawFn) -> list[tuple[list[int], Flags]]:
    """Token ids (0 included, which is also the padding) with supervision; the first token never supervised."""
    result = []
    for _ in range(draw(st.integers(1, 5))):
        flags = draw(st.lists(st.booleans(), min_size=1, max_size=12))
        flags[0] = False
        result.append((draw(st.lists(st.integers(0, 3), min_size=len(flags), max_size=len(flags))), flags))
    return result


def as_documents(rows: list[tuple[list[int], Flags]]) -> list[Document]:
    return [Document.from_row(TokenizedRow(ids, flags, Origin("x", i)), i) for i, (ids, flags) in enumerate(rows)]


def expected_targets(rows: list[tuple[list[int], Flags]], starts: list[int]) -> tuple[list[int], list[int]]:
    """(positions, targets) by the definition: position t predicts the supervised token t + 1 of its document."""
    positions, targets = [], []
    for (ids, flags), start in zip(rows, starts, strict=True):
        for t in range(len(ids) - 1):
            if flags[t + 1]:
                positions.append(start + t)
                targets.append(ids[t + 1])
    return positions, targets


def check_consistent(batch: SFTBatch) -> None:
    """What every consumer relies on, whichever the layout."""
    assert batch["labels"].shape == batch["input_ids"].shape == batch["position_ids"].shape
    flat_ids, flat_labels = batch["input_ids"].reshape(-1), batch["labels"].reshape(-1)
    assert torch.equal(flat_ids[batch["target_positions"] + 1], batch["targets"])
    assert int((flat_labels != IGNORE_INDEX).sum()) == len(batch["targets"]) == len(batch["target_positions"])
    assert torch.equal(flat_labels[flat_labels != IGNORE_INDEX], batch["targets"])
    for name in ("input_ids", "position_ids", "labels", "target_positions", "targets"):
        assert batch[name].dtype == torch.int64
        assert batch[name].is_contiguous()
    assert all(type(n) is int for n in (*batch["document_lengths"], *batch["row_ids"]))


@settings(max_examples=80, deadline=None)
@given(rows(), st.none() | st.integers(1, 9))
def test_packed_batch_follows_its_definition(rows, multiple):
    batch = PackedCollator(pad_to_multiple_of=multiple)(as_documents(rows))
    check_consistent(batch)
    lengths = [len(ids) for ids, _ in rows]
    total = sum(lengths)
    padding = -total % multiple if multiple else 0
    starts = np.cumsum([0, *lengths]).tolist()
    assert batch["attention_mask"] is None
    assert batch["input_ids"].shape == (1, total + padding)
    assert batch["input_ids"][0, :total].tolist() == [t for ids, _ in rows for t in ids]
    documents = [*lengths, *([padding] if padding else [])]
    assert batch["document_lengths"] == tuple(documents)
    assert batch["position_ids"][0].tolist() == [p for n in documents for p in range(n)]
    assert batch["cu_seq_lens"].dtype == torch.int32
    assert batch["cu_seq_lens"].tolist() == np.cumsum([0, *documents]).tolist()
    assert batch["row_ids"] == (*range(len(rows)), *([-1] if padding else []))
    positions, targets = expected_targets(rows, starts[:-1])
    assert batch["target_positions"].tolist() == positions
    assert batch["targets"].tolist() == targets


@settings(max_examples=80, deadline=None)
@given(rows(), st.none() | st.integers(1, 9))
def test_padded_batch_follows_its_definition(rows, multiple):
    batch = PaddedCollator(pad_to_multiple_of=multiple)(as_documents(rows))
    check_consistent(batch)
    lengths = [len(ids) for ids, _ in rows]
    width = max(lengths) + (-max(lengths) % multiple if multiple else 0)
    assert batch["input_ids"].shape == (len(rows), width)
    assert batch["cu_seq_lens"] is None
    assert batch["document_lengths"] == tuple(lengths)
    assert batch["row_ids"] == tuple(range(len(rows)))
    for row, (ids, flags) in enumerate(rows):
        tail = width - len(ids)
        assert batch["input_ids"][row].tolist() == ids + [0] * tail
        assert batch["attention_mask"][row].tolist() == [1] * len(ids) + [0] * tail
        labels = [t if f else IGNORE_INDEX for t, f in zip(ids, flags, strict=True)]
        assert batch["labels"][row].tolist() == labels + [IGNORE_INDEX] * tail
        assert batch["position_ids"][row, : len(ids)].tolist() == list(range(len(ids)))
    positions, targets = expected_targets(rows, [i * width for i in range(len(rows))])
    assert batch["target_positions"].tolist() == positions
    assert batch["targets"].tolist() == targets


def test_padding_that_equals_a_supervised_token_is_masked_by_position():
    eos = 2
    documents = as_documents([([1, 5, eos], [False, True, True]), ([1, eos], [False, True])])
    batch = PaddedCollator(pad_token_id=eos)(documents)
    assert batch["input_ids"].tolist() == [[1, 5, eos], [1, eos, eos]]
    assert batch["labels"].tolist() == [[-100, 5, eos], [-100, eos, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize("collator", [PackedCollator(), PaddedCollator()])
def test_filler_supervises_nothing(collator):
    batch = collator([Document.filler(7)])
    assert batch["input_ids"].tolist() == [[7]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX]]
    assert batch["targets"].shape == batch["target_positions"].shape == (0,)
    assert batch["targets"].dtype == torch.int64
    assert batch["row_ids"] == (-1,)
    assert batch["document_lengths"] == (1,)


@pytest.mark.parametrize("collator", [PackedCollator(), PaddedCollator()])
def test_a_supervised_first_token_is_left_out_of_labels_and_targets_alike(collator):
    second = Document(np.asarray([8, 9]), np.asarray([[0, 2]]), 1)
    batch = collator([Document(np.asarray([6, 7]), np.empty((0, 2), np.int32), 0), second])
    check_consistent(batch)
    assert batch["targets"].tolist() == [9]


@given(st.lists(st.booleans(), max_size=30))
def test_spans_are_the_inverse_of_their_expansion(flags):
    spans = spans_of(flags)
    assert spans.shape[1] == 2
    assert expand_spans(spans).tolist() == [i for i, f in enumerate(flags) if f]
    assert all(a < b for a, b in spans)
    assert all(spans[i, 1] < spans[i + 1, 0] for i in range(len(spans) - 1))


def test_prompts_are_padded_on_the_left():
    questions = [{"prompt": "a"}, {"prompt": "b", "id": 7}]
    batch = PromptCollator(pad_token_id=0)([([1, 0, 3], questions[0]), ([4], questions[1])])
    assert batch["input_ids"].tolist() == [[1, 0, 3], [0, 0, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["rows"] == tuple(questions)


@pytest.mark.parametrize("collator", [PackedCollator, PaddedCollator])
def test_multiple_must_be_positive(collator):
    with pytest.raises(ValueError, match="pad_to_multiple_of is 0"):
        collator(pad_to_multiple_of=0)
