"""A row as somebody wrote it -> a row as this package trains on it; or a verdict that says why not.

Shapes that are recognised by themselves, in this order:

=================  ======================================================================================
format             what a row looks like
=================  ======================================================================================
preference         ``chosen`` and ``rejected``: texts, messages, or lists of messages; the prompt is in
                   ``prompt`` (or ``question``, ``instruction``, ``messages``, ``conversations``), or it is
                   the part that both lists begin with
unpaired           a chat, or prompt and completion, with ``label``: true for a good answer, false for a bad
                   one; the label is that of the last answer
messages           ``messages``: a list of ``{role, content}``, the OpenAI shape
sharegpt           ``conversations``: a list of ``{from, value}``
alpaca             ``instruction``, ``input`` (optional; joined by a blank line), ``output``, ``history``; also
                   ``question``, ``query`` or ``prompt`` for input, ``answer``, ``response``, ... for output
prompt_completion  ``prompt`` and ``completion``: two texts, which become a user and an assistant turn, or
                   two lists of messages; also ``question``/``answer``, ``query``/``response``, ...
text               ``text``: raw text, every token of it supervised, no chat template
=================  ======================================================================================

``raw_completion`` is prompt and completion as raw text, without a chat template; it has to be asked for by
``format``. Everywhere ``system`` (a text), ``tools`` (a list of JSON schemas) and ``chat_template_kwargs`` (an
object) may stand beside, and ``reasoning`` beside an answer that is a text. A column that is null counts as absent; a
list of messages may be JSON text, as it is in CSV files. Of a prompt-completion row and of a pair only the answer is
supervised, of every other chat all assistant turns.

A supervised run takes pairs only where ``format: preference`` says so, and learns the chosen answers. A run over pairs
takes nothing else; a run over single judged answers takes ``unpaired`` rows, and pairs as one good and one bad answer.

Good rows pass unchanged, with one exception: turns after the last assistant turn are dropped, since they
enter no loss. Several turns of one role in a row are allowed. Everything else that is not right is refused:

===========================  ============================================================================
reason                       verdict on
===========================  ============================================================================
not-an-object                a row that is a list, a text, a number, null
unknown-shape                none of the shapes above; the message lists the keys found
missing-column               a column that ``columns`` or the chosen ``format`` names is not there
unread-column                the shape does not read a field that ``columns`` maps, or an ``instruction``
not-a-pair                   a preference run met a row without ``chosen`` and ``rejected``
pair-for-supervised-run      a supervised run met a pair that it was not told of by ``format``
no-label                     a run over judged answers met an answer without ``label``
bad-label                    ``label`` other than true, false, 1, 0, or these as text
messages-not-list            ``messages`` is neither a list nor a list as JSON text
no-messages                  the list is empty
message-not-object           a message is not an object
missing-role                 a message has neither ``role`` nor ``from``
unknown-role                 a role outside of ``messages.ROLE_NAMES``
missing-content              null content without a tool call
content-not-text             content, prompt, answer ... is a number, an object, or holds an image
empty-answer                 an assistant turn, completion or output of nothing but white space
unwanted-answer              a supervised run met an answer with ``label: false``
empty-user-turn              a user turn, prompt or instruction of nothing but white space
empty-text                   a raw text of nothing but white space
lone-system                  a system turn and nothing else
second-system-turn           two system turns, or ``system`` beside a system turn
system-not-first             a system turn after the first turn
assistant-first              the assistant speaks before any user turn
no-assistant-turn            there is nothing to learn
nothing-supervised           ``train``/``weight`` switches off every assistant turn
bad-weight                   ``train``/``weight`` other than 0, 1, true, false, or both at once
trained-prompt               ``train: true`` on a turn that is not the assistant's
reasoning-outside-assistant  ``reasoning_content`` on a turn that is not the assistant's
bad-tool-call                a call without a name, arguments that are no object, a call by another role
tool-without-call            a tool's result that no call asked for
bad-tools                    ``tools`` that is not a list of functions with names
bad-template-kwargs          ``chat_template_kwargs`` that is no object, or names a variable of the renderer
bad-history                  ``history`` that is not a list of [question, answer]
no-prompt                    a pair of texts without a prompt
prompt-mismatch              a pair whose ``prompt`` is not what its lists begin with
no-shared-prompt             a pair whose lists part at a turn that is not the assistant's
same-answers                 a pair with two equal answers (refused by preference runs only)
unpaired-surrogate           half a surrogate pair: not encodable as UTF-8
nul-character                a NUL character
not-finite-number            NaN or infinity in tools or arguments (and anywhere in JSON files)
not-json                     a value in tools or arguments that JSON does not have
nested-too-deep              tools or arguments deeper than 64 levels (and JSON too deep to be read)
===========================  ============================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal, TypeAlias, get_args

from lightning_qlora.data.columns import CHAT_COLUMNS, WatchedFields, renamed
from lightning_qlora.data.json_values import BadRowError, check_value, described, described_keys
from lightning_qlora.data.messages import check_turns, parse_messages, parse_tools, text_of
from lightning_qlora.data.preference import parse_pair, split_answer, turns_of
from lightning_qlora.schema import (
    Completion,
    Conversation,
    Message,
    Origin,
    PreferenceRow,
    Row,
    RowRefused,
    UnpairedRow,
)

__all__ = [
    "FORMATS",
    "RENDERER_VARIABLES",
    "TASKS",
    "Format",
    "ParsedRow",
    "Task",
    "parse_row",
    "recognise_format",
]

Format: TypeAlias = Literal[
    "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "raw_completion", "text", "preference", "unpaired"
]
"""The shape of a row; ``auto`` looks at each row."""

FORMATS: Final[tuple[Format, ...]] = get_args(Format)

Task: TypeAlias = Literal["sft", "preference", "unpaired"]
"""What the rows are for: supervised fine-tuning, learning from pairs, or from answers judged by themselves."""

TASKS: Final[tuple[Task, ...]] = get_args(Task)

ParsedRow: TypeAlias = Row | PreferenceRow | UnpairedRow
"""What a row is read as: for ``sft`` a ``Row``, for ``preference`` a pair, for ``unpaired`` an answer or a pair."""

_PROMPT_COLUMNS: Final = ("prompt", "question", "query", "input")
_COMPLETION_COLUMNS: Final = ("completion", "response", "answer", "output")
_INPUT_COLUMNS: Final = (("input", "context"), ("query", "question"))
_OUTPUT_COLUMNS: Final = ("output", "response", "completion", "answer")
_LABELS: Final = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_EXPECTED: Final = "messages | conversations | instruction + output | prompt + completion | text | chosen + rejected"

RENDERER_VARIABLES: Final = frozenset(
    {"messages", "conversation", "tools", "add_generation_prompt", "continue_final_message", "tokenize"}
    | {"chat_template"}
)
"""Variables of chat templates that the rows or the renderer set, so that nobody else can."""


def recognise_format(record: Mapping[str, Any]) -> Format:
    """Tell the shape of a row from the names of its columns.

    Args:
        record: The row as it was read. Columns that are null decide only if no others do.

    Returns:
        One of the shapes in the table above, never ``auto``.

    Raises:
        BadRowError: ``unknown-shape``, a ValueError that lists the keys found.
    """
    found = _shape_of(record, {key for key, value in record.items() if value is not None})
    found = found or _shape_of(record, set(record))
    if found is None:
        raise BadRowError(
            "unknown-shape",
            f"found the keys {described_keys(record)}; recognised: {_EXPECTED}. "
            "For other names write columns: {prompt: <your column>, completion: <your column>}",
        )
    return found


def _shape_of(record: Mapping[str, Any], keys: set[str]) -> Format | None:
    if keys >= {"chosen", "rejected"}:
        return "preference"
    shape = _chat_shape(record, keys)
    return "unpaired" if shape not in (None, "text") and _judgement(record.get("label")) is not None else shape


def _judgement(label: object) -> bool | None:
    """Whether a label calls an answer good; ``None`` for other labels, often classes, which say nothing about it."""
    if isinstance(label, str):
        return _LABELS.get(label.strip().lower())
    return bool(label) if isinstance(label, (int, float)) and label in (0, 1) else None


def _chat_shape(record: Mapping[str, Any], keys: set[str]) -> Format | None:
    for column in CHAT_COLUMNS:
        if column in keys:
            turns = record[column]
            first = turns[0] if isinstance(turns, list) and turns else None
            spoken = "from" in first if isinstance(first, Mapping) else column != "messages"
            return "sharegpt" if spoken else "messages"
    if "instruction" in keys and not keys.isdisjoint(_OUTPUT_COLUMNS):
        return "alpaca"
    if not keys.isdisjoint(_PROMPT_COLUMNS) and not keys.isdisjoint(_COMPLETION_COLUMNS):
        return "prompt_completion"
    return "text" if "text" in keys else None


def parse_row(
    record: object,
    origin: Origin,
    *,
    format: Format = "auto",
    columns: Mapping[str, str] | None = None,
    task: Task = "sft",
) -> ParsedRow:
    """Convert one row of any known shape.

    Args:
        record: The row as it was read: an object of JSON, a record of a Parquet file, a line of a CSV file.
        origin: Where it was read.
        format: Its shape; ``auto`` recognises it.
        columns: Field of the shape -> name of the column that holds it.
        task: What the row is for. ``sft`` turns a pair into its chosen answer if ``format`` says that it is a pair;
            ``preference`` takes pairs only; ``unpaired`` takes single answers with a label, and pairs.

    Raises:
        RowRefused: The row cannot be used; the reasons are in the table of this module.
        ValueError: ``format`` is none of ``FORMATS``.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; allowed: {', '.join(FORMATS)}")
    try:
        if not isinstance(record, Mapping):
            raise BadRowError(
                "not-an-object", f"the row is {described(record)}; allowed: an object such as {_EXPECTED}"
            )
        fields = renamed(record, columns) if columns else record
        shape = _chosen_shape(fields, columns) if format == "auto" else format
        if not columns:
            return _for_task(fields, shape, origin, task, asked=format == "preference")
        watched = WatchedFields(fields)
        row = _for_task(watched, shape, origin, task, asked=format == "preference")
        watched.check_read(columns, shape)
        return row
    except BadRowError as bad:
        raise RowRefused(bad.reason, bad.detail, origin) from None


def _for_task(fields: Mapping[str, Any], shape: Format, origin: Origin, task: Task, *, asked: bool) -> ParsedRow:
    if task == "sft":
        return _for_supervision(fields, shape, origin, asked=asked)
    return _for_preference(fields, shape, origin, task)


def _for_supervision(fields: Mapping[str, Any], shape: Format, origin: Origin, *, asked: bool) -> Row:
    row = _PARSERS[shape](fields, origin)
    if isinstance(row, UnpairedRow):
        if not row.desirable:
            raise BadRowError(
                "unwanted-answer",
                "label: false marks the answer as a bad example; allowed: label: true, or no label. If the label is a "
                "class of another kind, write the shape as format in the source, such as format: prompt_completion",
            )
        return Conversation((*_unsupervised(row.prompt), *row.completion), origin, row.tools, row.template_kwargs)
    if isinstance(row, PreferenceRow):
        if not asked:
            raise BadRowError(
                "pair-for-supervised-run",
                "the row is a pair (chosen + rejected), and supervised training learns one answer; train on pairs with "
                "PreferenceDataModule, or write format: preference in the source to learn the chosen answers",
            )
        return Conversation((*_unsupervised(row.prompt), *row.chosen), origin, row.tools, row.template_kwargs)
    return row


def _for_preference(
    fields: Mapping[str, Any], shape: Format, origin: Origin, task: Task
) -> PreferenceRow | UnpairedRow:
    if task == "unpaired" and shape not in ("preference", "raw_completion", "text"):
        if fields.get("label") is None:
            raise BadRowError(
                "no-label",
                f"the row has the shape {shape} and no label; a run over single answers needs label: true or false "
                "beside each (or chosen + rejected)",
            )
        return _judged(fields, origin, None if shape == "unpaired" else shape)
    row = _PARSERS[shape](fields, origin)
    if isinstance(row, PreferenceRow):
        if row.chosen == row.rejected:
            raise BadRowError("same-answers", "chosen and rejected are equal; allowed: two different answers")
        return row
    allowed = "chosen + rejected" + (", or a chat, or prompt + completion, with label" if task == "unpaired" else "")
    remedy = (
        "for single answers with a label write unpaired: true" if shape == "unpaired" else "train with SFTDataModule"
    )
    raise BadRowError("not-a-pair", f"the row has the shape {shape}; allowed: {allowed}. Else {remedy}")


def _chosen_shape(fields: Mapping[str, Any], columns: Mapping[str, str] | None) -> Format:
    """The mapped fields decide first: a stray ``text`` column must not win over what the user wrote."""
    mapped = {field for field in columns or () if field in fields}
    return _shape_of(fields, mapped) or recognise_format(fields)


def _first(record: Mapping[str, Any], names: Sequence[str], needed_by: str = "") -> Any:
    """The first of several columns that is not null."""
    for name in names:
        if record.get(name) is not None:
            return record[name]
    if needed_by and not any(name in record for name in names):
        found = described_keys(record)
        raise BadRowError("missing-column", f"{needed_by} needs {' or '.join(map(repr, names))}; the row has {found}")
    return None


def _text(value: object, what: str, reason: str) -> str:
    text = text_of(value, what)
    if text is None or not text.strip():
        raise BadRowError(reason, f"{what} is {described(value)}; allowed: text that is more than white space")
    return text


def _with_system(messages: list[Message], record: Mapping[str, Any]) -> list[Message]:
    """Put the ``system`` column, where there is one, before the turns."""
    system = text_of(_first(record, ("system", "system_prompt")), "system")
    if not system or not system.strip():
        return messages
    if messages and messages[0].role == "system":
        if messages[0].content == system:
            return messages
        raise BadRowError("second-system-turn", "the row has a system column and a system turn; allowed: one of them")
    return [Message("system", system), *messages]


def _conversation(messages: list[Message], record: Mapping[str, Any], origin: Origin) -> Conversation:
    tools = parse_tools(_first(record, ("tools", "functions")))
    turns = check_turns(_with_system(messages, record))
    return Conversation(turns, origin, tools, _template_kwargs(record))


def _template_kwargs(record: Mapping[str, Any]) -> dict[str, Any]:
    found = record.get("chat_template_kwargs")
    if found is None:
        return {}
    if not isinstance(found, Mapping) or not RENDERER_VARIABLES.isdisjoint(found):
        raise BadRowError(
            "bad-template-kwargs",
            f"chat_template_kwargs is {described(found)}; allowed: an object without "
            f"{', '.join(sorted(RENDERER_VARIABLES))}",
        )
    check_value(found, "chat_template_kwargs")
    return dict(found)


def _from_messages(record: Mapping[str, Any], origin: Origin) -> Conversation:
    column = next((name for name in CHAT_COLUMNS if record.get(name) is not None), None)
    if column is None:
        _first(record, CHAT_COLUMNS, needed_by="a chat")
        column = "messages"
    return _conversation(parse_messages(record.get(column), column), record, origin)


def _from_alpaca(record: Mapping[str, Any], origin: Origin) -> Conversation:
    messages: list[Message] = []
    history = record.get("history")
    for pair in _history(history) if history else ():
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    return _conversation([*messages, *_alpaca_turn(record)], record, origin)


def _alpaca_turn(record: Mapping[str, Any]) -> tuple[Message, Message]:
    answer = _answer(_first(record, _OUTPUT_COLUMNS, needed_by="alpaca"), "output", record)
    return Message("user", _alpaca_prompt(record)), answer


def _answer(found: object, what: str, record: Mapping[str, Any]) -> Message:
    """An answer that is a text, with the ``reasoning`` beside it."""
    reasoning = text_of(record.get("reasoning"), "reasoning") or None
    return Message("assistant", _text(found, what, "empty-answer"), reasoning=reasoning)


def _alpaca_prompt(record: Mapping[str, Any]) -> str:
    instruction = text_of(_first(record, ("instruction",), needed_by="alpaca"), "instruction") or ""
    inputs = [text_of(_first(record, names), names[0]) for names in _INPUT_COLUMNS]
    if inputs == [None, None]:
        prompt = text_of(record.get("prompt"), "prompt") or ""
        # Some Alpaca data hold the whole row, written out, as prompt.
        inputs = [] if instruction.strip() and instruction in prompt else [prompt]
    parts = [part for part in (instruction, *inputs) if part and part.strip()]
    return _text("\n\n".join(parts), "instruction", "empty-user-turn")


def _history(history: object) -> list[tuple[str, str]]:
    pairs = history if isinstance(history, list) else None
    if pairs is None or any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
        raise BadRowError(
            "bad-history", f"history is {described(history)}; allowed: a list of [question, answer] pairs"
        )
    return [(_text(pair[0], "history", "empty-user-turn"), _text(pair[1], "history", "empty-answer")) for pair in pairs]


def _from_prompt_completion(record: Mapping[str, Any], origin: Origin) -> Conversation:
    prompt = _prompt_turns(_prompt(record, "prompt_completion"))
    found = _first(record, _COMPLETION_COLUMNS, needed_by="prompt_completion")
    answer = _part_of_chat(found, "completion") or [_answer(found, "completion", record)]
    return _conversation([*_unsupervised(prompt), *answer], record, origin)


def _prompt(record: Mapping[str, Any], shape: Format) -> Any:
    if record.get("prompt") is None and record.get("instruction"):
        raise BadRowError(
            "unread-column",
            f"the row has an instruction, which the shape {shape} does not read; allowed: format: alpaca (instruction, "
            "input, output), or columns: {prompt: <the column with the whole prompt>}",
        )
    return _first(record, _PROMPT_COLUMNS, needed_by=shape)


def _prompt_turns(found: object) -> list[Message]:
    return _part_of_chat(found, "prompt") or [Message("user", _text(found, "prompt", "empty-user-turn"))]


def _part_of_chat(found: object, what: str) -> list[Message] | None:
    """The turns of a prompt or an answer. A text that holds a whole chat is none: it is a text about that chat."""
    turns = turns_of(found, what)
    whole = turns and turns[0].role != "assistant" and turns[-1].role == "assistant"
    return None if whole and isinstance(found, str) else turns


def _unsupervised(prompt: Sequence[Message]) -> list[Message]:
    """Answers inside of a prompt are context, unless the row itself says otherwise."""
    return [
        replace(message, train=False) if message.role == "assistant" and message.train is None else message
        for message in prompt
    ]


def _from_raw_completion(record: Mapping[str, Any], origin: Origin) -> Completion:
    prompt = text_of(_prompt(record, "raw_completion"), "prompt") or ""
    found = _first(record, _COMPLETION_COLUMNS, needed_by="raw_completion")
    return Completion(prompt, _text(found, "completion", "empty-answer"), origin)


def _from_text(record: Mapping[str, Any], origin: Origin) -> Completion:
    return Completion("", _text(_first(record, ("text",), needed_by="text"), "text", "empty-text"), origin)


def _from_preference(record: Mapping[str, Any], origin: Origin) -> PreferenceRow:
    for name in ("chosen", "rejected"):
        _first(record, (name,), needed_by="preference")
    pair = parse_pair(_prompt_of_pair(record), record["chosen"], record["rejected"])
    turns = _with_system(list(pair.prompt), record)
    for answer in (pair.chosen, pair.rejected):
        check_turns([*turns, *answer])
    tools = parse_tools(_first(record, ("tools", "functions")))
    return PreferenceRow(tuple(turns), pair.chosen, pair.rejected, origin, tools, _template_kwargs(record))


def _prompt_of_pair(record: Mapping[str, Any]) -> list[Message] | None:
    if record.get("instruction") is not None:
        return [Message("user", _alpaca_prompt(record))]
    found = _first(record, _PROMPT_COLUMNS)
    if found is not None:
        return _prompt_turns(found)
    found = _first(record, CHAT_COLUMNS)
    return None if found is None else turns_of(found, "messages") or _prompt_turns(found)


def _from_unpaired(record: Mapping[str, Any], origin: Origin) -> UnpairedRow:
    return _judged(record, origin, None)


def _judged(record: Mapping[str, Any], origin: Origin, shape: Format | None) -> UnpairedRow:
    """Read a chat of a known or unknown shape, and the label of its last answer."""
    label = _first(record, ("label",), needed_by="unpaired")
    desirable = _judgement(label)
    if desirable is None:
        raise BadRowError(
            "bad-label", f"label is {described(label)}; allowed: true or 1 (a good answer), false or 0 (a bad one)"
        )
    shape = shape or _chat_shape(record, {key for key, value in record.items() if value is not None})
    if shape is None or shape == "text":
        raise BadRowError(
            "missing-column", f"unpaired needs messages or prompt + completion; the row has {described_keys(record)}"
        )
    chat = _PARSERS[shape](record, origin)
    assert isinstance(chat, Conversation)
    prompt, answer = split_answer(chat.messages)
    return UnpairedRow(prompt, answer, desirable, origin, chat.tools, chat.template_kwargs)


_PARSERS: Final[dict[Format, Callable[[Mapping[str, Any], Origin], ParsedRow]]] = {
    "messages": _from_messages,
    "sharegpt": _from_messages,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
    "raw_completion": _from_raw_completion,
    "text": _from_text,
    "preference": _from_preference,
    "unpaired": _from_unpaired,
}
