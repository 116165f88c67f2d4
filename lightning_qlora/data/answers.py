"""Answers to one prompt -> tokens: the prompt's the same for each, only the answer's supervised, both whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from typing_extensions import override

from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.data.documents import AnswerKind
from lightning_qlora.data.encoding import RowEncoder
from lightning_qlora.data.formats import Task
from lightning_qlora.data.truncation import (
    Outcome,
    OverlongPolicy,
    cut,
    drop_oldest,
    drop_until_it_fits,
    split_exchanges,
)
from lightning_qlora.schema import Conversation, Message, PreferenceRow, RowRefused, TokenizedRow, UnpairedRow

__all__ = ["AnswerEncoder", "FittedAnswers", "fit_answers"]


class FittedAnswers(NamedTuple):
    """The answers of one row after the length policy.

    Attributes:
        result: Each answer with its prompt, at most ``max_length`` tokens long; or why the row cannot be used.
        kinds: What the answers are.
        outcome: What the policy did; ``None`` for a row that was refused before its length was known.
        full_length: Tokens of the longest before; 0 for such a row.
    """

    result: tuple[TokenizedRow, ...] | RowRefused
    kinds: tuple[AnswerKind, ...]
    outcome: Outcome | None
    full_length: int

    @property
    def refusal(self) -> RowRefused | None:
        """Why the row cannot be used."""
        return self.result if isinstance(self.result, RowRefused) else None

    @property
    def documents(self) -> tuple[tuple[TokenizedRow, AnswerKind], ...]:
        """What is stored of the row; nothing of a refused one."""
        return () if isinstance(self.result, RowRefused) else tuple(zip(self.result, self.kinds, strict=True))


@dataclass(frozen=True)
class AnswerEncoder(RowEncoder):
    """Turns pairs, or answers judged by themselves, into documents: one for each answer.

    Args:
        unpaired: Whether answers judged by themselves are read too, besides pairs.
    """

    unpaired: bool = False

    @property
    @override
    def task(self) -> Task:
        return "unpaired" if self.unpaired else "preference"

    @override
    def fit(self, rows: Sequence[PreferenceRow | UnpairedRow], max_length: int) -> list[FittedAnswers]:
        return fit_answers(self.chat, rows, max_length, self.overlong)


def fit_answers(
    chat: ChatTemplate,
    rows: Sequence[PreferenceRow | UnpairedRow],
    max_length: int,
    overlong: OverlongPolicy = "drop_oldest_turns",
) -> list[FittedAnswers]:
    """Tokenise answers with their prompts, and bring those that are too long down to ``max_length`` tokens each.

    Whatever the policy, the answers of a row keep the same prompt:

    - ``drop_oldest_turns``: leave out as few of the prompt's oldest exchanges as it takes for the longer answer; the
      system message, the last question and the answers stay whole. A row that is still too long is refused.
    - ``drop_row``: refuse the row.
    - ``keep_end``: cut as many tokens off the start of the prompt as it takes for the longer answer.
    - ``keep_start``: cut tokens off the end of an answer that is too long. A row that would lose a whole answer, or
      the difference between the two, is refused.

    Args:
        chat: The chat template.
        rows: Pairs, and answers judged by themselves.
        max_length: Most tokens of a prompt with one answer.
        overlong: The policy.
    """
    chats = [_conversations(row) for row in rows]
    encoded = iter(chat.encode_batch([conversation for row in chats for conversation in row]))
    fitted = []
    for row, conversations in zip(rows, chats, strict=True):
        kinds = _kinds(row)
        try:
            answers = _check([next(encoded) for _ in conversations], kinds)
        except RowRefused as refusal:
            fitted.append(FittedAnswers(refusal, kinds, None, 0))
            continue
        full_length = _longest(answers)
        outcome: Outcome = "fits"
        result: tuple[TokenizedRow, ...] | RowRefused = answers
        if full_length > max_length:
            try:
                outcome, result = _shorten(chat, conversations, answers, kinds, max_length, overlong)
            except RowRefused as refusal:
                # Cutting the end, which refuses for other reasons too, has left nothing to learn from.
                outcome, result = "too-long" if refusal.reason == "too-long" else "cut-end", refusal
        fitted.append(FittedAnswers(result, kinds, outcome, full_length))
    return fitted


def _kinds(row: PreferenceRow | UnpairedRow) -> tuple[AnswerKind, ...]:
    if isinstance(row, PreferenceRow):
        return (AnswerKind.CHOSEN, AnswerKind.REJECTED)
    return (AnswerKind.DESIRABLE if row.desirable else AnswerKind.UNDESIRABLE,)


def _conversations(row: PreferenceRow | UnpairedRow) -> tuple[Conversation, ...]:
    """Each answer behind the prompt; answers in the prompt are context, those of the answer have to be supervised."""
    prompt = tuple(replace(m, train=False) if m.role == "assistant" else m for m in row.prompt)

    def chat(answer: Sequence[Message]) -> Conversation:
        turns = [replace(m, train=True) if m.role == "assistant" and m.train is None else m for m in answer]
        return Conversation((*prompt, *turns), row.origin, row.tools, row.template_kwargs)

    if isinstance(row, PreferenceRow):
        return (chat(row.chosen), chat(row.rejected))
    return (chat(row.completion),)


def _check(encoded: Sequence[TokenizedRow | RowRefused], kinds: Sequence[AnswerKind]) -> tuple[TokenizedRow, ...]:
    """Hold the answers against one another.

    Raises:
        RowRefused: One was refused, the tokens of their prompts differ, or they do not.
    """
    answers = []
    for answer, kind in zip(encoded, kinds, strict=True):
        if isinstance(answer, RowRefused):
            raise RowRefused(answer.reason, f"{kind.name.lower()}: {answer.detail}", answer.origin)
        answers.append(answer)
    if len(answers) == 2:
        _check_pair(answers[0], answers[1])
    return tuple(answers)


def _check_pair(chosen: TokenizedRow, rejected: TokenizedRow) -> None:
    prompts = [answer.input_ids[: answer.supervised.index(True)] for answer in (chosen, rejected)]
    if prompts[0] != prompts[1]:
        raise RowRefused(
            "prompt-tokens-differ",
            f"The chat template writes {len(prompts[0])} tokens before the chosen answer and {len(prompts[1])} others "
            "before the rejected one, as templates do that open answers with reasoning differently. Give both answers "
            "reasoning, or neither.",
            chosen.origin,
        )
    if chosen.input_ids == rejected.input_ids:
        raise RowRefused(
            "same-answers", "chosen and rejected have the same tokens; allowed: two different answers", chosen.origin
        )


def _longest(answers: Sequence[TokenizedRow]) -> int:
    return max(len(answer.input_ids) for answer in answers)


def _shorten(
    chat: ChatTemplate,
    conversations: Sequence[Conversation],
    answers: tuple[TokenizedRow, ...],
    kinds: Sequence[AnswerKind],
    max_length: int,
    overlong: OverlongPolicy,
) -> tuple[Outcome, tuple[TokenizedRow, ...] | RowRefused]:
    surplus = _longest(answers) - max_length
    if overlong == "keep_start":
        return "cut-end", _check([cut(answer, slice(None, max_length)) for answer in answers], kinds)
    if overlong == "keep_end" and surplus < answers[0].supervised.index(True):
        return "cut-start", tuple(
            TokenizedRow(answer.input_ids[surplus:], answer.supervised[surplus:], answer.origin) for answer in answers
        )
    if overlong == "drop_oldest_turns":
        shortened = drop_until_it_fits(
            len(split_exchanges(conversations[0].messages)[1]),
            lambda dropped: _check(chat.encode_batch([drop_oldest(c, dropped) for c in conversations]), kinds),
            lambda candidate: _longest(candidate) <= max_length,
        )
        if shortened is not None:
            return "turns-dropped", shortened
    raise _too_long(answers, max_length, overlong)


def _too_long(answers: Sequence[TokenizedRow], max_length: int, overlong: OverlongPolicy) -> RowRefused:
    what = {
        "drop_oldest_turns": "the last question with its longer answer alone is",
        "keep_end": "its longer answer alone is",
    }.get(overlong, "it is")
    advice = "" if overlong == "keep_end" else ", or write overlong: keep_end to cut the start of prompts"
    detail = (
        f"{_longest(answers)} tokens, and {what} longer than max_length={max_length} allows. Raise max_length{advice}."
    )
    return RowRefused("too-long", detail, answers[0].origin)
