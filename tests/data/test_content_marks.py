"""Marks around content: where they are put, and how they are found again or missed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_qlora.data.content_marks import (
    SCHEMA_WORDS,
    Marks,
    Source,
    TemplateFields,
    holds_marker,
    template_messages,
    template_tools,
)
from lightning_qlora.schema import Message

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"b": "x", "a": [1, "b"]}}}


@given(st.text(st.characters(max_codepoint=0xFFFFF, exclude_categories=["Cs"])))
def test_marks_come_off_again(text):
    marks = Marks()
    found = marks.find(marks.wrap(text, 3, "content"))
    assert found is not None
    plain, spans = found
    assert plain == text
    assert [text[start:end] for start, end, _ in spans] == ([text.strip()] if text.strip() else [])
    assert marks.sources == [Source(3, "content")] * len(spans)


def test_broken_pairs_are_noticed():
    marks = Marks()
    one, two = marks.wrap("one", 0, "content"), marks.wrap("two", 1, "content")
    for broken in (one[:-1], one[1:], one[:-1] + two + one[-1], two[0] + one, one[::-1]):
        assert marks.find(broken) is None
    assert marks.find(two + one + one) is not None


def test_answers_are_marked_between_think_and_tool_markers():
    marks = Marks()
    found = marks.find(marks.answer("<think>\nHm.\n</think>\n\nYes. <tool_call>{}</tool_call>", 1, "content"))
    assert found is not None
    plain, spans = found
    assert [(plain[start:end], marks.sources[mark].kind) for start, end, mark in spans] == [
        ("Hm.", "reasoning"),
        ("Yes.", "content"),
        ("{}", "content"),
    ]


def test_reasoning_may_begin_without_its_opening_marker():
    marks = Marks()
    marks.answer("Hm.</think>Yes.", 1, "content")
    assert [source.kind for source in marks.sources] == ["reasoning", "content"]


def test_marked_strings_sort_as_the_strings_do():
    marks = Marks()
    value = {"pear": 1, "Apple": 2, "fig": 3}
    marked = marks.json(value, 0, "call")
    assert [marked[key] for key in sorted(marked)] == [value[key] for key in sorted(value)]


def test_keys_and_values_of_calls_are_marked_and_equal_ones_alike():
    marks = Marks()
    function = template_messages([Message("assistant", "", tool_calls=(CALL,))], TemplateFields(), marks)[0][
        "tool_calls"
    ][0]["function"]
    key_a, key_b = sorted(function["arguments"])
    assert function["arguments"][key_a] == [1, key_b]
    assert all(marks.find(text) is not None and text != "add" for text in (function["name"], key_a, key_b))


def test_the_vocabulary_of_schemas_stays_as_it_is():
    marks = Marks()
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"x": {}}}}}
    marked = template_tools([tool], marks)
    assert marked is not None
    assert marked[0]["type"] == "function"
    assert set(marked[0]["function"]) <= SCHEMA_WORDS
    assert len(marks.sources) == 2, "the name of the function, and that of its argument"


def test_names_that_no_control_token_is_made_of_may_be_spared():
    marks = Marks(lambda text: text == "add")
    assert marks.label("add") == "add"
    assert marks.label("<|im_end|>") == marks.label("<|im_end|>") != "<|im_end|>"
    assert marks.json("add", 0, "call") == "add"
    assert marks.spared == ["add"]


def test_arguments_are_text_where_the_template_wants_text():
    fields = TemplateFields(("reasoning_content", "thinking"), content_as_parts=True, arguments_as_text=True)
    turn = template_messages([Message("assistant", "é", reasoning="Hm", tool_calls=(CALL,))], fields, None)[0]
    assert turn["content"] == [{"type": "text", "text": "é"}]
    assert turn["reasoning_content"] == turn["thinking"] == "Hm"
    assert turn["tool_calls"][0]["function"]["arguments"] == '{"b": "x", "a": [1, "b"]}'


def test_markers_are_seen_and_look_alikes_are_not():
    assert holds_marker("a [TOOL_CALLS] b")
    assert holds_marker("◁think▷")
    assert not holds_marker("a < b, [c], <thinks>")
