"""Single messages of every dialect, and the order of turns."""

from __future__ import annotations

import json

import pytest

from lightning_qlora.data.json_values import BadRowError
from lightning_qlora.data.messages import ROLE_NAMES, check_turns, parse_message, parse_messages, parse_tools, text_of
from lightning_qlora.schema import Message

WEATHER = {"name": "weather", "arguments": {"city": "Köln", "days": 2}}
PARSED_CALL = {"type": "function", "function": WEATHER}


@pytest.mark.parametrize(("name", "role"), ROLE_NAMES.items())
def test_names_of_speakers(name, role):
    content = json.dumps(WEATHER) if name in ("function_call", "tool_call") else "Hi"
    for spelling in (name, name.title(), f" {name.upper()} "):
        assert parse_message({"from": spelling, "value": content}, "m").role == role


def test_content_of_text_parts_is_joined():
    parts = [{"type": "text", "text": "a ", "image_url": None}, "b", {"text": "c"}]
    assert text_of(parts, "m") == "a bc"


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_fields(key):
    message = parse_message({"role": "assistant", "content": "4", key: "2+2"}, "m")
    assert message == Message("assistant", "4", reasoning="2+2")
    assert parse_message({"role": "assistant", "content": "4", key: ""}, "m").reasoning is None


@pytest.mark.parametrize(
    ("fields", "train"),
    [
        ({}, None),
        ({"train": None, "weight": None}, None),
        ({"train": True}, True),
        ({"train": False}, False),
        ({"weight": 1}, True),
        ({"weight": 0}, False),
        ({"weight": 0.0}, False),
        ({"training": 0, "train": False}, False),
    ],
)
def test_train_and_weight(fields, train):
    assert parse_message({"role": "assistant", "content": "4", **fields}, "m").train is train


def test_a_prompt_may_say_that_it_is_not_trained_on():
    assert parse_message({"role": "user", "content": "Hi", "train": False}, "m").train is False


@pytest.mark.parametrize(
    "raw",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": WEATHER}]},
        {"role": "assistant", "content": None, "tool_calls": [WEATHER]},
        {"role": "assistant", "tool_calls": [{"function": {**WEATHER, "arguments": json.dumps(WEATHER["arguments"])}}]},
        {"role": "assistant", "tool_calls": json.dumps([WEATHER])},
        {"role": "assistant", "content": "", "function_call": WEATHER},
        {"from": "function_call", "value": json.dumps(WEATHER)},
        {"from": "function_call", "value": json.dumps([WEATHER])},
    ],
)
def test_tool_calls_of_every_shape_become_the_same(raw):
    assert parse_message(raw, "m") == Message("assistant", "", tool_calls=(PARSED_CALL,))


def test_calls_keep_their_ids_and_empty_arguments_are_an_object():
    raw = {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": ""}}]}
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {}}}
    assert parse_message(raw, "m").tool_calls == (call,)


def test_tool_results_keep_call_id_and_name():
    raw = {"role": "tool", "tool_call_id": "c1", "name": "f", "content": ""}
    assert parse_message(raw, "m") == Message("tool", "", tool_call_id="c1", name="f")


@pytest.mark.parametrize(
    "found",
    [
        [{"type": "function", "function": {"name": "f"}}],
        [{"name": "f"}],
        ['{"name": "f"}'],
        '[{"name": "f"}]',
    ],
)
def test_tools_of_every_shape_become_the_same(found):
    assert parse_tools(found) == ({"type": "function", "function": {"name": "f"}},)


@pytest.mark.parametrize("found", [None, "", []])
def test_no_tools(found):
    assert parse_tools(found) == ()


def test_a_chat_with_parallel_calls_passes_unchanged():
    chat = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "Weather in two cities?"},
        {"role": "assistant", "tool_calls": [{"id": "a", "function": WEATHER}, {"id": "b", "function": WEATHER}]},
        {"role": "tool", "tool_call_id": "a", "content": "rain"},
        {"role": "tool", "tool_call_id": "b", "content": "sun"},
        {"role": "assistant", "content": "Rain and sun."},
    ]
    messages = parse_messages(chat, "messages")
    assert check_turns(messages) == tuple(messages)


def test_a_call_written_into_the_text_may_be_answered():
    chat = [
        {"from": "human", "value": "Weather?"},
        {"from": "gpt", "value": '<tool_call>{"name": "weather"}</tool_call>'},
        {"from": "tool", "value": "sun"},
        {"from": "gpt", "value": "Sunny."},
    ]
    assert len(check_turns(parse_messages(chat, "conversations"))) == 4


def test_a_user_turn_closes_the_calls():
    call = Message("assistant", "", tool_calls=(PARSED_CALL,))
    user, result, answer = Message("user", "Hi"), Message("tool", "4"), Message("assistant", "Hello")
    with pytest.raises(BadRowError, match="tool-without-call"):
        check_turns([user, call, user, result, answer])


def test_errors_name_the_message():
    with pytest.raises(BadRowError, match=r"messages\[1\] is spoken by 'narrator'; allowed: system, "):
        parse_messages([{"role": "user", "content": "Hi"}, {"role": "narrator", "content": "x"}], "messages")
