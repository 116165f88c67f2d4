"""Questions for ``predict``: JSONL -> messages that end where the assistant is to speak."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from lightning_qlora.data.json_values import BadRowError, decode_json, described
from lightning_qlora.data.messages import parse_messages, parse_tools
from lightning_qlora.schema import Message, Origin

__all__ = ["Prompt", "read_prompts"]


class Prompt(NamedTuple):
    """One question.

    Attributes:
        messages: The turns up to the answer, the last not the assistant's.
        tools: JSON schemas of the functions offered to the assistant.
        row: The line as it was read, to be written beside the answer.
        origin: Where it was read.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    row: dict[str, Any]
    origin: Origin


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read a JSONL file of questions, one object a line.

    Each has ``prompt`` (a text; with ``system``, if wanted) or ``messages``; assistant turns at the end of
    ``messages`` are the reference answer and are not shown to the model. ``tools`` may stand beside, and any other
    key is passed on.

    Args:
        path: The file.

    Raises:
        ValueError: If there is no such file, it holds no question, or a line is not a question; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file of questions {str(path)!r}. Write the path of a JSONL file.")
    prompts = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            origin = Origin(str(path), number)
            try:
                prompts.append(_read_prompt(line, origin))
            except (BadRowError, UnicodeDecodeError) as error:
                raise ValueError(f"{origin} is no question: {error}") from None
    if not prompts:
        raise ValueError(f"{path} holds no question. Write one JSON object with 'prompt' or 'messages' per line.")
    return prompts


def _read_prompt(line: bytes, origin: Origin) -> Prompt:
    row = decode_json(line.decode("utf-8-sig"))
    if not isinstance(row, dict) or (row.get("prompt") is None) == (row.get("messages") is None):
        raise BadRowError(
            "unknown-shape",
            f"the line is {described(row)}; allowed: an object with either 'prompt' (a text) or 'messages' (a list), "
            "and the other absent or null",
        )
    found = row.get("messages")
    if found is None:
        turns = [("system", row.get("system")), ("user", row["prompt"])]
        found = [{"role": role, "content": content} for role, content in turns if content is not None]
    messages = parse_messages(found, "messages")
    while messages and messages[-1].role == "assistant":
        messages.pop()
    if not messages or messages[-1].role == "system":
        raise BadRowError("no-prompt", "there is no turn that the assistant could answer")
    return Prompt(tuple(messages), parse_tools(row.get("tools")), row, origin)
