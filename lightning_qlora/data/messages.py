"""One turn, and the order of turns: dictionaries as found in the wild -> ``Message``.

The verdicts are listed in ``formats``; this module holds the ones about a single message and about the
order of messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from lightning_qlora.data.json_values import BadRowError, check_text, check_value, decode_json, described
from lightning_qlora.schema import Message, Role

__all__ = ["ROLE_NAMES", "check_turns", "is_turns", "parse_message", "parse_messages", "parse_tools", "text_of"]

ROLE_NAMES: Final[dict[str, Role]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
"""Every name of a speaker that is understood, in lower case, and the role that it has here."""

_CALL_ROLES: Final = frozenset({"function_call", "tool_call"})
"""ShareGPT's speakers whose whole text is the call, as JSON."""

_REASONING_KEYS: Final = ("reasoning_content", "reasoning", "thinking")
_TRAIN_KEYS: Final = ("train", "training", "weight")

_PLAIN_KEYS: Final = frozenset({"role", "content"})
_PLAIN_ROLES: Final = frozenset({"system", "user", "assistant"})


def text_of(value: object, what: str) -> str | None:
    """The text of a ``content``: a string, or a list of text parts joined without a separator.

    Raises:
        BadRowError: It is neither, or a part of it is not text (an image, say).
    """
    if value is None:
        return None
    if isinstance(value, str):
        return check_text(value, what)
    if not isinstance(value, list):
        raise BadRowError(
            "content-not-text", f"{what} is {described(value)}; allowed: a string, or a list of {{type: text}} parts"
        )
    texts = []
    for part in value:
        text = part
        if isinstance(part, Mapping) and part.get("type", "text") in ("text", "input_text", "output_text"):
            text = part.get("text")
        if not isinstance(text, str):
            kind = f"a part of type {described(part['type'])}" if _is_typed(part) else described(part)
            raise BadRowError("content-not-text", f"{what} holds {kind}; allowed: parts {{type: text, text: ...}}")
        texts.append(check_text(text, what))
    return "".join(texts)


def _is_typed(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type", "text") != "text"


def parse_message(raw: object, what: str) -> Message:
    """Convert one message of the OpenAI shape (role/content) or of ShareGPT's (from/value).

    Args:
        raw: The message as it was read.
        what: Its name for error messages, such as ``"messages[2]"``.

    Raises:
        BadRowError: One of the verdicts on messages.
    """
    if type(raw) is dict and raw.keys() == _PLAIN_KEYS:  # most messages are no more than that
        plain_role, text = raw["role"], raw["content"]
        if type(text) is str and type(plain_role) is str and plain_role in _PLAIN_ROLES and text.strip():
            return Message(role=cast(Role, plain_role), content=check_text(text, what))
    if not isinstance(raw, Mapping):
        raise BadRowError("message-not-object", f"{what} is {described(raw)}; allowed: {{role: ..., content: ...}}")
    name, role = _role(raw, what)
    content = text_of(raw["content"] if raw.get("content") is not None else raw.get("value"), what)
    if name in _CALL_ROLES:
        calls, content = _parse_calls(content or "", what), ""
    else:
        calls = _calls_of(raw, role, what)
    reasoning = _reasoning(raw, role, what)
    if content is None and not calls and reasoning is None:
        raise BadRowError("missing-content", f"{what} ({role}) has no content; allowed: null only beside tool_calls")
    content = content or ""
    if not content.strip() and not calls and reasoning is None:
        if role == "assistant":
            raise BadRowError(
                "empty-answer", f"{what} is an assistant turn without text; nothing can be learned from it"
            )
        if role == "user":
            raise BadRowError("empty-user-turn", f"{what} is a user turn without text")
    return Message(
        role=role,
        content=content,
        reasoning=reasoning,
        tool_calls=calls,
        tool_call_id=_optional_text(raw, "tool_call_id", what) if role == "tool" else None,
        name=_optional_text(raw, "name", what),
        train=_train(raw, role, what),
    )


def _role(raw: Mapping[str, Any], what: str) -> tuple[str, Role]:
    found = raw.get("role")
    if found is None:
        found = raw.get("from")
    if found is None:
        raise BadRowError("missing-role", f"{what} is {described(raw)}; it needs a 'role' (or ShareGPT's 'from')")
    if isinstance(found, str):
        name = found if found in ROLE_NAMES else found.strip().lower()
        if name in ROLE_NAMES:
            return name, ROLE_NAMES[name]
    raise BadRowError("unknown-role", f"{what} is spoken by {described(found)}; allowed: {', '.join(ROLE_NAMES)}")


def _optional_text(raw: Mapping[str, Any], key: str, what: str) -> str | None:
    value = raw.get(key)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise BadRowError("content-not-text", f"{key} of {what} is {described(value)}; allowed: a string")
    return check_text(value, f"{key} of {what}")


def _reasoning(raw: Mapping[str, Any], role: Role, what: str) -> str | None:
    for key in _REASONING_KEYS:
        text = _optional_text(raw, key, what)
        if text is not None and text.strip():
            if role != "assistant":
                raise BadRowError("reasoning-outside-assistant", f"{what} ({role}) has {key}; only an assistant thinks")
            return text
    return None


def _train(raw: Mapping[str, Any], role: Role, what: str) -> bool | None:
    """The per-message switch: ``train`` (true/false) or OpenAI's ``weight`` (0/1)."""
    asked = set()
    for key in _TRAIN_KEYS:
        value = raw.get(key)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise BadRowError("bad-weight", f"{key} of {what} is {described(value)}; allowed: 0, 1, true, false")
        asked.add(bool(value))
    if len(asked) == 2:
        raise BadRowError("bad-weight", f"{what} says both yes and no to training ({', '.join(_TRAIN_KEYS)})")
    if not asked:
        return None
    train = asked.pop()
    if train and role != "assistant":
        raise BadRowError("trained-prompt", f"{what} ({role}) asks to be trained on; allowed on assistant turns only")
    return train


def _calls_of(raw: Mapping[str, Any], role: Role, what: str) -> tuple[dict[str, Any], ...]:
    found = raw.get("tool_calls")
    if not found:  # absent, null or an empty list
        found = raw.get("function_call")  # the shape before tool_calls
    if not found:
        return ()
    if role != "assistant":
        raise BadRowError("bad-tool-call", f"{what} ({role}) has tool_calls; only an assistant turn calls tools")
    return _parse_calls(found, what)


def _parse_calls(found: object, what: str) -> tuple[dict[str, Any], ...]:
    if isinstance(found, str):
        found = _decode(found, "bad-tool-call", f"the tool call of {what}")
    calls = found if isinstance(found, list) else [found]
    if not calls:
        raise BadRowError("bad-tool-call", f"{what} calls no tool")
    return tuple(_parse_call(call, f"tool call {number} of {what}") for number, call in enumerate(calls, 1))


def _parse_call(raw: object, what: str) -> dict[str, Any]:
    """One call in the OpenAI shape, or bare ``{name, arguments}``; arguments become a dictionary."""
    function = raw.get("function") if isinstance(raw, Mapping) and raw.get("function") is not None else raw
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name.strip():
        raise BadRowError("bad-tool-call", f"{what} is {described(raw)}; allowed: {{function: {{name, arguments}}}}")
    check_text(name, what)
    arguments = function.get("arguments")
    if arguments is None:
        arguments = function.get("parameters")
    if isinstance(arguments, str):
        arguments = _decode(arguments, "bad-tool-call", f"the arguments of {what}") if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise BadRowError("bad-tool-call", f"the arguments of {what} are {described(arguments)}; allowed: an object")
    check_value(arguments, f"the arguments of {what}")
    call: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}
    identity = _optional_text(raw, "id", what) if isinstance(raw, Mapping) else None
    return call if identity is None else {"id": identity, **call}


def _decode(text: str, reason: str, what: str) -> Any:
    try:
        return decode_json(text)
    except BadRowError as error:
        raise BadRowError(reason, f"{what}: {error.detail}") from None


def parse_tools(found: object) -> tuple[dict[str, Any], ...]:
    """The functions offered to the assistant: a list of JSON schemas, the list as JSON text, or each as JSON text.

    Raises:
        BadRowError: ``bad-tools``, or a verdict on the values inside.
    """
    if isinstance(found, str):
        found = _decode(found, "bad-tools", "tools") if found.strip() else None
    if found is None:
        return ()
    if not isinstance(found, list):
        raise BadRowError("bad-tools", f"tools is {described(found)}; allowed: a list of JSON schemas, or it as text")
    tools = []
    for number, tool in enumerate(found, 1):
        schema = _decode(tool, "bad-tools", f"tool {number}") if isinstance(tool, str) else tool
        function = schema.get("function", schema) if isinstance(schema, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            found_text = described(schema)
            raise BadRowError("bad-tools", f"tool {number} is {found_text}; allowed: {{type: function, function: ...}}")
        check_value(schema, f"tool {number}")
        tools.append(dict(schema) if "function" in schema else {"type": "function", "function": dict(function)})
    return tuple(tools)


def parse_messages(found: object, field: str) -> list[Message]:
    """A list of messages, or the list as JSON text (as CSV files hold it).

    Raises:
        BadRowError: One of the verdicts on messages.
    """
    if isinstance(found, str):
        found = _decode(found, "messages-not-list", field)
    if not isinstance(found, list):
        raise BadRowError("messages-not-list", f"{field} is {described(found)}; allowed: a list of messages")
    return [parse_message(message, f"{field}[{position}]") for position, message in enumerate(found)]


def is_turns(found: object) -> bool:
    """Whether a value is a list of messages, rather than a text or a list of text parts."""
    return isinstance(found, list) and any(
        isinstance(part, Mapping) and ("role" in part or "from" in part) for part in found
    )


def check_turns(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Check the order of the turns, and drop what follows the last answer.

    Turns after the last assistant turn enter no loss and would cost tokens; some templates also strip an
    answer's reasoning because of them. Several turns of one role in a row are kept as they are: whether they
    can be rendered is for the chat template to say.

    Raises:
        BadRowError: One of the verdicts on the order of turns.
    """
    if not messages:
        raise BadRowError("no-messages", "the list of messages is empty")
    start = 1 if messages[0].role == "system" else 0
    if start == len(messages):
        raise BadRowError("lone-system", "there is a system turn and nothing else; allowed: user, then assistant")
    open_calls: frozenset[str | None] | None = None
    last_answer = -1
    for position, message in enumerate(messages[start:], start):
        if message.role == "system":
            _refuse_system(position, start)
        if message.role == "tool":
            _check_tool_result(message, position, open_calls)
        elif position == start and message.role == "assistant":
            raise BadRowError("assistant-first", "the first turn is the assistant's; allowed: a user turn before it")
        else:
            open_calls = _calls_opened_by(message)
        if message.role == "assistant":
            last_answer = position
    if last_answer < 0:
        raise BadRowError("no-assistant-turn", f"none of the {len(messages)} turns is the assistant's")
    kept = tuple(messages[: last_answer + 1])
    if all(message.train is False for message in kept if message.role == "assistant"):
        raise BadRowError("nothing-supervised", "train/weight switches off every assistant turn of the row")
    return kept


def _refuse_system(position: int, start: int) -> None:
    if start == 1:
        raise BadRowError("second-system-turn", f"turn {position + 1} is another system turn; allowed: one, the first")
    raise BadRowError("system-not-first", f"turn {position + 1} is the system turn; allowed: as the first turn only")


def _calls_opened_by(message: Message) -> frozenset[str | None] | None:
    """The ids of the calls that tool turns may now answer; ``None`` where there was no call."""
    if message.tool_calls:
        return frozenset(call.get("id") for call in message.tool_calls)
    # Hermes-style data writes the call into the text.
    return frozenset({None}) if message.role == "assistant" and "<tool_call>" in message.content else None


def _check_tool_result(message: Message, position: int, open_calls: frozenset[str | None] | None) -> None:
    if open_calls is None:
        raise BadRowError(
            "tool-without-call",
            f"turn {position + 1} is a tool's result, but no assistant turn before it called a tool",
        )
    if message.tool_call_id is not None and None not in open_calls and message.tool_call_id not in open_calls:
        found = described(message.tool_call_id)
        raise BadRowError("tool-without-call", f"turn {position + 1} answers the call {found}, which was not made")
