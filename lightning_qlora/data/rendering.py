"""A chat template at work: messages in, text out, together with the proof of whose every character is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from lightning_qlora.data.content_marks import (
    RESERVED_CHARACTERS,
    Kind,
    Marks,
    Source,
    Span,
    TemplateFields,
    TooManyStringsError,
    holds_marker,
    template_messages,
    template_tools,
    template_variables,
)
from lightning_qlora.data.control_tokens import ControlTokens, Match
from lightning_qlora.data.prompt_proof import PromptProof, prove_prompt
from lightning_qlora.data.template_environment import compile_template
from lightning_qlora.schema import ROLES, Message, Origin, RowRefused

__all__ = ["Answer", "Dialogue", "Rendered", "Renderer", "check_characters", "check_messages"]

MAX_SKELETONS = 4096

TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""What a template raises by itself (``raise_exception``) or by a message that it does not expect."""


class Dialogue(NamedTuple):
    """What a chat template is given."""

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]]
    variables: dict[str, Any]
    origin: Origin


class Rendered(NamedTuple):
    """A rendered chat: a skeleton filled with words.

    Attributes:
        text: What the template wrote.
        skeleton: What it writes around the words of the row.
        starts: Where each gap of the skeleton begins in the text; a word ends there, except before the first.
        controls: The control tokens that the template wrote (and the markers that an assistant may write).
    """

    text: str
    skeleton: Skeleton
    starts: list[int]
    controls: list[Match]

    def span(self, number: int) -> Span:
        """Where the row's string stands that is the ``number``-th of the text."""
        start = self.starts[number] + len(self.skeleton.gaps[number])
        return Span(start, self.starts[number + 1], self.skeleton.marks[number])

    def content_before(self, end: int) -> int:
        """How many spans there are up to the last of the first ``end`` that is more than a name."""
        return next((number + 1 for number in reversed(range(end)) if self.kind(number) != "label"), 0)

    def owner(self, span: int) -> int:
        """The index of the message that span number ``span`` belongs to."""
        return self.skeleton.sources[self.skeleton.marks[span]].owner

    def kind(self, span: int) -> Kind:
        """What span number ``span`` is in that message."""
        return self.skeleton.sources[self.skeleton.marks[span]].kind

    def is_of(self, span: int, index: int) -> bool:
        """Whether span number ``span`` belongs to message ``index``, or to no message because it is but a name."""
        return self.kind(span) == "label" or self.owner(span) == index


class Shape(NamedTuple):
    """A chat of plain text without its words.

    Attributes:
        key: Roles, and the outer white space of every string: what the words stand in.
        words: The strings inside their white space, in the order in which they are marked.
    """

    key: tuple[Any, ...]
    words: list[str]


class Answer(NamedTuple):
    """An assistant's turn in a skeleton, and so in every chat of its shape.

    Attributes:
        gap: The gap in which its supervised characters begin.
        offset: How many characters of the gap stand before them.
        stop: Index of the control token that ends it among those of the skeleton.
        mode: The variables that make the template write the prompt to this turn, besides the run's.
        prompt_ids: What the tokens before the turn must end with; ``None`` when it takes the whole prompt to tell.
    """

    gap: int
    offset: int
    stop: int
    mode: dict[str, Any]
    prompt_ids: list[int] | None


class Skeleton(NamedTuple):
    """What a template writes around the words of chats of one shape.

    Attributes:
        gaps: The text before, between and after the words.
        controls: The control tokens in each gap.
        marks: Which of the row's strings stands behind each gap but the last.
        sources: Where the strings come from.
        owned: The numbers of the gaps before each message's strings, by the index of the message.
        answers: The turns that were found in it so far, by the index of their message.
    """

    gaps: list[str]
    controls: list[tuple[Match, ...]]
    marks: list[int]
    sources: list[Source]
    owned: dict[int, list[int]]
    answers: dict[int, Answer]

    def fill(self, words: Sequence[str]) -> Rendered:
        """Put words into the gaps, one for each mark."""
        pieces: list[str] = []
        starts: list[int] = []
        controls: list[Match] = []
        position = 0
        for gap, matches, word in zip(self.gaps, self.controls, [*words, ""], strict=True):
            starts.append(position)
            for start, end, token_id in matches:
                controls.append(Match(position + start, position + end, token_id))
            pieces += (gap, word)
            position += len(gap) + len(word)
        return Rendered("".join(pieces), self, starts, controls)


class Renderer:
    """Renders dialogues by a tokenizer's chat template.

    Args:
        tokenizer: The tokenizer that holds the template.
        control_tokens: The tokenizer's control tokens.
        variables: Variables for the template that the run, not the row, sets.

    Attributes:
        fields: How the template wants to be handed messages.
        modes: The variables of the generation prompts that the template may be asked for: as it comes, and without
            thinking if it knows that switch and the run leaves it open.
        proofs: What is proven of the prompts, for chats without and with tools.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, control_tokens: ControlTokens, variables: dict[str, Any]
    ) -> None:
        self._tokenizer = tokenizer
        self._control_tokens = control_tokens
        self._variables = {**tokenizer.special_tokens_map, **variables}
        self._templates: dict[bool, jinja2.Template] = {}
        self.proofs: dict[bool, PromptProof] = {}
        self._skeletons: dict[tuple[Any, ...], Skeleton] = {}
        self.modes: tuple[dict[str, Any], ...] = ({},)
        self.fields = TemplateFields()
        if tokenizer.chat_template:
            for has_tools in (False, True):
                source = tokenizer.get_chat_template(None, tools=[{}] if has_tools else None)
                self._templates[has_tools] = compile_template(source)
                self.proofs[has_tools] = prove_prompt(source)
            keys = ("thinking", "reasoning")
            named = tuple(key for key in keys if f".{key}" in source or f"'{key}'" in source or f'"{key}"' in source)
            self.fields = TemplateFields(("reasoning_content", *named))
            if "enable_thinking" in source and "enable_thinking" not in variables:
                self.modes = ({}, {"enable_thinking": False})

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self._templates)

    def write(self, dialogue: Dialogue, *, for_generation: bool, marks: Marks | None = None) -> str:
        """Run the template.

        Raises:
            RowRefused: ``template-error`` when it raises, ``no-chat-template`` when there is none.
            TooManyStringsError: There are not enough marks.
        """
        if not self._templates:
            raise RowRefused(
                "no-chat-template",
                "The tokenizer has no chat template, so conversations cannot be rendered. Write chat_template: "
                "FILE.jinja, or, for prompts and completions that are to be raw text, format: raw_completion.",
                dialogue.origin,
            )
        try:
            return self._templates[bool(dialogue.tools)].render(
                {
                    "documents": None,
                    **self._variables,
                    **template_variables(dialogue.variables, marks),
                    "messages": template_messages(dialogue.messages, self.fields, marks),
                    "tools": template_tools(dialogue.tools, marks),
                    "add_generation_prompt": for_generation,
                }
            )
        except TEMPLATE_ERRORS as error:
            raise RowRefused("template-error", f"The chat template raised: {error}", dialogue.origin) from error

    def render(self, dialogue: Dialogue, *, for_generation: bool = False) -> Rendered:
        """Run the template with and without marks, and tell whose every character is.

        Marks are followed once for all chats of a shape: where they led says what the template writes around the
        words, and a row of the same shape must come out as just that with its own words, or its marks are followed.

        Raises:
            RowRefused: The template raises, the row holds reserved characters, or the marks do not come back whole.
        """
        text = self.write(dialogue, for_generation=for_generation)
        check_characters(text, dialogue.origin)
        shape = _shape(dialogue, for_generation)
        if shape is not None and (skeleton := self._skeletons.get(shape.key)) is not None:
            filled = skeleton.fill([shape.words[mark] for mark in skeleton.marks])
            if filled.text == text:
                return filled
        for spare in (None, self._control_tokens.is_inert):
            marks = Marks(spare)
            try:
                found = marks.find(self.write(dialogue, for_generation=for_generation, marks=marks))
            except RowRefused:
                continue  # the template objects to the marks, not to the row
            except TooManyStringsError as error:
                raise RowRefused("too-many-strings", str(error), dialogue.origin) from error
            if found is not None and found[0] == text and all(name in text for name in marks.spared):
                skeleton = self._skeleton(text, found[1], marks.sources)
                filled = skeleton.fill([text[span.start : span.end] for span in found[1]])
                if shape is not None and all(text[start:end] == shape.words[mark] for start, end, mark in found[1]):
                    self._remember(shape.key, skeleton)
                return filled
        raise RowRefused(
            "content-altered",
            "The chat template inspects, cuts or rearranges content, so whose each character is cannot be proven.",
            dialogue.origin,
        )

    def _skeleton(self, text: str, spans: Sequence[Span], sources: list[Source]) -> Skeleton:
        starts, ends = [0, *(span.end for span in spans)], [*(span.start for span in spans), len(text)]
        gaps = [text[start:end] for start, end in zip(starts, ends, strict=True)]
        controls = [self._control_tokens.matches(gap) for gap in gaps]
        marks = [span.mark for span in spans]
        owned: dict[int, list[int]] = {}
        for number, mark in enumerate(marks):
            owned.setdefault(sources[mark].owner, []).append(number)
        return Skeleton(gaps, controls, marks, sources, owned, {})

    def _remember(self, key: tuple[Any, ...], skeleton: Skeleton) -> None:
        if len(self._skeletons) >= MAX_SKELETONS:
            self._skeletons.clear()
        self._skeletons[key] = skeleton


def _shape(dialogue: Dialogue, for_generation: bool) -> Shape | None:
    """Take the words out of a chat; ``None`` where more than plain text would have to be compared."""
    if dialogue.tools or dialogue.variables:
        return None
    key: list[Any] = [for_generation]
    words = []
    for message in dialogue.messages:
        if message.tool_calls or message.name is not None or message.tool_call_id is not None:
            return None
        key.append(message.role)
        for text in (message.content, message.reasoning or ""):
            word = text.strip()
            if message.role == "assistant" and holds_marker(word):
                return None
            begin = 0 if len(word) == len(text) else len(text) - len(text.lstrip())
            key.append((text[:begin], text[begin + len(word) :], bool(word)))
            if word:
                words.append(word)
    return Shape(tuple(key), words)


def check_characters(text: str, origin: Origin) -> None:
    """Refuse text that holds lone surrogates, or characters that serve here as marks.

    Raises:
        RowRefused: ``reserved-character``.
    """
    if not text.isascii() and (found := RESERVED_CHARACTERS.search(text)):
        raise RowRefused(
            "reserved-character",
            f"The text holds U+{ord(found.group()):04X}; lone surrogates and the private-use plane from U+100000 on "
            "are not allowed.",
            origin,
        )


def check_messages(dialogue: Dialogue) -> None:
    """Refuse what no template should be asked to render.

    Raises:
        RowRefused: ``empty-conversation``, ``unknown-role``, ``content-not-text``, ``train-not-assistant``.
    """
    if not dialogue.messages:
        raise RowRefused("empty-conversation", "The row has no messages.", dialogue.origin)
    for index, message in enumerate(dialogue.messages):
        if message.role not in ROLES:
            raise RowRefused(
                "unknown-role",
                f"Message {index} has role {message.role!r}; allowed: {', '.join(ROLES)}.",
                dialogue.origin,
            )
        if not isinstance(message.content, str) or not isinstance(message.reasoning, str | None):
            raise RowRefused("content-not-text", f"The content of message {index} is not text.", dialogue.origin)
        if message.train and message.role != "assistant":
            raise RowRefused(
                "train-not-assistant",
                f"Message {index} ({message.role}) asks to be trained on; only assistant turns are.",
                dialogue.origin,
            )
