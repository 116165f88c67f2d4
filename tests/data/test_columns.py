"""Columns of any name, and none of them lost without a word."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_qlora.data.columns import COLUMNS, check_columns
from lightning_qlora.data.formats import FORMATS, TASKS, parse_row
from lightning_qlora.schema import Message, Origin, RowRefused

ORIGIN = Origin("rows.jsonl", 7)
USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
HI, HELLO = Message("user", "Hi"), Message("assistant", "Hello")

COLUMN_CASES = {
    "single turn": ({"q": "Hi", "a": "Hello", "text": "noise"}, {"prompt": "q", "completion": "a"}, (HI, HELLO)),
    "swapped names": ({"input": "Hello", "output": "Hi"}, {"prompt": "output", "completion": "input"}, (HI, HELLO)),
    "messages": ({"dialogue": [USER, ASSISTANT], "tools": []}, {"messages": "dialogue"}, (HI, HELLO)),
    "keys of messages": (
        {"turns": [{"speaker": "user", "said": "Hi"}, {"speaker": "bot", "said": "Hello"}]},
        {"messages": "turns", "role": "speaker", "content": "said"},
        (HI, HELLO),
    ),
    "alpaca": ({"task": "Hi", "result": "Hello"}, {"instruction": "task", "output": "result"}, (HI, HELLO)),
}


@pytest.mark.parametrize("case", COLUMN_CASES)
def test_columns(case):
    record, columns, expected = COLUMN_CASES[case]
    check_columns(columns)
    assert parse_row(record, ORIGIN, columns=columns).messages == expected


def test_unknown_field_in_columns_is_an_error_of_the_configuration():
    with pytest.raises(ValueError, match=r"'promt'.*Allowed.*prompt, completion"):
        check_columns({"promt": "q"})


def test_reasoning_of_an_instruction():
    columns = {"instruction": "q", "output": "a", "reasoning": "cot"}
    row = parse_row({"q": "Hi", "a": "Hello", "cot": "Greet."}, ORIGIN, columns=columns)
    assert row.messages == (HI, Message("assistant", "Hello", reasoning="Greet."))


PAIRS = {"task": "preference"}
UNREAD = {
    "input of a prompt": ({"prompt": "q", "input": "x", "completion": "a"}, "input", {}),
    "another answer": ({"prompt": "q", "output": "x", "completion": "a"}, "output", {}),
    "reasoning of messages": ({"messages": "chat", "reasoning": "x"}, "reasoning", {}),
    "reasoning of a pair": ({"prompt": "q", "chosen": "a", "rejected": "b", "reasoning": "x"}, "reasoning", PAIRS),
    "input of a pair": ({"prompt": "q", "chosen": "a", "rejected": "b", "input": "x"}, "input", PAIRS),
    "system of raw text": ({"text": "q", "system": "x"}, "system", {}),
    "a label that is a class": ({"prompt": "q", "completion": "a", "label": "x"}, "label", {}),
    "a label of a chosen format": (
        {"prompt": "q", "completion": "a", "label": "good"},
        "label",
        {"format": "prompt_completion"},
    ),
}
RECORD = {"q": "Hi", "a": "Hello", "b": "What?", "x": "more", "good": False, "chat": [USER, ASSISTANT]}


@pytest.mark.parametrize("case", UNREAD)
def test_a_mapped_column_that_the_shape_does_not_read_is_refused(case):
    columns, field, options = UNREAD[case]
    with pytest.raises(RowRefused, match=rf"unread-column: columns maps '{field}', which the shape \w+ does not read"):
        parse_row(RECORD, ORIGIN, columns=columns, **options)

    column = columns[field]
    for nothing in (None, ""):
        parse_row({**RECORD, column: nothing}, ORIGIN, columns=columns, **options)


@given(
    fields=st.sets(st.sampled_from([name for name in COLUMNS if name not in ("role", "content", "label")]), max_size=5),
    shape=st.sampled_from(FORMATS),
    task=st.sampled_from(TASKS),
)
def test_every_mapped_text_is_in_the_row_or_the_row_is_refused(fields, shape, task):
    record = {f"my {field}": f"<{field}>" for field in fields}
    try:
        row = parse_row(record, ORIGIN, format=shape, columns={field: f"my {field}" for field in fields}, task=task)
    except RowRefused:
        return
    kept = repr(row)
    unsaid = {"rejected"} if task == "sft" else set()
    assert all(f"<{field}>" in kept for field in fields - unsaid)
