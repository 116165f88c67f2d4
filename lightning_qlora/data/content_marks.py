"""Which characters of a rendered chat are whose: content is marked, rendered, and found again.

Every string that a row brings along (content, reasoning, names and arguments of calls, tool schemas) is put between
a pair of private-use characters of its own, inside its outer white space, before the chat template sees it.
What the template writes itself is then what lies outside the pairs. The marked text with its marks removed must be
the very text that the template writes without marks; a template that cuts, copies or inspects content in a way
that marks disturb fails that comparison, and the row is refused rather than guessed at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from lightning_qlora.data.control_tokens import RESERVED_MARKERS, THINK_CLOSE, THINK_OPEN
from lightning_qlora.schema import Message

__all__ = [
    "RESERVED_CHARACTERS",
    "Kind",
    "Marks",
    "Source",
    "Span",
    "TemplateFields",
    "TooManyStringsError",
    "holds_marker",
    "template_messages",
    "template_tools",
    "template_variables",
]

MARK_BASE = 0x100000
MAX_MARKS = 0x4000
RESERVED_CHARACTERS = re.compile("[\ud800-\udfff\U00100000-\U0010ffff]")
"""Characters that a row must not hold: lone surrogates, which no tokenizer reads, and the last plane of Unicode.

That plane is private use, empty in every published text encoding; the marks live there, and so do the names of
control tokens in the twin tokenizer.
"""

_MARK = re.compile("([\U00100000-\U00107fff])")
_RESERVED = re.compile("(" + "|".join(sorted(map(re.escape, RESERVED_MARKERS), key=len, reverse=True)) + ")")

Kind: TypeAlias = Literal["content", "reasoning", "call", "label", "tools", "variable"]
"""What a marked string is: ``label`` is a name or an id, which templates may leave out."""

NO_MESSAGE = -1
"""The owner of strings that belong to no message: tool schemas, template variables, and names that several share."""

SCHEMA_WORDS: frozenset[str] = frozenset(
    {"type", "function", "name", "description", "parameters", "properties", "required", "items", "enum", "const"}
    | {"default", "title", "format", "return", "returns", "strict", "additionalProperties", "anyOf", "oneOf", "allOf"}
    | {"not", "nullable", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength"}
    | {"minItems", "maxItems", "uniqueItems", "pattern", "examples", "string", "integer", "number", "boolean", "array"}
    | {"object", "null", "any", "$ref", "$defs", "definitions"}
)
"""The vocabulary of tool schemas: templates look for these words, and no control token is made of them."""

DOCUMENT_WORDS: frozenset[str] = frozenset(
    {"text", "title", "content", "contents", "page_content", "body", "snippet", "id", "doc_id", "url", "source", "name"}
    | {"metadata", "date", "author", "score"}
)
"""The same of ``documents``: their usual keys, of which some are parts of names such as ``<|endoftext|>``."""


class TooManyStringsError(Exception):
    """A row brings along more strings than there are marks. No ``ValueError``, which templates raise by themselves."""


class Source(NamedTuple):
    """Where a marked string came from: the index of its message, and what it is there."""

    owner: int
    kind: Kind


class Span(NamedTuple):
    """Characters ``start`` to ``end`` of a rendered text that hold the marked string number ``mark``."""

    start: int
    end: int
    mark: int


class TemplateFields(NamedTuple):
    """How a chat template wants to be handed messages.

    Attributes:
        reasoning: The keys under which it reads an assistant's reasoning.
        content_as_parts: Whether it wants content as a list of parts, as templates of models that also see do.
        arguments_as_text: Whether it writes the arguments of a call as they are, so that they must be JSON text.
    """

    reasoning: tuple[str, ...] = ("reasoning_content",)
    content_as_parts: bool = False
    arguments_as_text: bool = False


class Marks:
    """The marks of one row.

    Args:
        spare: Tells which strings may go unmarked, because no control token can be made of them.

    Attributes:
        sources: Where each marked string came from.
        spared: What calls say that went unmarked.
    """

    def __init__(self, spare: Callable[[str], bool] | None = None) -> None:
        self.sources: list[Source] = []
        self.spared: list[str] = []
        self._spare = spare
        self._labels: dict[str, str] = {}

    def wrap(self, text: str, owner: int, kind: Kind) -> str:
        """Mark ``text`` inside its outer white space."""
        core = text.strip()
        if not core:
            return text
        number = len(self.sources)
        if number >= MAX_MARKS:
            raise TooManyStringsError(
                f"The row holds more than {MAX_MARKS} strings (contents, reasoning, names and arguments of calls, tool "
                "schemas), which is as many as can be told apart in one chat. Split it into several rows."
            )
        self.sources.append(Source(owner, kind))
        marked = f"{chr(MARK_BASE + 2 * number)}{core}{chr(MARK_BASE + 2 * number + 1)}"
        if len(core) == len(text):
            return marked
        begin = len(text) - len(text.lstrip())
        return text[:begin] + marked + text[begin + len(core) :]

    def label(self, text: str) -> str:
        """Mark a name or an id, the same one always in the same way, so that templates can compare them."""
        if text not in self._labels:
            spare = self._spare is not None and self._spare(text)
            self._labels[text] = text if spare else self.wrap(text, NO_MESSAGE, "label")
        return self._labels[text]

    def answer(self, text: str, owner: int, kind: Kind) -> str:
        """Mark an assistant's text piece by piece, between the think and tool markers that it may write."""
        if not holds_marker(text):
            return self.wrap(text, owner, kind)
        pieces = _RESERVED.split(text)
        opened = pieces[1] in THINK_CLOSE
        for index, piece in enumerate(pieces):
            if index % 2:
                opened = piece in THINK_OPEN or (opened and piece not in THINK_CLOSE)
            else:
                pieces[index] = self.wrap(piece, owner, "reasoning" if opened else kind)
        return "".join(pieces)

    def json(self, value: Any, owner: int, kind: Kind, words: frozenset[str] = frozenset()) -> Any:
        """Mark all strings of a JSON value, keys too, but for ``words``; marks sort as the strings do."""
        strings = sorted(set(_strings(value)) - words)
        spare = self._spare or (lambda _: False)
        marked = {text: text if spare(text) else self.wrap(text, owner, kind) for text in strings}
        if kind == "call":
            self.spared += [text for text in strings if spare(text)]
        return _replaced(value, marked)

    def find(self, marked: str) -> tuple[str, list[Span]] | None:
        """Remove the marks from a rendered text.

        Returns:
            The text without marks and the spans that were marked, in order; ``None`` when a pair is broken.
        """
        pieces = _MARK.split(marked)
        spans, position, begun, start = [], 0, None, 0
        for index, piece in enumerate(pieces):
            if not index % 2:
                position += len(piece)
                continue
            number, closes = divmod(ord(piece) - MARK_BASE, 2)
            if closes:
                if begun != number:
                    return None
                spans.append(Span(start, position, number))
                begun = None
            else:
                if begun is not None:
                    return None
                begun, start = number, position
        return None if begun is not None else ("".join(pieces[::2]), spans)


def holds_marker(text: str) -> bool:
    """Whether ``text`` holds a think or tool marker."""
    return ("<" in text or "[" in text or "◁" in text) and _RESERVED.search(text) is not None


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _replaced(value: Any, table: dict[str, str]) -> Any:
    if isinstance(value, str):
        return table.get(value, value)
    if isinstance(value, dict):
        return {table.get(key, key): _replaced(item, table) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, table) for item in value]
    return value


def template_tools(tools: Sequence[dict[str, Any]], marks: Marks | None) -> list[dict[str, Any]] | None:
    """Copy tool schemas for a chat template, marked when ``marks`` are given; ``None`` when there are none."""
    if not tools:
        return None
    copy: list[dict[str, Any]] = (
        _replaced(tools, {}) if marks is None else marks.json(tools, NO_MESSAGE, "tools", SCHEMA_WORDS)
    )
    return copy


def template_variables(variables: dict[str, Any], marks: Marks | None) -> dict[str, Any]:
    """Copy a row's variables for a chat template, their strings marked when ``marks`` are given."""
    if marks is None:
        return variables
    return {name: marks.json(value, NO_MESSAGE, "variable", DOCUMENT_WORDS) for name, value in variables.items()}


def template_messages(messages: Sequence[Message], fields: TemplateFields, marks: Marks | None) -> list[dict[str, Any]]:
    """Write messages as the dictionaries that chat templates read, marked when ``marks`` are given."""
    written = []
    for owner, message in enumerate(messages):
        content = message.content
        if marks is not None:
            content = (marks.answer if message.role == "assistant" else marks.wrap)(content, owner, "content")
        parts = [{"type": "text", "text": content}] if fields.content_as_parts else content
        turn: dict[str, Any] = {"role": message.role, "content": parts}
        if message.reasoning:
            reasoning = message.reasoning if marks is None else marks.answer(message.reasoning, owner, "reasoning")
            turn |= dict.fromkeys(fields.reasoning, reasoning)
        if message.tool_calls:
            turn["tool_calls"] = [_template_call(call, owner, fields, marks) for call in message.tool_calls]
        for key, label in (("name", message.name), ("tool_call_id", message.tool_call_id)):
            if label is not None:
                turn[key] = label if marks is None else marks.label(label)
        written.append(turn)
    return written


def _template_call(call: dict[str, Any], owner: int, fields: TemplateFields, marks: Marks | None) -> dict[str, Any]:
    function = call.get("function", call)
    name, arguments = function["name"], function.get("arguments") or {}
    label = call.get("id")
    if marks is None:
        arguments = _replaced(arguments, {})
    else:
        name = marks.json(name, owner, "call")
        arguments = marks.json(arguments, owner, "call")
        label = marks.label(label) if isinstance(label, str) else label
    if fields.arguments_as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    written: dict[str, Any] = {} if label is None else {"id": label}
    return {**written, "type": "function", "function": {"name": name, "arguments": arguments}}
