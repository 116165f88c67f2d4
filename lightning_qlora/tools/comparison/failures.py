"""What a model got wrong, as rows that the next training can read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning_qlora.evaluation import Question, score_answer
from lightning_qlora.schema import Message
from lightning_qlora.tools.comparison.findings import Comparison

__all__ = ["as_turn", "preference_pairs", "training_rows"]


def training_rows(comparison: Comparison) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Turn the candidate's failures into chats.

    Returns:
        Rows to train on, each with its question's reference as the answer; and rows that a person has to correct
        first, because there is no reference or it fails the question's own check: they hold the model's answer,
        switched off by ``train: false``, so that none is learned by mistake.
    """
    ready, uncorrected = [], []
    for question, wrong, about in _failures(comparison):
        turns = _prompt(question)
        right = _right_answer(question)
        if right is not None:
            ready.append(_row(question, [*turns, {"role": "assistant", "content": right}], about))
        else:
            answer = {"role": "assistant", "content": wrong, "train": False}
            uncorrected.append(_row(question, [*turns, answer], about))
    return ready, uncorrected


def preference_pairs(comparison: Comparison) -> list[dict[str, Any]]:
    """Turn the candidate's failures into pairs: the reference is chosen, the model's answer rejected.

    Questions without a reference that passes their check, and empty answers, give none.
    """
    rows = []
    for question, wrong, about in _failures(comparison):
        right = _right_answer(question)
        if right is None or not wrong.strip():
            continue
        sides = {
            side: [{"role": "assistant", "content": text}] for side, text in (("chosen", right), ("rejected", wrong))
        }
        rows.append({"prompt": _prompt(question), **sides, **_tools(question), "metadata": about})
    return rows


def _failures(comparison: Comparison) -> Iterator[tuple[Question, str, dict[str, Any]]]:
    """Yield each question that the candidate failed, its answer, and what a reader of the row wants to know."""
    sheet = comparison.participant(comparison.candidate).sheet
    pair = comparison.pair(comparison.baseline, comparison.candidate)
    for i, (question, answer, score) in enumerate(zip(comparison.questions, sheet.answers, sheet.scores, strict=True)):
        if score.exact is False:
            yield (
                question,
                answer.text,
                {
                    "question": question.id,
                    "tags": list(question.tags),
                    "model": sheet.name,
                    "answer": answer.text,
                    "wrong_fields": list(score.wrong_fields),
                    "verdict": None if pair is None else pair.verdicts[i],
                },
            )


def _right_answer(question: Question) -> str | None:
    """The reference, if it passes the question's own check."""
    reference = question.reference
    return reference if reference is not None and score_answer(question, reference).exact else None


def _prompt(question: Question) -> list[dict[str, Any]]:
    """The turns up to the answer; the assistant's among them are context."""
    return [
        as_turn(message) | ({"train": False} if message.role == "assistant" else {}) for message in question.messages
    ]


def _row(question: Question, messages: list[dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
    return {"messages": messages, **_tools(question), "metadata": about}


def _tools(question: Question) -> dict[str, Any]:
    return {"tools": list(question.tools)} if question.tools else {}


def as_turn(message: Message) -> dict[str, Any]:
    """Write a message as data files hold it."""
    optional = {
        "reasoning_content": message.reasoning,
        "tool_calls": list(message.tool_calls),
        "tool_call_id": message.tool_call_id,
        "name": message.name,
    }
    return {"role": message.role, "content": message.content, **{k: v for k, v in optional.items() if v}}
