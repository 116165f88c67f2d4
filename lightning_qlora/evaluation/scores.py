"""What answers are worth: one by one, summed up, and against other answers to the same questions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from torchmetrics.functional.text import chrf_score

from lightning_qlora.evaluation.questions import (
    NOT_JSON,
    Check,
    Question,
    last_number,
    parse_json,
    schema_validator,
)

__all__ = [
    "Answer",
    "AnswerScore",
    "AnswerSheet",
    "AnswerSummary",
    "ReferenceLoss",
    "Verdict",
    "judge",
    "score_answer",
    "summarise",
]


class Answer(NamedTuple):
    """What a model wrote.

    Attributes:
        question_id: The question that it answers.
        text: The answer, without special tokens.
        num_tokens: Tokens written, the stop token included.
        stopped: Whether it ended with a stop token; false where ``max_new_tokens`` cut it.
    """

    question_id: str
    text: str
    num_tokens: int
    stopped: bool


class AnswerScore(NamedTuple):
    """What one answer is worth.

    Attributes:
        valid: Whether the answer has the form that was asked for.
        exact: Whether it is right in full; ``None`` for a question without a check.
        fields_right: Parts of the expected answer that are right.
        num_fields: Parts of the expected answer: the leaves of a JSON object, the texts to be contained, else 1.
        wrong_fields: Names of the parts that are not right.
    """

    valid: bool
    exact: bool | None
    fields_right: int
    num_fields: int
    wrong_fields: tuple[str, ...] = ()


class ReferenceLoss(NamedTuple):
    """How surprising a reference answer is: ``nll_sum`` nats over ``num_tokens`` tokens, the terminator included."""

    nll_sum: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class AnswerSheet:
    """The answers of one model to a list of questions, question by question.

    Attributes:
        name: Who answered, such as ``"before"``.
        answers: One per question, in the order of the questions.
        scores: One per question.
        reference_losses: One per question, ``None`` where there is no reference.
    """

    name: str
    answers: tuple[Answer, ...]
    scores: tuple[AnswerScore, ...]
    reference_losses: tuple[ReferenceLoss | None, ...]


class AnswerSummary(NamedTuple):
    """Scores of one sheet; rates are fractions of 1, ``nan`` where nothing could be counted.

    Attributes:
        num_questions: All questions.
        num_checked: Questions with a check.
        num_valid: Valid answers, of the checked ones.
        num_exact: Exactly right answers, of the checked ones.
        fields_right: Right fields, summed over the checked questions.
        num_fields: All their fields.
        num_stopped: Answers that ended by themselves.
        perplexity: ``exp`` of the mean nats per token over all reference answers.
        chrf: chrF of the answers against the references, from 0 to 1 (Popović, WMT 2015).
    """

    num_questions: int
    num_checked: int
    num_valid: int
    num_exact: int
    fields_right: int
    num_fields: int
    num_stopped: int
    perplexity: float
    chrf: float

    @property
    def valid_rate(self) -> float:
        """Valid answers per checked question."""
        return _ratio(self.num_valid, self.num_checked)

    @property
    def exact_rate(self) -> float:
        """Exactly right answers per checked question."""
        return _ratio(self.num_exact, self.num_checked)

    @property
    def fields_rate(self) -> float:
        """Right fields per field of the checked questions."""
        return _ratio(self.fields_right, self.num_fields)


Verdict: TypeAlias = Literal["fixed", "better", "right", "wrong", "worse", "broken", "same", "changed"]
"""How a later answer stands to an earlier one. ``fixed`` (right only later) and ``better`` are wins, ``broken`` (right
only earlier: a regression) and ``worse`` are losses. ``same`` and ``changed`` are for questions without a check."""


def score_answer(question: Question, answer: str) -> AnswerScore:
    """Judge an answer by its question's check.

    ===============  ===============================  ============================================================
    check            valid                            exact
    ===============  ===============================  ============================================================
    ``exact``        not empty                        equals the reference, outer whitespace aside
    ``json``         JSON with the reference's keys   equal as JSON; each leaf of the reference is a field
    ``json-schema``  JSON that satisfies the schema   as ``json`` where there is a reference, else the same as valid
    ``contains``     not empty                        holds every text; each is a field
    ``regex``        not empty                        the expression is found in it
    ``numeric``      holds a number                   its last number equals the expected one, within the tolerance
    ===============  ===============================  ============================================================

    JSON is taken as it stands: an answer wrapped in prose or in a code fence is not valid, because the program that
    reads it could not parse it.
    """
    text = answer.strip()
    if question.check is None:
        return AnswerScore(bool(text), None, 0, 0)
    return _SCORERS[question.check](question, text)


def _score_exact(question: Question, text: str) -> AnswerScore:
    return _whole(bool(text), text == question.wanted.strip())


def _score_json(question: Question, text: str) -> AnswerScore:
    wanted = question.wanted
    return _compare_json(parse_json(wanted) if isinstance(wanted, str) else wanted, parse_json(text))


def _score_json_schema(question: Question, text: str) -> AnswerScore:
    found = parse_json(text)
    valid = found is not NOT_JSON and bool(schema_validator(question.expect).is_valid(found))
    wanted = NOT_JSON if question.reference is None else parse_json(question.reference)
    if wanted is NOT_JSON:
        return _whole(valid, valid)
    score = _compare_json(wanted, found)
    return score._replace(valid=valid, exact=valid and score.exact)


def _score_contains(question: Question, text: str) -> AnswerScore:
    texts = [question.wanted] if isinstance(question.wanted, str) else question.wanted
    missing = tuple(wanted for wanted in texts if wanted not in text)
    return AnswerScore(bool(text), not missing, len(texts) - len(missing), len(texts), missing)


def _score_regex(question: Question, text: str) -> AnswerScore:
    return _whole(bool(text), re.search(question.wanted, text) is not None)


def _score_numeric(question: Question, text: str) -> AnswerScore:
    wanted, found = last_number(str(question.wanted)), last_number(text)
    assert wanted is not None  # read_questions has checked it
    return _whole(found is not None, found is not None and abs(found - wanted) <= question.tolerance)


_SCORERS: dict[Check, Callable[[Question, str], AnswerScore]] = {
    "exact": _score_exact,
    "json": _score_json,
    "json-schema": _score_json_schema,
    "contains": _score_contains,
    "regex": _score_regex,
    "numeric": _score_numeric,
}


def _whole(valid: bool, right: bool) -> AnswerScore:
    return AnswerScore(valid, right, int(right), 1, () if right else ("answer",))


def _compare_json(wanted: Any, found: Any) -> AnswerScore:
    wanted_fields = dict(_leaves(wanted))
    found_fields = {} if found is NOT_JSON else dict(_leaves(found))
    wrong = tuple(
        ".".join(path) or "answer" for path, value in wanted_fields.items() if found_fields.get(path) != value
    )
    valid = found is not NOT_JSON and found_fields.keys() == wanted_fields.keys()
    exact = valid and not wrong
    return AnswerScore(valid, exact, len(wanted_fields) - len(wrong), len(wanted_fields), wrong)


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the path of each leaf and its canonical text; lists and empty objects are leaves."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    else:
        yield path, json.dumps(_canonical(value), sort_keys=True)


def _canonical(value: Any) -> Any:
    """Write equal numbers alike: JSON has one kind of number, so 1.0 is 1, while ``true`` is not."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_canonical(inner) for inner in value]
    if isinstance(value, dict):
        return {key: _canonical(inner) for key, inner in value.items()}
    return value


def summarise(questions: Sequence[Question], sheet: AnswerSheet) -> AnswerSummary:
    """Add up one sheet.

    Perplexity is taken over the tokens of all references together, not as a mean of means, and from summed
    cross-entropies: torchmetrics' ``Perplexity`` goes through the softmax, whose float32 underflows to an infinite
    perplexity for one very unlikely token.
    """
    checked = [score for score in sheet.scores if score.exact is not None]
    losses = [loss for loss in sheet.reference_losses if loss is not None]
    num_tokens = sum(loss.num_tokens for loss in losses)
    mean_nll = _ratio(sum(loss.nll_sum for loss in losses), num_tokens)
    return AnswerSummary(
        num_questions=len(sheet.answers),
        num_checked=len(checked),
        num_valid=sum(score.valid for score in checked),
        num_exact=sum(bool(score.exact) for score in checked),
        fields_right=sum(score.fields_right for score in checked),
        num_fields=sum(score.num_fields for score in checked),
        num_stopped=sum(answer.stopped for answer in sheet.answers),
        perplexity=math.exp(min(mean_nll, 700.0)),  # exp(710) overflows
        chrf=_chrf(questions, sheet),
    )


def _chrf(questions: Sequence[Question], sheet: AnswerSheet) -> float:
    pairs = [(a.text, q.reference) for q, a in zip(questions, sheet.answers, strict=True) if q.reference is not None]
    if not pairs:
        return math.nan
    score = chrf_score([answer for answer, _ in pairs], [[reference] for _, reference in pairs], n_word_order=0)
    return float(score)  # type: ignore[arg-type]  # a tensor, unless sentence scores are asked for


def judge(before: AnswerSheet, after: AnswerSheet) -> list[Verdict]:
    """Compare two sheets question by question: what the later one won, lost or left as it was."""
    rows = zip(before.answers, after.answers, before.scores, after.scores, strict=True)
    return [_judge(*row) for row in rows]


def _judge(answer_before: Answer, answer_after: Answer, before: AnswerScore, after: AnswerScore) -> Verdict:
    if after.exact is None:
        return "same" if answer_before.text == answer_after.text else "changed"
    if after.exact or before.exact:
        return "right" if after.exact and before.exact else "fixed" if after.exact else "broken"
    worth_before, worth_after = (before.fields_right, before.valid), (after.fields_right, after.valid)
    if worth_before == worth_after:
        return "wrong"
    return "better" if worth_after > worth_before else "worse"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
