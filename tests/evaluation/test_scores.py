from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qlora.evaluation import (
    Answer,
    AnswerScore,
    AnswerSheet,
    Question,
    ReferenceLoss,
    judge,
    score_answer,
    summarise,
    tables,
)
from lightning_qlora.schema import Message, Origin

TICKET = '{"product": "router", "urgent": true, "contact": {"name": null, "phone": "12"}, "count": 2}'


def question(check, reference=None, expect=None, **options):
    return Question("q", (Message("user", "?"),), Origin("q.jsonl", 1), reference, check, expect, **options)


def sheet(*texts, questions, name="before", losses=None, stopped=True):
    return AnswerSheet(
        name,
        tuple(Answer(q.id, text, 3, stopped) for q, text in zip(questions, texts, strict=True)),
        tuple(score_answer(q, text) for q, text in zip(questions, texts, strict=True)),
        tuple(losses or [None] * len(questions)),
    )


@pytest.mark.parametrize(
    ("asked", "answer", "score"),
    [
        (question("exact", "Yes"), " Yes\n", (True, True, 1, 1, ())),
        (question("exact", "Yes"), "yes", (True, False, 0, 1, ("answer",))),
        (question("exact", "Yes"), "  ", (False, False, 0, 1, ("answer",))),
        (question("exact", "Yes", "No"), "No", (True, True, 1, 1, ())),
        (question("contains", "b"), "abc", (True, True, 1, 1, ())),
        (question("contains", expect=["a", "x", "c"]), "abc", (True, False, 2, 3, ("x",))),
        (question("regex", expect=r"^\d+$"), "123", (True, True, 1, 1, ())),
        (question("regex", expect=r"^\d+$"), "12a", (True, False, 0, 1, ("answer",))),
        (question("numeric", expect=1000), "It is 3 + 997 = 1,000", (True, True, 1, 1, ())),
        (question("numeric", "0.5", tolerance=0.01), "about .505", (True, False, 0, 1, ("answer",))),
        (question("numeric", "0.5", tolerance=0.01), "about 0.505", (True, True, 1, 1, ())),
        (question("numeric", "0.5"), "none", (False, False, 0, 1, ("answer",))),
        (question(None), "anything", (True, None, 0, 0, ())),
        (question(None), "", (False, None, 0, 0, ())),
    ],
)
def test_judges_an_answer_by_its_check(asked, answer, score):
    assert score_answer(asked, answer) == AnswerScore(*score)


@pytest.mark.parametrize(
    ("answer", "valid", "exact", "wrong"),
    [
        (TICKET, True, True, ()),
        (
            '{"count": 2.0, "contact": {"phone": "12", "name": null}, "urgent": true, "product": "router"}',
            True,
            True,
            (),
        ),
        (TICKET.replace("true", "1"), True, False, ("urgent",)),
        (TICKET.replace("null", '""').replace('"router"', '"Router"'), True, False, ("product", "contact.name")),
        (TICKET.replace('"count": 2', '"number": 2'), False, False, ("count",)),
        (
            TICKET.replace("}, ", "}, 3: 4, "),
            False,
            False,
            ("product", "urgent", "contact.name", "contact.phone", "count"),
        ),
        (TICKET[:-1] + ', "extra": 1}', False, False, ()),
        (f"```json\n{TICKET}\n```", False, False, ("product", "urgent", "contact.name", "contact.phone", "count")),
        ("{}", False, False, ("product", "urgent", "contact.name", "contact.phone", "count")),
    ],
)
def test_compares_json_field_by_field(answer, valid, exact, wrong):
    score = score_answer(question("json", TICKET), answer)

    assert score == AnswerScore(valid, exact, 5 - len(wrong), 5, wrong)


def test_paths_of_json_fields_do_not_collide():
    assert not score_answer(question("json", '{"a.b": 1}'), '{"a": {"b": 1}}').valid
    assert score_answer(question("json", expect=[1, {"a": 2}]), '[1.0, {"a": 2}]').exact


def test_judges_by_json_schema():
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}

    assert score_answer(question("json-schema", expect=schema), '{"city": "Lima"}') == (True, True, 1, 1, ())
    assert score_answer(question("json-schema", expect=schema), '{"city": 1}') == (False, False, 0, 1, ("answer",))
    with_reference = question("json-schema", '{"city": "Lima"}', schema)
    assert score_answer(with_reference, '{"city": "Rome"}') == (True, False, 0, 1, ("city",))
    assert score_answer(with_reference, '{"city": "Lima", "country": "Peru"}')[:2] == (True, False)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(JSON, JSON)
def test_json_is_exact_only_for_equal_values(wanted, found):
    score = score_answer(question("json", json.dumps(wanted)), json.dumps(found, indent=1))

    equal = json.dumps(wanted, sort_keys=True) == json.dumps(found, sort_keys=True)
    assert score.exact == equal
    assert score.fields_right == score.num_fields - len(score.wrong_fields)
    assert not score.exact or (score.valid and score.fields_right == score.num_fields)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30))
def test_no_answer_breaks_a_check(answer):
    for asked in (question("json", TICKET), question("exact", "a"), question("numeric", "1"), question("regex", "a+")):
        score = score_answer(asked, answer)
        assert 0 <= score.fields_right <= score.num_fields


def test_sums_up_a_sheet():
    questions = [question("json", '{"a": 1, "b": 2}'), question("exact", "yes"), question(None)]
    losses = [ReferenceLoss(3.0, 3), ReferenceLoss(9.0, 1), None]
    answers = sheet('{"a": 1, "b": 3}', "yes", "free", questions=questions, losses=losses)

    summary = summarise(questions, answers)

    assert summary[:7] == (3, 2, 2, 1, 2, 3, 3)
    assert summary.perplexity == pytest.approx(math.exp(12 / 4))  # over tokens, not a mean of means
    assert (summary.valid_rate, summary.exact_rate) == (1.0, 0.5)
    assert summary.fields_rate == pytest.approx(2 / 3)
    assert 0.5 < summary.chrf < 1.0


def test_counts_nothing_as_nan():
    questions = [question(None)]
    summary = summarise(questions, sheet("free", questions=questions))

    assert all(map(math.isnan, (summary.valid_rate, summary.exact_rate, summary.fields_rate, summary.perplexity)))
    assert math.isnan(summary.chrf)
    assert [row[0] for row in tables.score_rows([summary])] == ["answers ended by themselves"]


def test_a_hopeless_reference_has_a_finite_perplexity():
    questions = [question("exact", "a")]
    losses = [ReferenceLoss(5000.0, 1)]
    assert math.isfinite(summarise(questions, sheet("b", questions=questions, losses=losses)).perplexity)


def test_verdicts():
    asked = question("json", '{"a": 1, "b": 2}')
    right, half, none, invalid = '{"a": 1, "b": 2}', '{"a": 1, "b": 0}', '{"a": 0, "b": 0}', "?"
    cases = {
        (none, right): "fixed",
        (right, half): "broken",
        (right, right): "right",
        (none, half): "better",
        (half, invalid): "worse",
        (invalid, none): "better",
        (half, half): "wrong",
    }
    questions = [asked] * len(cases) + [question(None)] * 2
    before = sheet(*(first for first, _ in cases), "x", "x", questions=questions)
    after = sheet(*(second for _, second in cases), "x", "y", questions=questions, name="after")

    assert judge(before, after) == [*cases.values(), "same", "changed"]


@pytest.mark.parametrize("with_rich", [True, False])
def test_draws_tables(monkeypatch, with_rich):
    if with_rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setattr(tables.importlib.util, "find_spec", lambda name: None)
    questions = [question("exact", "[bold]yes[/nothing]"), question("exact", "b" * 500)]
    before = sheet("no", "a", questions=questions, stopped=False)
    after = sheet("[bold]yes[/nothing]", "c", questions=questions, name="after")
    verdicts = judge(before, after)

    text = tables.side_by_side(questions, before, after, verdicts, max_characters=40)
    assert "[bold]yes[/nothing]" in text.replace("\n", "") or "[bold]yes" in text
    assert "fixed" in text
    assert "b" * 50 not in text
    scores = tables.score_table(["before", "after"], [summarise(questions, s) for s in (before, after)])
    assert "0/2 (0.0 %)" in scores
    assert "1/2 (50.0 %)" in scores
    assert tables.verdict_line(verdicts) == "1 fixed, 1 as wrong as before, 0 right before and wrong now"


def test_an_answer_cannot_steer_the_terminal():
    assert tables.printable("a\x1b[2Jb\r\nc\td é") == "a\ufffd[2Jb\ufffd\nc\td é"


def test_shows_every_kind_of_verdict_first():
    verdicts = ["fixed"] * 8 + ["broken", "wrong"]

    assert tables.pick_rows(verdicts, 4) == [0, 4, 8, 9]
    assert tables.pick_rows(verdicts, 99) == list(range(10))
    assert tables.pick_rows(verdicts, 0) == []
