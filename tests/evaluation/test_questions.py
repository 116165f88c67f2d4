from __future__ import annotations

import json

import pytest

from lightning_qlora.evaluation import Question, read_questions
from lightning_qlora.evaluation.questions import NOT_JSON, last_number, parse_json
from lightning_qlora.schema import Message

USER = {"role": "user", "content": "Hi"}


def write(tmp_path, *rows):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_reads_the_shapes_of_a_question(tmp_path):
    path = write(
        tmp_path,
        {"id": "a", "prompt": "Hi", "system": "Be brief.", "reference": "Hello", "tags": "greeting"},
        "",
        {"messages": [{"role": "user", "content": "1+1?"}], "expect": 2, "check": "numeric", "tags": ["sum", "easy"]},
        {"messages": [{"role": "user", "content": "Say yes"}, {"role": "assistant", "content": "yes"}]},
        {"id": 7, "prompt": "Anything?", "metadata": {"author": "me"}},
    )

    greeting, sums, carried, open_ended = read_questions(path)

    assert greeting == Question(
        "a",
        (Message("system", "Be brief."), Message("user", "Hi")),
        (str(path), 1),
        reference="Hello",
        check="exact",
        tags=("greeting",),
    )
    assert (sums.id, sums.check, sums.wanted, sums.tags, sums.origin.line) == ("3", "numeric", 2, ("sum", "easy"), 3)
    assert (carried.reference, carried.check) == ("yes", "exact")
    assert carried.messages == (Message("user", "Say yes"),)
    assert (open_ended.id, open_ended.check, open_ended.reference) == ("7", None, None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "is no question"),
        ("[1]", "is no question"),
        ({"id": "x"}, "is no question"),
        ({"prompt": 3}, "is no question"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "is no question"),
        ({"messages": [USER, *[{"role": "assistant", "content": "a"}] * 2]}, "2 assistant turns end the messages"),
        ({"messages": [USER, {"role": "assistant", "content": "a"}], "reference": "b"}, "beside a reference"),
        ({"prompt": "x", "refrence": "y"}, "unknown keys ['refrence']"),
        ({"prompt": "x", "reference": {"a": 1}}, "write the answer as text"),
        ({"prompt": "x", "tags": [1]}, "'tags' is [1]"),
        ({"prompt": "x", "reference": "y", "check": "fuzzy"}, "the check is 'fuzzy'"),
        ({"prompt": "x", "check": "exact"}, "nothing to compare with"),
        ({"prompt": "x", "check": "exact", "expect": 4}, "'exact' compares texts"),
        ({"prompt": "x", "reference": "{'a': 1}", "check": "json"}, "reference that is JSON"),
        ({"prompt": "x", "expect": "(", "check": "regex"}, "no regular expression"),
        ({"prompt": "x", "expect": 1, "check": "regex"}, "no regular expression"),
        ({"prompt": "x", "reference": "four", "check": "numeric"}, "needs a number"),
        ({"prompt": "x", "expect": 4, "tolerance": -1, "check": "numeric"}, "'tolerance' is -1"),
        ({"prompt": "x", "expect": [], "check": "contains"}, "at least one text"),
        ({"prompt": "x", "expect": [""], "check": "contains"}, "a text or a list of texts"),
        ({"prompt": "x", "reference": "{}", "check": "json-schema"}, "needs a schema"),
    ],
)
def test_names_the_line_that_is_no_question(tmp_path, row, message):
    path = write(tmp_path, {"id": "good", "prompt": "x"}, row)

    with pytest.raises(ValueError, match=r"questions\.jsonl:2") as error:
        read_questions(path)

    assert message in str(error.value)


def test_refuses_repeated_ids_empty_files_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match="already that of line 1"):
        read_questions(write(tmp_path, {"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}))
    with pytest.raises(ValueError, match="holds no question"):
        read_questions(write(tmp_path, "", " "))
    with pytest.raises(ValueError, match="There is no file of questions"):
        read_questions(tmp_path / "missing.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(ValueError, match=r"latin\.jsonl:1"):
        read_questions(tmp_path / "latin.jsonl")


def test_a_wrong_schema_is_found_while_reading(tmp_path):
    pytest.importorskip("jsonschema")
    with pytest.raises(ValueError, match="is no JSON schema"):
        read_questions(write(tmp_path, {"prompt": "x", "check": "json-schema", "expect": {"type": "banana"}}))


@pytest.mark.parametrize(
    "text", ["", "NaN", "[Infinity]", '{"a": 1, "a": 2}', "{'a': 1}", "{} {}", "```json\n{}\n```", "[" * 10**5]
)
def test_what_is_not_json(text):
    assert parse_json(text) is NOT_JSON


def test_null_is_json():
    assert parse_json("null") is None


@pytest.mark.parametrize(
    ("text", "number"),
    [("no", None), ("3 apples and 4 pears: 7.", 7.0), ("$1,234.50", 1234.5), ("-2e3", -2000.0), ("10,20", 20.0)],
)
def test_the_last_number_counts(text, number):
    assert last_number(text) == number
