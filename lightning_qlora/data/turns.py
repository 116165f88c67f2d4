"""Assistant turns in a rendered chat: where each begins, where it ends, and whether generation would get there."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Container
from itertools import islice
from typing import Any, NamedTuple

from lightning_qlora.data.control_tokens import ControlTokens
from lightning_qlora.data.rendering import Answer, Dialogue, Rendered, Renderer
from lightning_qlora.schema import Message, Origin, RowRefused

__all__ = ["Turn", "Turns", "check_rendered", "other_prompt"]

PROBE = Origin("probe", 1)
CALL_ID = "call12345"
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "One."},
                "b": {"type": "string", "description": "Two."},
            },
            "required": ["a", "b"],
        },
    },
}


MAX_BORDERS = 65536


TEXT = ("content", "reasoning")
"""The kinds of strings that a turn says once."""


class Border(NamedTuple):
    """Where an assistant's turn begins behind the content before it.

    Attributes:
        length: Characters that the generation prompt writes there.
        mode: The variables that make the template write that prompt, besides the run's.
        prompt_ids: The last tokens of that prompt, from its last control token on; ``None`` when it has none.
    """

    length: int
    mode: dict[str, Any]
    prompt_ids: list[int] | None


class Turn(NamedTuple):
    """The supervised characters of one turn.

    Attributes:
        message: Index of the message.
        start: The first supervised character.
        stop: Index of the control token that ends the turn among the controls of the rendered chat.
        mode: The variables that make the template write the prompt to this turn, besides the run's.
        prompt_ids: What the tokens before the turn must end with; ``None`` when it takes the whole prompt to tell.
    """

    message: int
    start: int
    stop: int
    mode: dict[str, Any]
    prompt_ids: list[int] | None


class Turns:
    """Finds the turns of a chat template, after learning from short chats how it ends turns and prompts.

    Args:
        renderer: Renders by the template.
        control_tokens: The tokenizer's control tokens.

    Attributes:
        answer_stops: The tokens that end an answer.
        call_stops: The tokens that end a turn that calls functions.
        control_token_ids: The control tokens that the template was seen to write.
    """

    def __init__(self, renderer: Renderer, control_tokens: ControlTokens) -> None:
        self._renderer = renderer
        self._control_tokens = control_tokens
        self._borders: dict[tuple[Any, ...], Border | None] = {}
        self._generation_prompt = ""
        self._inner_ids: set[int] = set(control_tokens.reserved_ids)
        self.answer_stops: set[int] = set()
        self.call_stops: set[int] = set()
        self.control_token_ids: set[int] = set()
        if renderer.has_template:
            self._probe()

    def find(self, dialogue: Dialogue, rendered: Rendered, index: int) -> Turn | RowRefused:
        """Find what message ``index`` has to say in the text, from the generation prompt to the end token.

        Returns:
            The turn, or the reason why the template writes it in another way than the model would have to.

        Raises:
            RowRefused: ``empty-answer``; ``content-altered`` when the turn is not in one piece.
        """
        answers = rendered.skeleton.answers
        found = answers.get(index) or self._find_answer(dialogue, rendered, index)
        if isinstance(found, RowRefused):
            return found
        if index not in answers and self._is_proven(dialogue, index):
            answers[index] = found
        gap, offset, stop, mode, prompt_ids = found
        return Turn(index, rendered.starts[gap] + offset, stop, mode, prompt_ids)

    def _is_proven(self, dialogue: Dialogue, index: int) -> bool:
        """Whether what was found out about a prompt holds for all prompts that end like it, whatever they say."""
        proof = self._renderer.proofs[bool(dialogue.tools)]
        before = dialogue.messages[index - 1] if index else None
        behind_other = before is None or (before.role != "assistant" and bool(before.content.strip()))
        return proof.behind_others if behind_other else proof.behind_answers

    def _find_answer(self, dialogue: Dialogue, rendered: Rendered, index: int) -> Answer | RowRefused:
        """Find a turn in a skeleton by one chat of its shape: the template writes it so in all of them."""
        first, last = self._own_spans(dialogue, rendered, index)
        gap = rendered.content_before(first)
        border = self._border(dialogue, rendered, index, rendered.starts[gap], rendered.span(first).start)
        if border is None:
            return other_prompt(dialogue.origin, index)
        later = range(last + 1, len(rendered.skeleton.marks))
        others = (rendered.span(number).start for number in later if not rendered.is_of(number, index))
        stops = self.call_stops if dialogue.messages[index].tool_calls else self.answer_stops
        stop = self._end(rendered, rendered.span(last).end, next(others, len(rendered.text)), stops)
        if stop is None:
            return self._no_end_token(dialogue.origin, index, stops)
        return Answer(gap, border.length, stop, border.mode, border.prompt_ids)

    def _own_spans(self, dialogue: Dialogue, rendered: Rendered, index: int) -> tuple[int, int]:
        """The spans by which a message begins, and by which all of it has been written.

        What comes later is an echo: templates repeat the name of the called function above its result.
        """
        marks = rendered.skeleton.marks
        own = rendered.skeleton.owned.get(index)
        if own is None:
            raise RowRefused("empty-answer", f"Message {index} (assistant) says nothing.", dialogue.origin)
        missing = {marks[number] for number in own}
        for number in range(own[0], len(marks)):
            mark = marks[number]
            if not rendered.is_of(number, index) or (rendered.kind(number) in TEXT and mark not in missing):
                break
            missing.discard(mark)
            if not missing:
                if any(rendered.kind(echo) in TEXT for echo in own if echo > number):
                    break
                return own[0], number
        raise RowRefused(
            "content-altered", f"The chat template writes parts of message {index} twice or apart.", dialogue.origin
        )

    def _end(self, rendered: Rendered, begin: int, limit: int, stops: Container[int]) -> int | None:
        """The first end token from ``begin`` on; only tokens that occur within turns may stand before it."""
        first = bisect_left(rendered.controls, begin, key=lambda match: match.start)
        for number, match in enumerate(islice(rendered.controls, first, None), first):
            if match.start >= limit:
                return None
            if match.token_id in stops:
                return number
            if match.token_id not in self._inner_ids:
                return None
        return None

    def _no_end_token(self, origin: Origin, index: int, stops: set[int]) -> RowRefused:
        names = ", ".join(repr(self._control_tokens.contents[stop]) for stop in sorted(stops))
        return RowRefused(
            "no-end-token",
            f"The chat template does not end message {index} by a token that ends an answer there "
            f"({names or 'it has none'}), so the model would not learn to stop. Let the template write the end token.",
            origin,
        )

    def _border(self, dialogue: Dialogue, rendered: Rendered, index: int, begin: int, end: int) -> Border | None:
        """Tell how much of the text between the content before and a turn's own is the generation prompt's.

        Of most templates it is proven that the answer depends on that text alone, so that few prompts are ever
        rendered.
        """
        if not self._is_proven(dialogue, index):
            return self._find_border(dialogue, rendered, index, begin, end)
        variables = json.dumps(dialogue.variables, sort_keys=True, default=repr) if dialogue.variables else ""
        before = tuple(
            (message.role, bool(message.tool_calls)) for message in dialogue.messages[max(0, index - 2) : index]
        )
        key = (rendered.text[begin:end], before, bool(dialogue.tools), variables)
        if key not in self._borders:
            if len(self._borders) >= MAX_BORDERS:
                self._borders.clear()
            self._borders[key] = self._find_border(dialogue, rendered, index, begin, end)
        return self._borders[key]

    def _find_border(self, dialogue: Dialogue, rendered: Rendered, index: int, begin: int, end: int) -> Border | None:
        """Ask for the generation prompt in each mode; take the first whose tokens, too, lead to the turn."""
        gap = rendered.text[begin:end]
        borders = []
        for mode in self._renderer.modes:
            length = self._prompt_length(dialogue, rendered, index, begin, gap, mode)
            if length is None or self._has_header(gap[length:]):
                continue
            border = Border(length, mode, self._last_prompt_ids(gap, length))
            borders.append(border)
            if border.prompt_ids is None or self._leads(gap, border):
                return border
        return borders[0] if borders else None

    def _has_header(self, text: str) -> bool:
        """Whether ``text`` opens a turn, which is never the model's to write."""
        written = {match.token_id for match in self._control_tokens.matches(text)}
        opening = self._control_tokens.matches(self._generation_prompt)
        if opening:
            return opening[0].token_id in written
        return self._generation_prompt in text if self._generation_prompt else bool(written)

    def _prompt_length(
        self, dialogue: Dialogue, rendered: Rendered, index: int, begin: int, gap: str, mode: dict[str, Any]
    ) -> int | None:
        if index == 0:
            return len(gap) if gap.endswith(self._generation_prompt) else None
        past = dialogue._replace(messages=dialogue.messages[:index], variables={**mode, **dialogue.variables})
        try:
            prompt = self._renderer.render(past, for_generation=True)
        except RowRefused:
            return None
        if mode and prompt.text != rendered.text[: len(prompt.text)]:
            return None
        tail = prompt.text[prompt.starts[prompt.content_before(len(prompt.skeleton.marks))] :]
        return len(tail) if gap.startswith(tail) else None

    def _leads(self, gap: str, border: Border) -> bool:
        start = self._control_tokens.matches(gap[: border.length])[-1].start
        ids = self._control_tokens.backend.encode(gap[start:], add_special_tokens=False).ids
        return border.prompt_ids == ids[: len(border.prompt_ids or ())]

    def _last_prompt_ids(self, gap: str, length: int) -> list[int] | None:
        controls = self._control_tokens.matches(gap[:length])
        if not controls:
            return None
        prompt = gap[controls[-1].start : length]
        return list(self._control_tokens.backend.encode(prompt, add_special_tokens=False).ids)

    def _probe(self) -> None:
        """Learn from short chats how the template ends turns and prompts."""
        ask, tell = Message("user", "Probe question"), Message("assistant", "Probe answer")
        for content_as_parts in (False, True):
            self._renderer.fields = self._renderer.fields._replace(content_as_parts=content_as_parts)
            self.answer_stops = self._learn_stops((ask, tell), ())
            if self.answer_stops:
                break
        else:
            self._renderer.fields = self._renderer.fields._replace(content_as_parts=False)
        self._learn_generation_prompt(ask)
        result = Message("tool", "Probe result", tool_call_id=CALL_ID, name="add")
        for arguments_as_text in (False, True):
            self._renderer.fields = self._renderer.fields._replace(arguments_as_text=arguments_as_text)
            for arguments in ({"a": "one", "b": 2}, {"a": 1, "b": 2}):
                call = Message("assistant", "", tool_calls=(_call(arguments),))
                for messages in ((ask, call), (ask, call, result, tell)):
                    self.call_stops |= self._learn_stops(messages, (TOOL,))
            if self.call_stops:
                return
        self._renderer.fields = self._renderer.fields._replace(arguments_as_text=False)

    def _learn_generation_prompt(self, ask: Message) -> None:
        dialogue = Dialogue((ask,), (), {}, PROBE)
        try:
            prompt, closed = (self._renderer.render(dialogue, for_generation=wanted) for wanted in (True, False))
        except RowRefused:
            return
        if not prompt.skeleton.marks or not closed.skeleton.marks:
            return
        tail, other = (rendered.text[rendered.starts[-1] :] for rendered in (prompt, closed))
        pairs = enumerate(zip(tail, other, strict=False))
        common = next((place for place, (one, two) in pairs if one != two), min(len(tail), len(other)))
        for match in self._control_tokens.matches(tail):
            common = match.start if match.start < common < match.end else common
        self._generation_prompt = tail[common:]
        self.control_token_ids |= {match.token_id for match in prompt.controls}

    def _learn_stops(self, messages: tuple[Message, ...], tools: tuple[dict[str, Any], ...]) -> set[int]:
        """Find the token that ends the second message, and those that stand between its parts."""
        dialogue = Dialogue(messages, tools, {}, PROBE)
        try:
            rendered = self._renderer.render(dialogue)
            check_rendered(dialogue, rendered)
            first, last = self._own_spans(dialogue, rendered, 1)
        except RowRefused:
            return set()
        start, end = rendered.span(first).end, rendered.span(last).end
        self.control_token_ids |= {match.token_id for match in rendered.controls}
        self._inner_ids |= {match.token_id for match in rendered.controls if start <= match.start < end}
        after = (match.token_id for match in rendered.controls if match.start >= end)
        return set(islice((token_id for token_id in after if token_id not in self._inner_ids), 1))


def _call(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "id": CALL_ID, "function": {"name": "add", "arguments": arguments}}


def check_rendered(dialogue: Dialogue, rendered: Rendered) -> dict[int, RowRefused]:
    """Refuse a row of which the template leaves something out; return the turns whose reasoning it drops."""
    sources, present = rendered.skeleton.sources, set(rendered.skeleton.marks)
    dropped: dict[int, RowRefused] = {}
    for mark, (owner, kind) in enumerate(sources):
        if mark in present or kind in ("label", "variable", "tools"):
            continue
        if kind != "reasoning":
            role = dialogue.messages[owner].role
            raise RowRefused(
                "message-not-rendered",
                f"The chat template leaves out what message {owner} ({role}) says.",
                dialogue.origin,
            )
        dropped[owner] = RowRefused(
            "reasoning-not-rendered",
            f"The chat template leaves out the reasoning of message {owner}.",
            dialogue.origin,
        )
    if dialogue.tools and not any(sources[mark].kind == "tools" for mark in present):
        raise RowRefused(
            "tools-not-rendered", "The row offers tools, which the chat template does not write.", dialogue.origin
        )
    return dropped


def other_prompt(origin: Origin, message: int) -> RowRefused:
    """The refusal of a turn that generation would not get to in the way that the row does."""
    return RowRefused(
        "prompt-not-prefix",
        f"What stands before message {message} is not the prompt that the chat template writes for generation "
        "there, so the model would be trained on a prompt that it is never given. A variable of the template (such as "
        "template_kwargs: {enable_thinking: false}) or reasoning in the rows may be missing.",
        origin,
    )
