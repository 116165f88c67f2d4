"""Every shape of a good row, and the documented verdict on every bad one."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qlora.data import columns, formats, json_values, messages, preference, readers, tables
from lightning_qlora.data.columns import COLUMNS
from lightning_qlora.data.formats import FORMATS, TASKS, parse_row, recognise_format
from lightning_qlora.schema import Completion, Conversation, Message, Origin, PreferenceRow, RowRefused, UnpairedRow

ORIGIN = Origin("rows.jsonl", 7)
USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
HI, HELLO = Message("user", "Hi"), Message("assistant", "Hello")
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": "{}"}}],
}


def deep(levels: int) -> object:
    value: object = "x"
    for _ in range(levels):
        value = [value]
    return value


GOOD = {
    "messages": ({"messages": [USER, ASSISTANT]}, "messages", (HI, HELLO)),
    "messages under conversations": ({"conversations": [USER, ASSISTANT]}, "messages", (HI, HELLO)),
    "messages as JSON text": (
        {"messages": '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]'},
        "messages",
        (HI, HELLO),
    ),
    "system column": (
        {"system": "Be brief", "messages": [USER, ASSISTANT]},
        "messages",
        (Message("system", "Be brief"), HI, HELLO),
    ),
    "turns after the last answer": ({"messages": [USER, ASSISTANT, USER]}, "messages", (HI, HELLO)),
    "several turns of one role": (
        {"messages": [USER, USER, ASSISTANT, ASSISTANT]},
        "messages",
        (HI, HI, HELLO, HELLO),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        "sharegpt",
        (HI, HELLO),
    ),
    "alpaca": (
        {"instruction": "Translate", "input": "Hi", "output": "Hallo"},
        "alpaca",
        (Message("user", "Translate\n\nHi"), Message("assistant", "Hallo")),
    ),
    "alpaca without input": (
        {"instruction": "Hi", "input": "", "output": "Hello", "system": ""},
        "alpaca",
        (HI, HELLO),
    ),
    "alpaca with history": (
        {"instruction": "Bye", "output": "Ciao", "history": [["Hi", "Hello"]], "system": "Be brief"},
        "alpaca",
        (Message("system", "Be brief"), HI, HELLO, Message("user", "Bye"), Message("assistant", "Ciao")),
    ),
    "alpaca with an answer": ({"instruction": "Hi", "answer": "Hello"}, "alpaca", (HI, HELLO)),
    "alpaca with input and answer": (
        {"instruction": "Translate", "input": "Hi", "answer": "Hallo"},
        "alpaca",
        (Message("user", "Translate\n\nHi"), Message("assistant", "Hallo")),
    ),
    "instruction and query": (
        {"instruction": "Translate", "query": "Hi", "answer": "Hallo"},
        "alpaca",
        (Message("user", "Translate\n\nHi"), Message("assistant", "Hallo")),
    ),
    "instruction, context and question": (
        {"instruction": "Read", "context": "Facts", "question": "Who?", "response": "Ann"},
        "alpaca",
        (Message("user", "Read\n\nFacts\n\nWho?"), Message("assistant", "Ann")),
    ),
    "instruction and prompt": (
        {"instruction": "Translate", "prompt": "Hi", "answer": "Hallo"},
        "alpaca",
        (Message("user", "Translate\n\nHi"), Message("assistant", "Hallo")),
    ),
    "alpaca written out as prompt": (
        {"instruction": "Hi", "output": "Hello", "prompt": "### Instruction:\nHi\n\n### Response:"},
        "alpaca",
        (HI, HELLO),
    ),
    "alpaca with reasoning": (
        {"instruction": "Hi", "reasoning": "Greet.", "output": "Hello"},
        "alpaca",
        (HI, Message("assistant", "Hello", reasoning="Greet.")),
    ),
    "prompt and completion": ({"prompt": "Hi", "completion": "Hello"}, "prompt_completion", (HI, HELLO)),
    "question and answer": ({"question": "Hi", "answer": "Hello", "id": 3}, "prompt_completion", (HI, HELLO)),
    "prompt and completion as messages": (
        {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
        "prompt_completion",
        (HI, Message("assistant", "Hello", train=False), HI, HELLO),
    ),
    "prompt and completion as messages in JSON text": (
        {"prompt": json.dumps([USER]), "completion": f"\n{json.dumps([ASSISTANT])} "},
        "prompt_completion",
        (HI, HELLO),
    ),
    "prompt as messages, completion as text": (
        {"prompt": [USER], "completion": "Hello"},
        "prompt_completion",
        (HI, HELLO),
    ),
    "completion with reasoning": (
        {"prompt": "Hi", "reasoning": "Greet.", "completion": "Hello"},
        "prompt_completion",
        (HI, Message("assistant", "Hello", reasoning="Greet.")),
    ),
    "null columns of other shapes": (
        {"messages": None, "text": None, "prompt": "Hi", "completion": "Hello"},
        "prompt_completion",
        (HI, HELLO),
    ),
}


@pytest.mark.parametrize("case", GOOD)
def test_good_row_is_recognised_and_converted(case):
    record, shape, expected = GOOD[case]

    assert recognise_format(record) == shape
    row = parse_row(record, ORIGIN)

    assert isinstance(row, Conversation)
    assert row.messages == expected
    assert row.origin == ORIGIN
    assert parse_row(record, ORIGIN, format=shape) == row


def test_raw_text():
    assert recognise_format({"text": "Once"}) == "text"
    assert parse_row({"text": " Once\n"}, ORIGIN) == Completion("", " Once\n", ORIGIN)
    raw = parse_row({"prompt": "1+1=", "completion": " 2"}, ORIGIN, format="raw_completion")
    assert raw == Completion("1+1=", " 2", ORIGIN)


def test_tools_and_template_variables():
    schema = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
    record = {"messages": [USER, ASSISTANT], "tools": [schema], "chat_template_kwargs": {"enable_thinking": False}}

    row = parse_row(record, ORIGIN)

    assert row.tools == ({"type": "function", "function": schema},)
    assert row.template_kwargs == {"enable_thinking": False}


PAIR = {"prompt": "Hi", "chosen": "Hello", "rejected": "What?"}


def test_pair_for_each_task():
    row = parse_row(PAIR, ORIGIN, task="preference")
    assert row == PreferenceRow((HI,), (HELLO,), (Message("assistant", "What?"),), ORIGIN)

    supervised = parse_row(PAIR, ORIGIN, task="sft", format="preference")
    assert isinstance(supervised, Conversation)
    assert supervised.messages == (HI, HELLO)
    assert parse_row(PAIR, ORIGIN, task="unpaired") == row


JUDGED = {
    "texts": {"prompt": "Hi", "completion": "Hello", "label": True},
    "turns": {"prompt": [USER], "completion": [ASSISTANT], "label": True},
    "messages": {"messages": [USER, ASSISTANT], "label": True},
    "a number": {"messages": [USER, ASSISTANT], "label": 1},
    "a number with a point": {"messages": [USER, ASSISTANT], "label": 1.0},
    "a text": {"prompt": "Hi", "completion": "Hello", "label": "True"},
    "a number as text": {"prompt": "Hi", "completion": "Hello", "label": "1"},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "label": True},
    "alpaca": {"instruction": "Hi", "output": "Hello", "label": True},
}


@pytest.mark.parametrize("shape", JUDGED)
def test_judged_answers(shape):
    for found in (
        parse_row(JUDGED[shape], ORIGIN, task="unpaired"),
        parse_row(JUDGED[shape], ORIGIN, task="unpaired", format="unpaired"),
    ):
        assert found == UnpairedRow((HI,), (HELLO,), True, ORIGIN)


def test_a_judged_answer_ends_a_chat_and_may_call_tools():
    result = {"role": "tool", "content": "3"}
    record = {"messages": [USER, ASSISTANT, USER, CALL, result, ASSISTANT], "good": False}
    row = parse_row(record, ORIGIN, task="unpaired", columns={"label": "good"})
    assert [message.role for message in row.prompt] == ["user", "assistant", "user"]
    assert [message.role for message in row.completion] == ["assistant", "tool", "assistant"]
    assert not row.desirable


def test_supervised_runs_learn_answers_that_were_judged_good():
    row = parse_row({"messages": [USER, ASSISTANT, USER, ASSISTANT], "label": True}, ORIGIN)
    assert [message.train for message in row.messages] == [None, False, None, None]


CLASSES = st.text(max_size=6) | st.integers() | st.floats() | st.none() | st.lists(st.booleans(), max_size=1)


def is_class(label):
    judges = ("0", "1", "0.0", "1.0", "true", "false") if isinstance(label, str) else (0, 1)
    return (label.strip().lower() if isinstance(label, str) else label) not in judges


@given(label=CLASSES.filter(is_class))
def test_a_label_that_is_a_class_says_nothing_about_the_answer(label):
    record = {"prompt": "Hi", "completion": "Hello", "label": label}
    assert recognise_format(record) == "prompt_completion"
    assert parse_row(record, ORIGIN).messages == (HI, HELLO)


@pytest.mark.parametrize("label", [False, 0, 0.0, -0.0, "false", "False", " FALSE ", "0", "0.0"])
def test_every_way_to_write_a_bad_answer(label):
    record = {"prompt": "Hi", "completion": "Hello", "label": label}
    assert not parse_row(record, ORIGIN, task="unpaired").desirable
    with pytest.raises(RowRefused, match=r"unwanted-answer.*format: prompt_completion"):
        parse_row(record, ORIGIN)
    # The way out where the label is a class after all.
    assert parse_row(record, ORIGIN, format="prompt_completion").messages == (HI, HELLO)


ABOUT_CHATS = {
    "an object of another kind": [{"name": "Ann", "role": "CEO"}],
    "a journey": [{"from": "Berlin", "to": "Paris"}],
    "an exchange rate": [{"from": "EUR", "to": "USD", "value": 1.1}],
    "a whole chat": [USER, ASSISTANT],
    "turns and others": [ASSISTANT, {"note": "x"}],
    "numbers": [1, 2],
    "nothing": [],
    "an object": ASSISTANT,
}


@pytest.mark.parametrize("case", ABOUT_CHATS)
def test_json_that_is_no_part_of_a_chat_stays_text(case):
    text = json.dumps(ABOUT_CHATS[case])
    assert parse_row({"prompt": "Hi", "completion": text}, ORIGIN).messages[1].content == text
    assert parse_row({"prompt": text, "completion": "Hello"}, ORIGIN).messages[0].content == text


@given(
    text=st.text(st.sampled_from('[{"role:,x\\}]'), max_size=30).map(lambda text: "x[" + text) | st.text(max_size=30)
)
def test_other_texts_pass_unchanged(text):
    row = row_or_verdict({"prompt": "Hi", "completion": text}, "auto", "sft")
    assert isinstance(row, RowRefused) or row.messages[1].content == text


def test_answers_in_the_prompt_of_a_pair_are_context():
    record = {"prompt": [USER, ASSISTANT, USER], "chosen": "Bye", "rejected": "No"}
    row = parse_row(record, ORIGIN, format="preference")
    assert [message.train for message in row.messages] == [None, False, None, None]


def test_equal_answers_are_no_pair_but_supervise():
    record = {"prompt": "Hi", "chosen": "Hello", "rejected": "Hello"}
    assert parse_row(record, ORIGIN, format="preference").messages == (HI, HELLO)


def test_unknown_format_is_an_error_of_the_configuration():
    with pytest.raises(ValueError, match="'chatml'; allowed: auto, messages"):
        parse_row({"text": "x"}, ORIGIN, format="chatml")


def chat(*turns, **columns):
    return {"messages": list(turns), **columns}


VERDICTS = [
    ("not-an-object", ["Hi"], {}),
    ("not-an-object", None, {}),
    ("unknown-shape", {"foo": 1, "bar": 2}, {}),
    ("unknown-shape", {}, {}),
    ("missing-column", {"q": "Hi"}, {"columns": {"prompt": "q", "completion": "a"}}),
    ("missing-column", {"text": "Hi"}, {"format": "alpaca"}),
    ("missing-column", {"text": "Hi"}, {"format": "messages"}),
    ("unread-column", {"instruction": "Translate", "input": "Hi", "answer": "x"}, {"format": "prompt_completion"}),
    ("unread-column", {"instruction": "Translate", "input": "Hi", "answer": "x"}, {"format": "raw_completion"}),
    ("not-a-pair", chat(USER, ASSISTANT), {"task": "preference"}),
    ("not-a-pair", JUDGED["texts"], {"task": "preference"}),
    ("not-a-pair", {"text": "Hi"}, {"task": "unpaired"}),
    ("pair-for-supervised-run", PAIR, {}),
    ("no-label", chat(USER, ASSISTANT), {"task": "unpaired"}),
    ("no-label", {**JUDGED["texts"], "label": None}, {"task": "unpaired"}),
    ("bad-label", {**JUDGED["texts"], "label": "good"}, {"task": "unpaired"}),
    ("bad-label", {**JUDGED["texts"], "label": 0.5}, {"task": "unpaired"}),
    ("missing-column", {"text": "Hi", "label": True}, {"task": "unpaired", "format": "unpaired"}),
    ("unwanted-answer", {"messages": [USER, ASSISTANT], "label": False}, {}),
    ("messages-not-list", {"messages": {"role": "user"}}, {}),
    ("messages-not-list", {"messages": "Hi"}, {}),
    ("no-messages", chat(), {}),
    ("message-not-object", chat("Hi", "Hello"), {}),
    ("missing-role", chat({"content": "Hi"}, ASSISTANT), {}),
    ("unknown-role", chat({"role": "narrator", "content": "Hi"}, ASSISTANT), {}),
    ("unknown-role", chat({"role": 3, "content": "Hi"}, ASSISTANT), {}),
    ("missing-content", chat(USER, {"role": "assistant", "content": None}), {}),
    ("missing-content", chat({"role": "user"}, ASSISTANT), {}),
    ("content-not-text", chat({"role": "user", "content": 42}, ASSISTANT), {}),
    ("content-not-text", chat({"role": "user", "content": {"text": "Hi"}}, ASSISTANT), {}),
    ("content-not-text", chat({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ASSISTANT), {}),
    ("content-not-text", {"prompt": "Hi", "completion": 4}, {}),
    ("empty-answer", chat(USER, {"role": "assistant", "content": " \n"}), {}),
    ("empty-answer", {"prompt": "Hi", "completion": ""}, {}),
    ("empty-answer", {"instruction": "Hi", "output": None}, {}),
    ("empty-answer", {"prompt": "Hi", "completion": ""}, {"format": "raw_completion"}),
    ("unwanted-answer", {"prompt": "Hi", "completion": "Go away", "label": False}, {}),
    ("empty-user-turn", chat({"role": "user", "content": ""}, ASSISTANT), {}),
    ("empty-user-turn", {"instruction": "", "input": " ", "output": "Hello"}, {}),
    ("empty-text", {"text": " \n"}, {}),
    ("lone-system", chat({"role": "system", "content": "Be brief"}), {}),
    ("second-system-turn", chat({"role": "system", "content": "a"}, {"role": "system", "content": "b"}, USER), {}),
    ("second-system-turn", chat({"role": "system", "content": "a"}, USER, ASSISTANT, system="b"), {}),
    ("system-not-first", chat(USER, {"role": "developer", "content": "a"}, ASSISTANT), {}),
    ("assistant-first", chat(ASSISTANT, USER, ASSISTANT), {}),
    ("assistant-first", chat({"role": "system", "content": "a"}, ASSISTANT), {}),
    ("no-assistant-turn", chat(USER, USER), {}),
    ("nothing-supervised", chat(USER, {**ASSISTANT, "train": False}), {}),
    ("bad-weight", chat(USER, {**ASSISTANT, "weight": 0.5}), {}),
    ("bad-weight", chat(USER, {**ASSISTANT, "weight": "1"}), {}),
    ("bad-weight", chat(USER, {**ASSISTANT, "weight": 1, "train": False}), {}),
    ("trained-prompt", chat({**USER, "train": True}, ASSISTANT), {}),
    ("reasoning-outside-assistant", chat({**USER, "reasoning_content": "Hm"}, ASSISTANT), {}),
    ("bad-tool-call", chat(USER, {"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}), {}),
    ("bad-tool-call", chat(USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}), {}),
    ("bad-tool-call", chat(USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}), {}),
    ("bad-tool-call", chat({**USER, "tool_calls": CALL["tool_calls"]}, ASSISTANT), {}),
    ("tool-without-call", chat(USER, {"role": "tool", "content": "4"}, ASSISTANT), {}),
    ("tool-without-call", chat({"role": "tool", "content": "4"}, ASSISTANT), {}),
    ("tool-without-call", chat(USER, CALL, {"role": "tool", "tool_call_id": "c2", "content": "4"}, ASSISTANT), {}),
    ("bad-tools", chat(USER, ASSISTANT, tools="{"), {}),
    ("bad-tools", chat(USER, ASSISTANT, tools={"name": "f"}), {}),
    ("bad-tools", chat(USER, ASSISTANT, tools=[{"description": "no name"}]), {}),
    ("bad-template-kwargs", chat(USER, ASSISTANT, chat_template_kwargs=["x"]), {}),
    ("bad-template-kwargs", chat(USER, ASSISTANT, chat_template_kwargs={"messages": []}), {}),
    ("bad-history", {"instruction": "Hi", "output": "Hello", "history": [["one"]]}, {}),
    ("bad-history", {"instruction": "Hi", "output": "Hello", "history": "Hi"}, {}),
    ("no-prompt", {"chosen": "Hello", "rejected": "What?"}, {"task": "preference"}),
    ("prompt-mismatch", {"prompt": "Bye", "chosen": [USER, ASSISTANT], "rejected": [USER, CALL]}, {}),
    ("no-shared-prompt", {"chosen": [USER, ASSISTANT], "rejected": [{**USER, "content": "Bye"}, ASSISTANT]}, {}),
    ("same-answers", {"prompt": "Hi", "chosen": "Hello", "rejected": "Hello"}, {"task": "preference"}),
    ("unpaired-surrogate", {"prompt": "Hi \ud83d", "completion": "Hello"}, {}),
    ("unpaired-surrogate", chat(USER, ASSISTANT, tools=[{"name": "f", "\udc00": 1}]), {}),
    ("nul-character", {"prompt": "Hi", "completion": "Hel\x00lo"}, {}),
    ("nul-character", {"prompt": "Hi", "completion": "Hellö\x00"}, {}),
    ("not-finite-number", chat(USER, ASSISTANT, tools=[{"name": "f", "x": float("nan")}]), {}),
    ("not-json", chat(USER, ASSISTANT, tools=[{"name": "f", "x": b"bytes"}]), {}),
    ("not-json", chat(USER, ASSISTANT, tools=[{"name": "f", "x": {1: 2}}]), {}),
    ("nested-too-deep", chat(USER, ASSISTANT, tools=[{"name": "f", "x": deep(100_000)}]), {}),
]


@pytest.mark.parametrize(
    ("reason", "record", "options"), VERDICTS, ids=lambda value: value if type(value) is str else ""
)
def test_bad_row_gets_the_documented_verdict(reason, record, options):
    with pytest.raises(RowRefused) as refused:
        parse_row(record, ORIGIN, **options)

    assert refused.value.reason == reason
    assert refused.value.origin == ORIGIN
    assert len(refused.value.detail) > 20
    assert str(refused.value).startswith(f"rows.jsonl:7: {reason}: ")
    str(refused.value).encode("utf-8")  # printable anywhere


def documented_reasons() -> set[str]:
    table = formats.__doc__.split("verdict on\n")[1]
    return set(re.findall(r"^([a-z0-9-]+)  +\S", table, re.MULTILINE))


def raised_reasons() -> set[str]:
    """The reasons that the code of the rows' modules names: hyphenated words passed to an error."""
    found = set()
    for module in (columns, formats, json_values, messages, preference):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                found |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return {text for text in found if re.fullmatch(r"[a-z]+(-[a-z0-9]+)+", text) and text not in ("utf-8",)}


def test_the_table_the_code_and_the_cases_agree():
    cases = {reason for reason, _, _ in VERDICTS}
    assert cases == documented_reasons()
    assert (
        raised_reasons() - {"broken-json", "duplicate-key"} == documented_reasons()
    )  # those two are verdicts on files


def test_reasons_of_files_are_raised_by_readers():
    text = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (readers, tables, json_values))
    assert set(re.findall(r'"(invalid-utf8|broken-json|broken-csv|duplicate-key)"', text)) == {
        "invalid-utf8",
        "broken-json",
        "broken-csv",
        "duplicate-key",
    }


def test_a_text_in_a_run_over_judged_answers_is_told_all_that_is_allowed():
    with pytest.raises(RowRefused, match=r"not-a-pair.*allowed: chosen \+ rejected, or a chat.* with label"):
        parse_row({"text": "x", "label": True}, ORIGIN, task="unpaired")


def test_an_explicit_prompt_wins_over_an_instruction():
    record = {"instruction": "Translate", "prompt": "Hi", "completion": "Hello"}
    assert parse_row(record, ORIGIN, format="prompt_completion").messages == (HI, HELLO)


def test_unknown_shape_lists_what_was_found_and_what_is_known():
    with pytest.raises(ValueError, match="unknown-shape") as error:
        recognise_format({"foo": 1, "bar": 2})
    assert all(word in str(error.value) for word in ("'foo'", "'bar'", "messages", "instruction", "chosen", "columns"))


TEXTS = st.text(st.characters(), max_size=8)  # half surrogates included
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.just("[{}]"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["system", "user", "assistant", "tool", "gpt", "x"]) | JSON_VALUES,
        "from": st.sampled_from(["human", "function_call"]) | JSON_VALUES,
        **{key: JSON_VALUES for key in ("content", "value", "tool_calls", "reasoning", "train", "weight", "name")},
    },
)
ROWS = JSON_VALUES | st.dictionaries(
    st.sampled_from([*COLUMNS, "question", "answer"]),
    JSON_VALUES | st.lists(MESSAGES, max_size=4) | MESSAGES,
    max_size=5,
)


def row_or_verdict(record, shape, task):
    try:
        return parse_row(record, ORIGIN, format=shape, task=task)
    except RowRefused as refused:
        return refused


@settings(max_examples=300, deadline=None)
@given(record=ROWS, shape=st.sampled_from(FORMATS), task=st.sampled_from(TASKS))
def test_any_value_becomes_a_sound_row_or_is_refused(record, shape, task):
    row = row_or_verdict(record, shape, task)
    if isinstance(row, RowRefused):
        assert row.reason in documented_reasons()
        str(row).encode("utf-8")
        return
    kinds = {"sft": (Conversation, Completion), "preference": PreferenceRow, "unpaired": (PreferenceRow, UnpairedRow)}
    assert isinstance(row, kinds[task])
    if isinstance(row, Conversation):
        assert row.messages[-1].role == "assistant"
        for message in row.messages:
            message.content.encode("utf-8")
            assert (
                message.content.strip() or message.tool_calls or message.reasoning or message.role in ("system", "tool")
            )
