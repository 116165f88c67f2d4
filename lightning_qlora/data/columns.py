"""The data's own columns -> the fields of a row, as ``columns`` maps them; nothing mapped is lost without a word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from typing_extensions import override

from lightning_qlora.data.json_values import BadRowError, described_keys

__all__ = ["CHAT_COLUMNS", "COLUMNS", "WatchedFields", "check_columns", "renamed"]

COLUMNS: Final = (
    "messages", "conversations", "role", "content", "system", "tools", "chat_template_kwargs", "prompt",
    "completion", "reasoning", "instruction", "input", "output", "history", "text", "chosen", "rejected", "label",
)  # fmt: skip
"""What ``columns`` may map; ``role`` and ``content`` are the keys inside each message."""

CHAT_COLUMNS: Final = ("messages", "conversations", "conversation")
"""Columns that hold lists of turns."""

_MESSAGE_KEYS: Final = ("role", "content")
"""What ``columns`` maps inside of each message."""


def check_columns(columns: Mapping[str, str] | None) -> None:
    """Check a column mapping once, before any row is read.

    Raises:
        ValueError: It maps a name that is not in ``COLUMNS``.
    """
    unknown = [name for name in columns or {} if name not in COLUMNS]
    if unknown:
        raise ValueError(
            f"columns maps {', '.join(map(repr, unknown))}, which is no field of a row. Allowed on the left side: "
            f"{', '.join(COLUMNS)}. Write columns: {{prompt: <your column>, completion: <your column>}}."
        )


def renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Give the columns of a row the names of the fields that they are mapped to.

    Args:
        record: The row as it was read.
        columns: Field of the shape -> name of the column that holds it.

    Raises:
        BadRowError: ``missing-column``.
    """
    mapped = {field: column for field, column in columns.items() if field not in _MESSAGE_KEYS}
    missing = [column for column in mapped.values() if column not in record]
    if missing:
        found = described_keys(record)
        raise BadRowError("missing-column", f"columns names {', '.join(map(repr, missing))}; the row has {found}")
    taken = set(mapped.values())
    fields = {key: value for key, value in record.items() if key not in taken}
    fields.update((field, record[column]) for field, column in mapped.items())
    if len(mapped) < len(columns):
        for name in (*CHAT_COLUMNS, "prompt", "completion", "chosen", "rejected"):
            fields[name] = _renamed_turns(fields.get(name), columns)
    return fields


def _renamed_turns(turns: object, columns: Mapping[str, str]) -> object:
    """Give the messages of a list the keys ``role`` and ``content``."""
    if not isinstance(turns, list):
        return turns
    names = {columns[key]: key for key in _MESSAGE_KEYS if key in columns}
    return [
        {names.get(key, key): value for key, value in turn.items()} if isinstance(turn, Mapping) else turn
        for turn in turns
    ]


class WatchedFields(dict[str, Any]):
    """The fields of a row, which remember the ones that were looked up."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self._read: set[str] = set()

    @override
    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return super().__getitem__(name)

    @override
    def get(self, name: str, default: Any = None) -> Any:
        self._read.add(name)
        return super().get(name, default)

    def check_read(self, columns: Mapping[str, str], shape: str) -> None:
        """Check that no mapped field that holds something was passed over.

        Args:
            columns: Field of the shape -> name of the column that holds it.
            shape: What the row was read as.

        Raises:
            BadRowError: ``unread-column``.
        """
        unread = columns.keys() - self._read - {*_MESSAGE_KEYS}
        lost = sorted(name for name, value in self.items() if name in unread and value not in (None, ""))
        if lost:
            raise BadRowError(
                "unread-column",
                f"columns maps {', '.join(map(repr, lost))}, which the shape {shape} does not read here; leave it out "
                "of columns, or write the format that reads it",
            )
