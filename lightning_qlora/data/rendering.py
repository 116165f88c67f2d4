"""A chat template at work: messages in, text out, together with the proof of whose every character is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from lightning_qlora.data.content_marks import (
    RESERVED_CHARACTERS,
    Kind,
    Marks,
    Source,
    Span,
    TemplateFields,
    template_messages,
    template_tools,
    template_variables,
)
from lightning_qlora.data.control_tokens import ControlTokens, Match
from lightning_qlora.schema import ROLES, Message, Origin, RowRefused

__all__ = ["Dialogue", "Rendered", "Renderer", "check_characters", "check_messages"]

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
    """A rendered chat.

    Attributes:
        text: What the template wrote.
        spans: Where the row's strings stand in it, in order.
        sources: Where each marked string came from.
        controls: The control tokens that the template wrote (and the markers that an assistant may write).
    """

    text: str
    spans: list[Span]
    sources: list[Source]
    controls: list[Match]

    def owner(self, span: int) -> int:
        """The index of the message that span number ``span`` belongs to."""
        return self.sources[self.spans[span].mark].owner

    def kind(self, span: int) -> Kind:
        """What span number ``span`` is in that message."""
        return self.sources[self.spans[span].mark].kind


class Renderer:
    """Renders dialogues by a tokenizer's chat template.

    Args:
        tokenizer: The tokenizer that holds the template.
        control_tokens: The tokenizer's control tokens.
        variables: Variables for the template that the run, not the row, sets.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, control_tokens: ControlTokens, variables: dict[str, Any]
    ) -> None:
        self._tokenizer = tokenizer
        self._control_tokens = control_tokens
        self._variables = {**tokenizer.special_tokens_map, **variables}
        self._templates: dict[bool, jinja2.Template] = {}
        self.fields = TemplateFields()
        if tokenizer.chat_template:
            for has_tools in (False, True):
                source = tokenizer.get_chat_template(None, tools=[{}] if has_tools else None)
                self._templates[has_tools] = _compile_jinja_template(source)
            keys = ("thinking", "reasoning")
            named = tuple(key for key in keys if f".{key}" in source or f"'{key}'" in source or f'"{key}"' in source)
            self.fields = TemplateFields(("reasoning_content", *named))

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self._templates)

    def write(self, dialogue: Dialogue, *, for_generation: bool, marks: Marks | None = None) -> str:
        """Run the template.

        Raises:
            RowRefused: ``template-error`` when it raises, ``no-chat-template`` when there is none.
        """
        if not self._templates:
            raise RowRefused(
                "no-chat-template",
                "The tokenizer has no chat template, so conversations cannot be rendered. Give one as a Jinja file, "
                "or use prompt-completion rows.",
                dialogue.origin,
            )
        try:
            return self._templates[bool(dialogue.tools)].render(
                messages=template_messages(dialogue.messages, self.fields, marks),
                tools=template_tools(dialogue.tools, marks),
                documents=None,
                add_generation_prompt=for_generation,
                **{**self._variables, **template_variables(dialogue.variables, marks)},
            )
        except TEMPLATE_ERRORS as error:
            raise RowRefused("template-error", f"The chat template raised: {error}", dialogue.origin) from error

    def render(self, dialogue: Dialogue, *, for_generation: bool = False) -> Rendered:
        """Run the template with and without marks, and tell whose every character is.

        Raises:
            RowRefused: The template raises, the row holds reserved characters, or the marks do not come back whole.
        """
        text = self.write(dialogue, for_generation=for_generation)
        check_characters(text, dialogue.origin)
        for spare in (None, self._control_tokens.is_inert):
            marks = Marks(spare)
            try:
                found_spans = marks.find(self.write(dialogue, for_generation=for_generation, marks=marks))
            except RowRefused:
                continue  # the template objects to the marks, not to the row
            if found_spans is not None and found_spans[0] == text:
                spans = found_spans[1]
                return Rendered(text, spans, marks.sources, self._controls(text, spans))
        raise RowRefused(
            "content-altered",
            "The chat template inspects, cuts or rearranges content, so whose each character is cannot be proven.",
            dialogue.origin,
        )

    def _controls(self, text: str, spans: Sequence[Span]) -> list[Match]:
        controls, position = [], 0
        for end, resume in [*((span.start, span.end) for span in spans), (len(text), len(text))]:
            if end > position:
                for start, stop, token_id in self._control_tokens.matches(text[position:end]):
                    controls.append(Match(position + start, position + stop, token_id))
            position = resume
        return controls


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
