"""Fixed questions, the answers that models give to them, and what those answers are worth.

The order of work is :func:`read_questions`, then for each model :func:`answer_questions`, then :func:`summarise` for
one sheet of answers or :func:`judge` for two; :func:`measure`, :func:`estimate` and :func:`difference` say how sure the
scores are. They are kept per question, so that whatever is computed from them later (rates by tag, intervals, paired
tests) needs no model again.
"""

from lightning_qlora.evaluation.answers import (
    adapters_off,
    answer_questions,
    decoding_config,
    encode_prompts,
    encode_references,
    evaluation_mode,
    generate_answers,
    reference_losses,
    stop_tokens,
)
from lightning_qlora.evaluation.metrics import METRICS, Metric, measure
from lightning_qlora.evaluation.questions import CHECKS, Check, Question, read_questions
from lightning_qlora.evaluation.scores import (
    Answer,
    AnswerScore,
    AnswerSheet,
    AnswerSummary,
    ReferenceLoss,
    Verdict,
    judge,
    score_answer,
    summarise,
)
from lightning_qlora.evaluation.statistics import Difference, Estimate, Parts, difference, estimate, holm

__all__ = [
    "CHECKS",
    "METRICS",
    "Answer",
    "AnswerScore",
    "AnswerSheet",
    "AnswerSummary",
    "Check",
    "Difference",
    "Estimate",
    "Metric",
    "Parts",
    "Question",
    "ReferenceLoss",
    "Verdict",
    "adapters_off",
    "answer_questions",
    "decoding_config",
    "difference",
    "encode_prompts",
    "encode_references",
    "estimate",
    "evaluation_mode",
    "generate_answers",
    "holm",
    "judge",
    "measure",
    "read_questions",
    "reference_losses",
    "score_answer",
    "stop_tokens",
    "summarise",
]
