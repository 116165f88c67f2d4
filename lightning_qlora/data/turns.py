"""Assistant turns in a rendered chat: where each begins, where it ends, and whether generation would get there."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from lightning_qlora.data.control_tokens import ControlTokens
from lightning_qlora.data.rendering import Dialogue, Rendered, Renderer
from lightning_qlora.schema import Message, Origin, RowRefused

__all__ = ["Turn", "Turns", "check_rendered", "other_prompt"]

PROBE = Origin("probe", 1)
CALL_ID = "call12345"
CALL = {"type": "function", "id": CALL_ID, "function": {"name": "add", "arguments": {"a": 1, "b": "two"}}}
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


class Border(NamedTuple):
    """Where an assistant's turn begins behind the content before it.

    Attributes:
        length: Characters that the generation prompt writes there.
        prompt_ids: The last tokens of that prompt, from its last control token on; ``None`` when it has none.
    """

    length: int
    prompt_ids: list[int] | None


class Turn(NamedTuple):
    """The supervised characters of one turn.

    Attributes:
        message: Index of the message.
        start: The first supervised character.
        stop: Index of the control token that ends the turn among the controls of the rendered chat.
        prompt_ids: What the tokens before the turn must end with; ``None`` when it takes the whole prompt to tell.
    """

    message: int
    start: int
    stop: int
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
        text, spans = rendered.text, rendered.spans
        own = [number for number in range(len(spans)) if rendered.owner(number) == index]
        if not own:
            raise RowRefused("empty-answer", f"Message {index} (assistant) says nothing.", dialogue.origin)
        first, last = own[0], own[-1]
        texts = [spans[number].mark for number in own if rendered.kind(number) in ("content", "reasoning")]
        if len(own) != last - first + 1 or len(set(texts)) != len(texts):
            raise RowRefused(
                "content-altered", f"The chat template writes parts of message {index} twice or apart.", dialogue.origin
            )
        begin = spans[first - 1].end if first else 0
        border = self._border(dialogue, index, text[begin : spans[first].start])
        if border is None:
            return other_prompt(dialogue.origin, index)
        limit = spans[last + 1].start if last + 1 < len(spans) else len(text)
        stop = self._end(rendered, spans[last].end, limit)
        stops = self.call_stops if dialogue.messages[index].tool_calls else self.answer_stops
        if stop is None or rendered.controls[stop].token_id not in stops:
            return self._no_end_token(dialogue.origin, index, stops)
        return Turn(index, begin + border.length, stop, border.prompt_ids)

    def _end(self, rendered: Rendered, begin: int, limit: int) -> int | None:
        """The first control token from ``begin`` on, but for the think and tool markers that belong to the turn."""
        reserved = self._control_tokens.reserved_ids
        for number, match in enumerate(rendered.controls):
            if begin <= match.start < limit and match.token_id not in reserved:
                return number
        return None

    def _no_end_token(self, origin: Origin, index: int, stops: set[int]) -> RowRefused:
        names = ", ".join(repr(self._control_tokens.contents[stop]) for stop in sorted(stops))
        return RowRefused(
            "no-end-token",
            f"The chat template does not end message {index} by a token that ends an answer there "
            f"({names or 'it has none'}), so the model would not learn to stop. Let the template write the end token.",
            origin,
        )

    def _border(self, dialogue: Dialogue, index: int, gap: str) -> Border | None:
        """Tell how much of the text between the content before and a turn's own is the generation prompt's.

        The answer depends on that text alone, so that few prompts are ever rendered.
        """
        variables = json.dumps(dialogue.variables, sort_keys=True, default=repr)
        key = (gap, index == 0, bool(dialogue.tools), variables)
        if key not in self._borders:
            if len(self._borders) >= MAX_BORDERS:
                self._borders.clear()
            length = self._prompt_length(dialogue, index, gap)
            self._borders[key] = None if length is None else Border(length, self._last_prompt_ids(gap[:length]))
        return self._borders[key]

    def _prompt_length(self, dialogue: Dialogue, index: int, gap: str) -> int | None:
        if index == 0:
            return len(gap) if gap.endswith(self._generation_prompt or "\0") else None
        try:
            prompt = self._renderer.render(dialogue._replace(messages=dialogue.messages[:index]), for_generation=True)
        except RowRefused:
            return None
        tail = prompt.text[prompt.spans[-1].end if prompt.spans else 0 :]
        if not gap.startswith(tail):
            return None
        if not self._generation_prompt and self._control_tokens.matches(gap[len(tail) :]):
            return None  # the template has no generation prompt, so nothing tells the role header from the answer
        return len(tail)

    def _last_prompt_ids(self, prompt: str) -> list[int] | None:
        controls = self._control_tokens.matches(prompt)
        if not controls:
            return None
        return list(self._control_tokens.backend.encode(prompt[controls[-1].start :], add_special_tokens=False).ids)

    def _probe(self) -> None:
        """Learn from short chats how the template ends turns and prompts."""
        ask, tell = Message("user", "Probe question"), Message("assistant", "Probe answer")
        call = Message("assistant", "", tool_calls=(CALL,))
        result = Message("tool", "Probe result", tool_call_id=CALL_ID, name="add")
        self._learn_generation_prompt(ask)
        self.answer_stops = self._learn_stops((ask, tell), ())
        for arguments_as_text in (False, True):
            self._renderer.fields = self._renderer.fields._replace(arguments_as_text=arguments_as_text)
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
        tail, other = (rendered.text[rendered.spans[-1].end :] for rendered in (prompt, closed))
        pairs = enumerate(zip(tail, other, strict=False))
        common = next((place for place, (one, two) in pairs if one != two), min(len(tail), len(other)))
        for match in self._control_tokens.matches(tail):
            common = match.start if match.start < common < match.end else common
        self._generation_prompt = tail[common:]
        self.control_token_ids |= {match.token_id for match in prompt.controls}

    def _learn_stops(self, messages: tuple[Message, ...], tools: tuple[dict[str, Any], ...]) -> set[int]:
        """Find the token that ends the second message."""
        dialogue = Dialogue(messages, tools, {}, PROBE)
        try:
            rendered = self._renderer.render(dialogue)
            check_rendered(dialogue, rendered)
        except RowRefused:
            return set()
        self.control_token_ids |= {match.token_id for match in rendered.controls}
        end = max(span.end for number, span in enumerate(rendered.spans) if rendered.owner(number) == 1)
        stop = self._end(rendered, end, len(rendered.text))
        return set() if stop is None else {rendered.controls[stop].token_id}


def check_rendered(dialogue: Dialogue, rendered: Rendered) -> dict[int, RowRefused]:
    """Refuse a row of which the template leaves something out; return the turns whose reasoning it drops."""
    present = {span.mark for span in rendered.spans}
    dropped: dict[int, RowRefused] = {}
    for mark, (owner, kind) in enumerate(rendered.sources):
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
    if dialogue.tools and not any(rendered.sources[mark].kind == "tools" for mark in present):
        raise RowRefused(
            "tools-not-rendered", "The row offers tools, which the chat template does not write.", dialogue.origin
        )
    return dropped


def other_prompt(origin: Origin, message: int) -> RowRefused:
    """The refusal of a turn that generation would not get to in the way that the row does."""
    return RowRefused(
        "prompt-not-prefix",
        f"What stands before message {message} is not the prompt that the chat template writes for generation "
        "there, so the model would be trained on a prompt that it is never given. A variable of the template "
        "(template_kwargs) or reasoning in the rows may be missing.",
        origin,
    )
