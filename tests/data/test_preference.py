"""Pairs with explicit and implicit prompts, in every shape."""

from __future__ import annotations

import json

import pytest

from lightning_qlora.data.formats import parse_row
from lightning_qlora.data.json_values import BadRowError
from lightning_qlora.data.preference import parse_pair
from lightning_qlora.schema import Message, Origin, RowRefused

HI, HELLO, WHAT = Message("user", "Hi"), Message("assistant", "Hello"), Message("assistant", "What?")
USER, GOOD, BAD = ({"role": m.role, "content": m.content} for m in (HI, HELLO, WHAT))
BYE = {"role": "user", "content": "Bye"}
SYSTEM = {"role": "system", "content": "Be brief"}

SHAPES = {
    "texts": {"prompt": "Hi", "chosen": "Hello", "rejected": "What?"},
    "question column": {"question": "Hi", "chosen": "Hello", "rejected": "What?"},
    "instruction column": {"instruction": "Hi", "input": "", "chosen": "Hello", "rejected": "What?"},
    "prompt as messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "prompt as messages, answers as texts": {"messages": [USER], "chosen": "Hello", "rejected": "What?"},
    "whole conversations": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "whole conversations and their prompt": {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Hello"},
        "rejected": {"from": "gpt", "value": "What?"},
    },
    "UltraFeedback: the prompt, and the chosen conversation as messages": {
        "prompt": "Hi",
        "messages": [USER, GOOD],
        "chosen": [USER, GOOD],
        "rejected": [USER, BAD],
        "score_chosen": 8.5,
    },
    "the chosen conversation again as messages": {
        "messages": [USER, GOOD],
        "chosen": [USER, GOOD],
        "rejected": [USER, BAD],
    },
    "answers as JSON text": {"prompt": "Hi", "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
    "whole conversations as JSON text": {"chosen": json.dumps([USER, GOOD]), "rejected": json.dumps([USER, BAD])},
    "UltraFeedback as JSON text": {
        "prompt": "Hi",
        "messages": json.dumps([USER, GOOD]),
        "chosen": json.dumps([USER, GOOD]),
        "rejected": json.dumps([USER, BAD]),
    },
    "the chosen conversation again, as JSON text": {
        "messages": json.dumps([USER, GOOD]),
        "chosen": json.dumps([USER, GOOD]),
        "rejected": json.dumps([USER, BAD]),
    },
    "prompt as JSON text": {"prompt": json.dumps([USER]), "chosen": "Hello", "rejected": "What?"},
    "dialogues as text": {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Hello",
        "rejected": "\n\nHuman: Hi\n\nAssistant: What?",
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    row = parse_row(SHAPES[shape], Origin("f", 1), task="preference")
    assert (row.prompt, row.chosen, row.rejected) == ((HI,), (HELLO,), (WHAT,))


def test_answers_in_json_of_another_kind_are_texts():
    chosen, rejected = '[{"name": "Ann", "role": "CEO"}]', '[{"name": "Ann"}]'
    row = parse_row({"prompt": "Hi", "chosen": chosen, "rejected": rejected}, Origin("f", 1), task="preference")
    assert (row.chosen, row.rejected) == ((Message("assistant", chosen),), (Message("assistant", rejected),))


def test_turns_in_json_text_get_the_verdicts_of_turns():
    record = {"prompt": "Hi", "chosen": json.dumps([GOOD, {**BAD, "role": "narrator"}]), "rejected": "What?"}
    with pytest.raises(RowRefused, match="unknown-role"):
        parse_row(record, Origin("f", 1), task="preference")


def test_implicit_prompt_is_the_longest_shared_part():
    pair = parse_pair(None, [SYSTEM, USER, GOOD, BYE, GOOD], [SYSTEM, USER, GOOD, BYE, BAD])
    assert [message.role for message in pair.prompt] == ["system", "user", "assistant", "user"]
    assert (pair.chosen, pair.rejected) == ((HELLO,), (WHAT,))


def test_prompt_column_may_be_the_last_question():
    pair = parse_pair([Message("user", "Bye")], [USER, GOOD, BYE, GOOD], [USER, GOOD, BYE, BAD])
    assert len(pair.prompt) == 3


def test_columns_by_mapping():
    record = {"ask": "Hi", "good": "Hello", "bad": "What?", "prompt_id": 3}
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    row = parse_row(record, Origin("f", 1), task="preference", columns=columns)
    assert (row.prompt, row.chosen, row.rejected) == ((HI,), (HELLO,), (WHAT,))


def test_system_column_tools_and_template_variables():
    record = {**SHAPES["texts"], "system": "Be brief", "tools": [{"name": "f"}]}
    record["chat_template_kwargs"] = {"enable_thinking": False}
    row = parse_row(record, Origin("f", 1), task="preference")
    assert row.prompt[0] == Message("system", "Be brief")
    assert row.tools[0]["function"] == {"name": "f"}
    assert row.template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("reason", "prompt", "chosen", "rejected"),
    [
        ("no-prompt", None, "Hello", "What?"),
        ("no-prompt", None, [GOOD], [BAD]),
        ("empty-answer", [HI], "", "What?"),
        ("empty-answer", [HI], "Hello", None),
        ("empty-answer", None, [USER, GOOD], [USER]),
        ("no-shared-prompt", None, [USER, GOOD], [BAD]),
        ("no-shared-prompt", None, [USER, GOOD], [BYE, BAD]),
        ("no-shared-prompt", None, [USER, GOOD, BYE, GOOD], [USER, BAD]),
        ("prompt-mismatch", [Message("user", "Bye")], [USER, GOOD], [USER, BAD]),
        ("content-not-text", [HI], 3, "What?"),
        ("message-not-object", None, [USER, "Hello"], [USER, BAD]),
    ],
)
def test_refused_pairs(reason, prompt, chosen, rejected):
    with pytest.raises(BadRowError) as refused:
        parse_pair(prompt, chosen, rejected)
    assert refused.value.reason == reason
