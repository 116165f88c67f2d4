"""Lines of JSON on their way to the process that reads them: the main one only finds where each ends.

Decoding a line and recognising its shape takes more time than all else that the main process does, so a line travels
as it stands, with what it takes to read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from lightning_qlora.data.formats import Format, ParsedRow, Task, parse_row
from lightning_qlora.data.json_values import BadRowError, decode_json
from lightning_qlora.schema import Origin, RowRefused

__all__ = ["JsonLine", "ReadRow", "RowParser", "decode_line"]


def decode_line(content: bytes, origin: Origin) -> Any:
    """Return the value that a line of JSON holds, or the ``RowRefused`` that says why it holds none.

    Args:
        content: The line, without the white space and the byte order mark around it.
        origin: Where it was read.
    """
    try:
        return decode_json(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        hint = "; the file looks like UTF-16, save it as UTF-8" if b"\x00" in content else ""
        detail = f"byte 0x{content[error.start]:02x} at column {error.start + 1} is not UTF-8{hint}"
        return RowRefused("invalid-utf8", detail, origin)
    except BadRowError as error:
        return RowRefused(error.reason, error.detail, origin)


@dataclass(frozen=True)
class RowParser:
    """How the rows of a source are understood.

    Args:
        format: Their shape.
        columns: Names of the data's own columns for the fields of the shape.
        task: What the rows are for.
    """

    format: Format
    columns: dict[str, str] | None
    task: Task

    def __call__(self, record: Any, origin: Origin) -> ParsedRow | RowRefused:
        """Return the row that a record stands for, or the verdict on it."""
        if isinstance(record, RowRefused):
            return record
        try:
            return parse_row(record, origin, format=self.format, columns=self.columns, task=self.task)
        except RowRefused as refused:
            return refused


class JsonLine(NamedTuple):
    """A row as a line that was not decoded yet.

    Attributes:
        content: As of :func:`decode_line`.
        origin: Where it was read.
        parser: How the rows of its source are understood.
    """

    content: bytes
    origin: Origin
    parser: RowParser

    def parse(self) -> ParsedRow | RowRefused:
        """Return the row that the line holds, or the verdict on it."""
        return self.parser(decode_line(self.content, self.origin), self.origin)


ReadRow: TypeAlias = JsonLine | ParsedRow | RowRefused
"""A row as it was read: understood, refused, or a line that is yet to be."""
