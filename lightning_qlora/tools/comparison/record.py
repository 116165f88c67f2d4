"""A comparison as JSON, for programs and for the next comparison."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_qlora.checkpoints.identity import package_versions
from lightning_qlora.evaluation import Answer, AnswerSheet, Question, ReferenceLoss, score_answer
from lightning_qlora.tools.comparison.failures import as_turn
from lightning_qlora.tools.comparison.findings import Comparison, PairFindings, Participant

__all__ = ["FORMAT", "VERSION", "Previous", "read_previous", "to_record"]

FORMAT = "lightning_qlora.comparison"
VERSION = 1
"""Grows when a reader of the older record could misread the newer."""


def to_record(comparison: Comparison) -> dict[str, Any]:
    """Return everything that was found as plain JSON values; numbers that are not finite become null."""
    record = {
        "format": FORMAT,
        "version": VERSION,
        "packages": package_versions(),
        "settings": comparison.settings,
        "baseline": comparison.baseline,
        "candidate": comparison.candidate,
        "participants": [{"name": p.name, "kind": p.kind, "path": p.path} for p in comparison.participants],
        "scores": {name: _estimates(scores) for name, scores in comparison.scores.items()},
        "tags": {
            tag: {
                "num_questions": found.num_questions,
                "scores": {name: _estimates(scores) for name, scores in found.scores.items()},
            }
            for tag, found in comparison.tags.items()
        },
        "pairs": [_pair(pair, comparison.questions) for pair in comparison.pairs],
        "limits": [limit._asdict() for limit in comparison.limits],
        "notes": comparison.notes,
        "questions": [_question(i, comparison) for i in range(len(comparison.questions))],
    }
    plain: dict[str, Any] = _plain(record)
    return plain


def _estimates(scores: Mapping[str, Any]) -> dict[str, Any]:
    return {metric: found._asdict() for metric, found in scores.items()}


def _pair(pair: PairFindings, questions: Sequence[Question]) -> dict[str, Any]:
    verdicts: dict[str, list[str]] = {}
    for question, verdict in zip(questions, pair.verdicts, strict=True):
        if verdict is not None:
            verdicts.setdefault(verdict, []).append(question.id)
    differences = {
        metric: {**found._asdict(), "p_corrected": pair.p_corrected[metric]}
        for metric, found in pair.differences.items()
    }
    return {"before": pair.before, "after": pair.after, "verdicts": verdicts, "differences": differences}


def _question(index: int, comparison: Comparison) -> dict[str, Any]:
    question = comparison.questions[index]
    return {
        "id": question.id,
        "messages": [as_turn(message) for message in question.messages],
        "reference": question.reference,
        "check": question.check,
        "expect": question.expect,
        "tolerance": question.tolerance,
        "tags": list(question.tags),
        "tools": list(question.tools),
        "answers": {p.name: _answer(p, index) for p in comparison.participants if p.asked[index]},
    }


def _answer(participant: Participant, index: int) -> dict[str, Any]:
    sheet = participant.sheet
    answer, loss = sheet.answers[index], sheet.reference_losses[index]
    scores = {name: float(participant.parts[name].part[index]) for name in ("rouge_l", "chrf")}
    applies = bool(participant.parts["chrf"].applies[index])
    return {
        "text": answer.text,
        "num_tokens": answer.num_tokens,
        "stopped": answer.stopped,
        **sheet.scores[index]._asdict(),
        **(scores if applies else dict.fromkeys(scores)),
        "reference_nll": None if loss is None else loss.nll_sum,
        "reference_tokens": None if loss is None else loss.num_tokens,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, slots=True)
class Previous:
    """The candidate of an earlier comparison.

    Attributes:
        name: What it was called.
        path: Where it was loaded from.
        settings: How its answers were made.
        questions: What it was asked, with its answers, by the questions' ids.
    """

    name: str
    path: str
    settings: dict[str, Any]
    questions: dict[str, dict[str, Any]]

    def as_participant(self, questions: list[Question], name: str) -> tuple[Participant, list[str]]:
        """Judge its answers by the questions of today.

        An answer counts where the question is still put in the same words; it is judged by today's check and
        reference. Its loss on the reference counts only if the reference is the same.

        Args:
            questions: The questions of today.
            name: What the outputs call it.

        Returns:
            The participant, and the ids of the questions that it was not asked.
        """
        answers, losses, asked = [], [], []
        for question in questions:
            found = self.questions.get(question.id)
            same = found is not None and (found["messages"], found["tools"]) == (
                _plain([as_turn(message) for message in question.messages]),
                _plain(question.tools),
            )
            given = found["answers"].get(self.name) if found is not None and same else None
            asked.append(given is not None)
            given = given or {"text": "", "num_tokens": 0, "stopped": False}
            answers.append(Answer(question.id, given["text"], given["num_tokens"], given["stopped"]))
            same_reference = found is not None and found["reference"] == question.reference
            nll = given.get("reference_nll") if same_reference else None
            losses.append(None if nll is None else ReferenceLoss(nll, given["reference_tokens"]))
        scores = tuple(score_answer(q, answer.text) for q, answer in zip(questions, answers, strict=True))
        sheet = AnswerSheet(name, tuple(answers), scores, tuple(losses))
        missing = [question.id for question, was_asked in zip(questions, asked, strict=True) if not was_asked]
        return Participant("previous", self.path, questions, sheet, asked), missing


def read_previous(path: str | Path) -> Previous:
    """Read the candidate of an earlier comparison.

    Args:
        path: The ``comparison.json`` of the earlier comparison, or its folder.

    Raises:
        ValueError: If there is no such file, or it is no comparison.
    """
    path = Path(path)
    path = path / "comparison.json" if path.is_dir() else path
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"The earlier comparison {str(path)!r} cannot be read: {error}.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("version") != VERSION:
        raise ValueError(
            f"{str(path)!r} is no comparison of version {VERSION}. Write the comparison.json that compare wrote."
        )
    name = record["candidate"]
    candidate = next(participant for participant in record["participants"] if participant["name"] == name)
    return Previous(name, candidate["path"], record["settings"], {q["id"]: q for q in record["questions"]})
