"""The scores that answers are compared by, question by question, so that intervals and tests need no model again."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from torchmetrics.functional.text import chrf_score
from torchmetrics.functional.text.rouge import rouge_score

from lightning_qlora.evaluation.questions import Question
from lightning_qlora.evaluation.scores import Answer, AnswerScore, AnswerSheet, ReferenceLoss
from lightning_qlora.evaluation.statistics import Parts

__all__ = ["METRICS", "Metric", "measure"]

_PartOf: TypeAlias = Callable[[Question, Answer, AnswerScore, ReferenceLoss | None], tuple[float, float]]

_NOTHING = (0.0, 0.0)


class Metric(NamedTuple):
    """A score of answers.

    Attributes:
        title: What tables call it.
        part_of: The part and the whole that one question adds (``statistics.Parts``).
        is_rate: Whether each question is a yes or a no.
        is_perplexity: Whether it is the exponential of nats per token, and lower is better.
    """

    title: str
    part_of: _PartOf
    is_rate: bool = False
    is_perplexity: bool = False


def _checked(value: Callable[[AnswerScore], tuple[float, float]]) -> _PartOf:
    return lambda question, answer, score, loss: _NOTHING if score.exact is None else value(score)


def _loss(question: Question, answer: Answer, score: AnswerScore, loss: ReferenceLoss | None) -> tuple[float, float]:
    return _NOTHING if loss is None else (loss.nll_sum, loss.num_tokens)


def _chrf(question: Question, answer: Answer, score: AnswerScore, loss: ReferenceLoss | None) -> tuple[float, float]:
    if question.reference is None:
        return _NOTHING
    found = chrf_score([answer.text], [[question.reference]], n_word_order=0)
    return float(found), 1.0  # type: ignore[arg-type]  # a tensor, unless sentence scores are asked for


def _rouge_l(question: Question, answer: Answer, score: AnswerScore, loss: ReferenceLoss | None) -> tuple[float, float]:
    if question.reference is None:
        return _NOTHING
    # The usual normaliser keeps a to z and digits only: every answer in Greek or Chinese would score 0.
    found = rouge_score(answer.text, question.reference, rouge_keys="rougeL", normalizer=str.casefold, tokenizer=_words)
    return float(found["rougeL_fmeasure"]), 1.0


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


METRICS: dict[str, Metric] = {
    "exact": Metric("exactly right answers", _checked(lambda s: (float(bool(s.exact)), 1.0)), is_rate=True),
    "valid": Metric("valid answers", _checked(lambda s: (float(s.valid), 1.0)), is_rate=True),
    "fields": Metric("right fields", _checked(lambda s: (s.fields_right, s.num_fields))),
    "stopped": Metric("ended by themselves", lambda q, answer, s, loss: (float(answer.stopped), 1.0), is_rate=True),
    "rouge_l": Metric("ROUGE-L, mean", _rouge_l),
    "chrf": Metric("chrF, mean", _chrf),
    "perplexity": Metric("perplexity of references", _loss, is_perplexity=True),
}
"""Scores by name. ROUGE-L is Lin's (ACL workshop 2004), its F1 over words; chrF is Popović's (WMT 2015); both are
means over answers, from 0 to 1, by torchmetrics. ``perplexity`` is over the tokens of all references together."""


def measure(questions: Sequence[Question], sheet: AnswerSheet) -> dict[str, Parts]:
    """Score each answer of a sheet by every metric.

    Args:
        questions: Q questions.
        sheet: The answers to them.
    """
    rows = list(zip(questions, sheet.answers, sheet.scores, sheet.reference_losses, strict=True))
    measured = {}
    for name, metric in METRICS.items():
        pairs = np.array([metric.part_of(*row) for row in rows], dtype=np.float64).reshape(-1, 2)
        measured[name] = Parts(pairs[:, 0], pairs[:, 1], metric.is_rate, metric.is_perplexity)
    return measured
