"""Strict decoding of JSON, and the checks that every string and nested value of a row passes.

Python's decoder takes what no JSON reader promises: the last of two equal keys, ``NaN``, half a surrogate pair.
Each of these changes training data without a word, so each is a verdict here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final, NoReturn

__all__ = ["MAX_DEPTH", "BadRowError", "check_text", "check_value", "decode_json", "described"]

MAX_DEPTH: Final = 64
"""Levels of lists and objects that tools and arguments may have: chat templates render them recursively."""


class BadRowError(ValueError):
    """A verdict on one row, before its origin is known.

    Args:
        reason: The short stable code that the tables count by.
        detail: What was found, what is allowed, what to write.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def described(value: object) -> str:
    """Say in a few words what a value is, without ever rendering all of it.

    Deep or huge values would make the message itself fail; ``repr`` of a short string escapes what a
    terminal or a log cannot encode.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, float):
        return f"the number {value!r}"
    if isinstance(value, int):
        return f"the number {value}" if value.bit_length() <= 64 else "a huge number"
    if isinstance(value, Mapping):
        return f"an object with the keys {described_keys(value)}" if value else "an empty object"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}" if value else "an empty list"
    return f"a value of type {type(value).__name__}"


def described_keys(record: Mapping[Any, Any]) -> str:
    """The first keys of an object, quoted."""
    keys = list(record)
    shown = ", ".join(described(key) for key in keys[:12])
    return f"{shown} and {len(keys) - 12} more" if len(keys) > 12 else shown or "(none)"


def check_text(text: str, what: str) -> str:
    """Return ``text`` if every character of it can be tokenised and written back.

    Args:
        text: Any string of a row.
        what: The name of the place, for the message.

    Raises:
        BadRowError: It holds half a surrogate pair (no UTF-8 exists for it) or a NUL character (C libraries
            end the string there).
    """
    if text.isascii():
        if "\x00" in text:
            raise _bad_character("nul-character", "a NUL character (U+0000)", text.index("\x00"), what)
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"half a surrogate pair (U+{ord(text[error.start]):04X})"
        raise _bad_character("unpaired-surrogate", found, error.start, what) from None
    if "\x00" in text:
        raise _bad_character("nul-character", "a NUL character (U+0000)", text.index("\x00"), what)
    return text


def _bad_character(reason: str, found: str, position: int, what: str) -> BadRowError:
    return BadRowError(reason, f"{what} holds {found} at character {position + 1}; allowed: text that is valid UTF-8")


def check_value(value: object, what: str) -> None:
    """Check a nested value (tools, arguments): JSON types, sound strings, finite numbers, bounded depth.

    Args:
        value: Dictionaries, lists and plain values. Walked without recursion.
        what: The name of the place, for the message.

    Raises:
        BadRowError: The first thing that JSON cannot hold or a chat template could not render.
    """
    pending: list[tuple[object, int]] = [(value, 1)]
    while pending:
        item, depth = pending.pop()
        if isinstance(item, str):
            check_text(item, what)
        elif isinstance(item, (Mapping, list, tuple)):
            if depth > MAX_DEPTH:
                raise BadRowError("nested-too-deep", f"{what} is nested deeper than the {MAX_DEPTH} levels allowed")
            children = list(item.values()) if isinstance(item, Mapping) else item
            if isinstance(item, Mapping):
                for key in item:
                    if not isinstance(key, str):
                        raise BadRowError("not-json", f"{what} has {described(key)} as a key; allowed: text")
                    check_text(key, what)
            pending.extend((child, depth + 1) for child in children)
        elif isinstance(item, float):
            if not math.isfinite(item):
                raise BadRowError("not-finite-number", f"{what} holds {item!r}; allowed: finite numbers")
        elif item is not None and not isinstance(item, int):
            raise BadRowError("not-json", f"{what} holds {described(item)}; allowed: text, numbers, lists, objects")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise BadRowError("duplicate-key", f"the key {described(twice)} stands twice in one object; keep one")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise BadRowError("not-finite-number", f"found {name}, which is not JSON; allowed: finite numbers or null")


STRICT_DECODER: Final = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)


def decode_json(text: str) -> Any:
    """Decode one JSON value, all of ``text``, refusing what JSON does not define.

    Raises:
        BadRowError: ``broken-json``, ``duplicate-key``, ``not-finite-number`` or ``nested-too-deep``.
    """
    try:
        return STRICT_DECODER.decode(text)
    except json.JSONDecodeError as error:
        if text.startswith("\x00") or "\x00" in text[error.pos : error.pos + 1]:
            raise BadRowError("nul-character", f"a NUL byte stands at column {error.pos + 1}; remove it") from None
        raise BadRowError("broken-json", f"not JSON: {error.msg} at column {error.pos + 1}") from None
    except RecursionError:
        raise BadRowError("nested-too-deep", "lists or objects are nested too deep to be read") from None
    except BadRowError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise BadRowError("broken-json", f"not readable as JSON: {error}") from None
