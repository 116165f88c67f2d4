"""Rows of answers as numbered documents, their positions, their mismatched answers, and plans of them."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qlora.data.answer_documents import AnswerDocuments, choose_partners
from lightning_qlora.data.collators import AnswerKind, Document
from lightning_qlora.data.preference_batching import PreferenceBatching
from lightning_qlora.data.prepared import DocumentBatch, DocumentWriter, PreparedDocuments
from lightning_qlora.schema import Origin

MAX_LENGTH = 24


def write(folder: Path, rows: list[tuple[int, list[int]]]) -> PreparedDocuments:
    """Store rows of a prompt's and one or two answers' lengths; every token tells whose it is."""
    writer = DocumentWriter(folder / "documents.arrow")
    stored = 0
    for number, (prompt, answers) in enumerate(rows):
        kinds = [AnswerKind.CHOSEN, AnswerKind.REJECTED]
        kinds = kinds if len(answers) == 2 else [AnswerKind.UNDESIRABLE if number % 2 else AnswerKind.DESIRABLE]
        documents = []
        for answer, kind in zip(answers, kinds, strict=True):
            ids = np.asarray([1000 + number] * prompt + [2000 + stored] * answer, dtype=np.int32)
            documents.append(Document(ids, np.asarray([[prompt, prompt + answer]], dtype=np.int32), -1, kind))
            stored += 1
        writer.write(DocumentBatch.of(documents, [Origin("rows.jsonl", number + 1)] * len(documents), 0))
    writer.close()
    return PreparedDocuments(folder / "documents.arrow", writer.sources)


LENGTHS = st.integers(1, MAX_LENGTH // 2)
ROWS = st.lists(st.tuples(LENGTHS, st.lists(LENGTHS, min_size=1, max_size=2)), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, mismatched=st.booleans(), packing=st.booleans(), share=st.booleans(), data=st.data())
def test_any_rows_are_laid_out_whole_within_the_budget(rows, mismatched, packing, share, data):
    share = share and packing
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=25))
    budget, size = 3 * MAX_LENGTH, 3
    with tempfile.TemporaryDirectory() as folder:
        prepared = write(Path(folder), rows)
        partners = choose_partners(prepared, np.asarray(chosen), MAX_LENGTH) if mismatched else None
        documents = AnswerDocuments(prepared, partners)
        batching = PreferenceBatching(packing, budget, size, share_prompts=share)
        plan = batching.plan_rows(documents, np.asarray(chosen), 0)
        planned = []
        for numbers in plan:
            batch = batching.collate([documents[int(number)] for number in numbers])
            positions = batch["input_ids"].numel()
            assert positions <= budget
            firsts = [int(n) for n in numbers if n < len(prepared) and prepared.kinds[n] != AnswerKind.REJECTED]
            own = [int(np.searchsorted(prepared.row_offsets, first, side="right")) - 1 for first in firsts]
            planned += own
            expected = []
            for row in own:
                expected += range(prepared.row_offsets[row], prepared.row_offsets[row + 1])
                if partners is not None and partners[row] >= 0:
                    expected.append(len(prepared) + row)
            assert numbers.tolist() == list(batch["row_ids"]) == expected
            lengths = documents.lengths[numbers]
            if packing:
                assert positions == documents.positions(share_prompts=share)[numbers].sum()
            else:
                assert positions == max(lengths) * len(numbers)
                assert len(own) <= size
            prompts = [rows[documents.origin(int(number)).line - 1][0] for number in numbers]
            assert batch["num_targets"] == tuple((lengths - prompts).tolist())
        assert sorted(planned) == sorted(chosen)
        assert plan.capacity >= plan.num_tokens > 0


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, seed=st.integers(0, 3))
def test_mismatched_answers_are_of_other_prompts_and_fit(rows, seed):
    with tempfile.TemporaryDirectory() as folder:
        prepared = write(Path(folder), rows)
        used = np.arange(0, len(rows), 2)
        partners = choose_partners(prepared, used, MAX_LENGTH, seed=seed)
        assert partners.tolist() == choose_partners(prepared, np.repeat(used, 2), MAX_LENGTH, seed=seed).tolist()
        documents = pickle.loads(pickle.dumps(AnswerDocuments(prepared, partners)))
        for row in range(len(rows)):
            number = len(prepared) + row
            if partners[row] < 0:
                assert row % 2 or len(used) == 1 or documents.lengths[number] == 0
                with pytest.raises(IndexError):
                    documents[number]
                continue
            document = documents[number]
            other = int(np.searchsorted(prepared.row_offsets, partners[row], side="right")) - 1
            assert row != other
            assert {row % 2, other % 2} == {0}
            prompt, answer = rows[row][0], len(document.input_ids) - rows[row][0]
            assert document.input_ids.tolist() == [1000 + row] * prompt + [2000 + partners[row]] * answer
            assert document.supervised.tolist() == [[prompt, prompt + answer]]
            assert (document.kind, document.row_id) == (AnswerKind.MISMATCHED, number)
            assert len(document.input_ids) == documents.lengths[number] <= MAX_LENGTH
            assert documents.origin(number).line == row + 1
        if len(used) > 1:  # every answer fits behind every prompt
            assert (partners[used] >= 0).all()


def test_prompts_without_a_fitting_answer_have_no_mismatch(tmp_path):
    prepared = write(tmp_path, [(20, [2]), (3, [9]), (3, [9])])
    partners = choose_partners(prepared, np.arange(3), MAX_LENGTH)
    assert partners[0] == -1
    assert (partners[1:] >= 0).all()
    documents = AnswerDocuments(prepared, partners)
    assert documents.by_row()[0].tolist() == [0, 1, 4, 2, 5]
    assert documents.by_row()[1].tolist() == [0, 1, 3, 5]
