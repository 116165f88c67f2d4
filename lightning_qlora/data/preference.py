"""Chosen and rejected answers in every shape of the wild -> the shared prompt and the two answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from lightning_qlora.data.json_values import BadRowError, decode_json, described
from lightning_qlora.data.messages import ROLE_NAMES, is_turns, parse_message, parse_messages, text_of
from lightning_qlora.schema import Message

__all__ = ["Pair", "parse_pair", "split_answer", "turns_of"]

_TRANSCRIPT_TURN: Final = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
"""The turns of a written-out dialogue, the shape of the Anthropic HH-RLHF data."""

_TURN_KEYS: Final = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})
"""What an object has to have to be a turn rather than any other."""


class Pair(NamedTuple):
    """Two answers to one prompt."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]


def parse_pair(prompt: Sequence[Message] | None, chosen: object, rejected: object) -> Pair:
    """Split a pair into what its sides share and what they do not.

    Args:
        prompt: The explicit prompt, or ``None`` where it is implicit.
        chosen: A text, a message, a list of messages (also as JSON text), or a written-out dialogue: the answer
            alone, or the whole conversation.
        rejected: The same for the answer that lost.

    Raises:
        BadRowError: ``no-prompt``, ``prompt-mismatch``, ``no-shared-prompt``, ``empty-answer``, or a verdict on
            a message.
    """
    sides = (_side(chosen, "chosen", prompt is None), _side(rejected, "rejected", prompt is None))
    whole = [bool(side) and side[0].role != "assistant" for side in sides]
    if not any(whole):
        if prompt is None:
            raise BadRowError("no-prompt", "chosen and rejected are answers without a prompt; add a prompt column")
        return _checked(Pair(tuple(prompt), tuple(sides[0]), tuple(sides[1])))
    if not all(whole):
        raise BadRowError("no-shared-prompt", "only one of chosen and rejected holds the whole conversation")
    shared = 0
    for left, right in zip(*sides, strict=False):
        if left != right:
            break
        shared += 1
    if shared == len(sides[0]) == len(sides[1]):
        # Equal conversations: what precedes the last answer is the prompt, and the task decides on the rest.
        shared = max((n for n, message in enumerate(sides[0]) if message.role == "assistant"), default=shared)
    pair = Pair(tuple(sides[0][:shared]), tuple(sides[0][shared:]), tuple(sides[1][shared:]))
    if prompt is not None:
        _check_same_prompt(prompt, pair)
    return _checked(pair)


def split_answer(messages: Sequence[Message]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Split a chat into what was asked and the last answer, with its tool calls and their results.

    Args:
        messages: Turns in a proven order, the last of them the assistant's.
    """
    asked = max(n for n, message in enumerate(messages) if message.role in ("user", "system")) + 1
    return tuple(messages[:asked]), tuple(messages[asked:])


def turns_of(found: object, name: str) -> list[Message] | None:
    """The turns of a list of messages, or of the list as JSON text (as CSV files hold it); ``None`` for other values.

    Args:
        found: What stands where a text or turns may stand.
        name: Its name for error messages.

    Raises:
        BadRowError: One of the verdicts on messages.
    """
    turns = _written_turns(found) if isinstance(found, str) else found
    return parse_messages(turns, name) if is_turns(turns) else None


def _written_turns(text: str) -> object:
    """The list of turns that a text holds as JSON; ``None`` for a text that means itself, be it JSON of another kind.

    Answers such as ``[{"name": "Ann", "role": "CEO"}]`` are texts to learn: a turn has a speaker and says something.
    """
    if not text.lstrip().startswith("["):
        return None
    try:
        found = decode_json(text)
    except BadRowError:
        return None
    said = all(isinstance(turn, Mapping) and any(turn.keys() >= keys for keys in _TURN_KEYS) for turn in found)
    known = said and any(str(turn.get("role", turn.get("from"))).strip().lower() in ROLE_NAMES for turn in found)
    return found if known else None


def _side(found: object, name: str, may_be_transcript: bool) -> list[Message]:
    if isinstance(found, Mapping):
        return [parse_message(found, name)]
    turns = turns_of(found, name)
    if turns is not None:
        return turns
    text = text_of(found, name)
    if text is None or not text.strip():
        raise BadRowError("empty-answer", f"{name} is {described(found)}; allowed: text, a message, a list of messages")
    if may_be_transcript and text.lstrip().startswith("Human:"):
        return _transcript(text.strip(), name)
    return [Message("assistant", text)]


def _transcript(text: str, name: str) -> list[Message]:
    """``Human: ...`` and ``Assistant: ...`` paragraphs as turns."""
    parts = _TRANSCRIPT_TURN.split(text)[1:]
    speakers, texts = parts[0::2], parts[1::2]
    raw = [{"from": speaker, "value": spoken.strip()} for speaker, spoken in zip(speakers, texts, strict=True)]
    return [
        parse_message({**turn, "from": {"Human": "user", "Assistant": "assistant"}[turn["from"]]}, f"{name}[{n}]")
        for n, turn in enumerate(raw)
    ]


def _check_same_prompt(prompt: Sequence[Message], pair: Pair) -> None:
    """A prompt column beside whole conversations repeats their beginning, its last question, or the chosen one."""
    said = [(message.role, message.content.strip()) for message in prompt]
    found = [(message.role, message.content.strip()) for message in (*pair.prompt, *pair.chosen)]
    if said == found:
        return
    found = found[: len(pair.prompt)]
    questions = [turn for turn in found if turn[0] == "user"]
    if found[: len(said)] != said and said != questions[-1:]:
        raise BadRowError("prompt-mismatch", "chosen and rejected do not begin with what the prompt column says")


def _checked(pair: Pair) -> Pair:
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not answer:
            raise BadRowError("empty-answer", f"{name} ends where the other goes on: it holds no answer of its own")
        if answer[0].role != "assistant" or any(message.role in ("user", "system") for message in answer):
            raise BadRowError(
                "no-shared-prompt",
                f"{name} parts from the other at a turn of the {answer[0].role}, or goes on after its "
                "answer with user turns; allowed: equal turns, then assistant and tool turns",
            )
    return pair
