"""Each metric question by question, in any script."""

import pytest

from lightning_qlora.evaluation import Answer, AnswerSheet, Question, ReferenceLoss, estimate, measure, score_answer
from lightning_qlora.schema import Message, Origin


def ask(*rows):
    """Measure answers given as (question options, answer, stopped)."""
    questions = [
        Question(str(i), (Message("user", "?"),), Origin("q", i), **options) for i, (options, _, _) in enumerate(rows)
    ]
    sheet = AnswerSheet(
        "a",
        tuple(Answer(q.id, text, 3, stopped) for q, (_, text, stopped) in zip(questions, rows, strict=True)),
        tuple(score_answer(q, text) for q, (_, text, _) in zip(questions, rows, strict=True)),
        tuple(None if q.reference is None else ReferenceLoss(2.0, 4) for q in questions),
    )
    return measure(questions, sheet)


JSON = {"reference": '{"a": 1, "b": 2}', "check": "json"}


def test_checks_references_and_stops():
    found = {name: estimate(parts) for name, parts in ask((JSON, '{"a": 1, "b": 3}', True), ({}, "x", False)).items()}

    assert (found["exact"].value, found["valid"].value, found["fields"].value) == (0.0, 1.0, 0.5)
    assert [found[name].num_questions for name in ("exact", "valid", "fields")] == [1, 1, 1]
    assert (found["stopped"].value, found["stopped"].num_questions) == (0.5, 2)
    assert found["perplexity"].value == pytest.approx(2.718281828**0.5)
    assert (found["chrf"].num_questions, found["rouge_l"].num_questions) == (1, 1)


@pytest.mark.parametrize(
    ("answer", "reference", "rouge_l"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The CAT", "the cat", 1.0),
        ("cat the", "the cat", 0.5),
        ("", "the cat", 0.0),
        ("кошка спит", "кошка ест", 0.5),  # the usual normaliser drops every letter beyond z
        ("Straße", "strasse", 1.0),
    ],
)
def test_rouge_l_is_over_words_of_any_alphabet(answer, reference, rouge_l):
    parts = ask(({"reference": reference}, answer, True))

    assert parts["rouge_l"].part[0] == pytest.approx(rouge_l)
    assert 0 <= parts["chrf"].part[0] <= 1
    assert (parts["chrf"].part[0] > 0.99) == (answer == reference)
