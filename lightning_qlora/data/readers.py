"""JSON files of rows -> one entry for each row, or a verdict on it; never an exception for the sake of one row.

Every reader yields exactly one entry for each row of its file, in order: ``(origin, row)``, ``(origin,
RowRefused)``, or ``None`` for a row that the selection does not want, so that positions always count all rows.
JSON lines are streamed in constant memory, and left for :func:`~lightning_qlora.data.lines.decode_line` to decode:
``(origin, bytes)``. A JSON document is read whole.

What makes a file unreadable from some point on (a truncated archive, a list of rows that breaks off) is a
ValueError: rows that nobody can see cannot be accounted for.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, TypeAlias, cast

from typing_extensions import override

from lightning_qlora.data.json_values import STRICT_DECODER, BadRowError
from lightning_qlora.schema import Origin, RowRefused

__all__ = [
    "BOM",
    "COMPRESSED",
    "LIST_KEYS",
    "Entry",
    "Selection",
    "compression_of",
    "open_bytes",
    "read_json",
    "read_json_lines",
]

Entry: TypeAlias = tuple[Origin, Any] | None
"""A row as it was read, the verdict on it, or its line, with its place; ``None`` for a row that is not wanted."""

BOM: Final = b"\xef\xbb\xbf"
LIST_KEYS: Final = ("data", "rows", "examples", "records")
"""Where a JSON object that wraps the list of rows keeps it."""

COMPRESSED: Final = (".gz", ".zst")
"""The suffixes of compressed files."""

_PACKED_BYTES: Final = 512
"""Bytes of a zstandard frame that are unpacked at a time; repetitive text grows a thousandfold."""


class Selection(NamedTuple):
    """Which rows of a source are wanted, by their position over all its files, counted from 0.

    Attributes:
        skip: Rows before this position are passed over.
        shard: This reader's share: positions ``shard``, ``shard + num_shards``, ...
        num_shards: How many readers share the source.
    """

    skip: int = 0
    shard: int = 0
    num_shards: int = 1

    def wants(self, position: int) -> bool:
        """Whether the row at this position is to be decoded."""
        return position >= self.skip and position % self.num_shards == self.shard


def compression_of(path: Path) -> str:
    """The suffix of a compressed file, in small letters; empty for other files."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSED else ""


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressing ``.gz`` and ``.zst``.

    Raises:
        ValueError: ``.zst`` without the zstandard package; or the archive is damaged.
    """
    damage: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error)
    with path.open("rb") as raw, ExitStack() as opened:
        stream: IO[bytes] = raw
        compression = compression_of(path)
        if compression == ".gz":
            stream = cast(IO[bytes], opened.enter_context(gzip.open(raw)))
        elif compression == ".zst":
            zstandard = _zstandard(path)
            damage = (EOFError, zstandard.ZstdError)
            stream = opened.enter_context(io.BufferedReader(_Frames(raw, zstandard.ZstdDecompressor())))
        try:
            yield stream
        except damage as error:
            raise ValueError(
                f"{path} is damaged, or not the archive that its name says ({error}). Fetch it again."
            ) from None


def _zstandard(path: Path) -> Any:
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            f"Reading {path} needs zstandard. Write pip install 'lightning_qlora[zstd]', or unpack the file."
        ) from None
    return zstandard


class _Frames(io.RawIOBase):
    """The content of zstandard frames, one after the other.

    The package's own stream reader takes a frame that breaks off for the end of the file; rows would be lost
    without a word.
    """

    def __init__(self, raw: IO[bytes], decompressor: Any) -> None:
        super().__init__()
        self._raw = raw
        self._decompressor = decompressor
        self._frame: Any = None
        self._packed = self._content = b""

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Any) -> int:
        while not self._content:
            self._packed = self._packed or self._raw.read(_PACKED_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it breaks off")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._content, self._packed = self._frame.decompress(self._packed), b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._content))
        buffer[:size], self._content = self._content[:size], self._content[size:]
        return size


def read_json_lines(path: Path, name: str, selection: Selection, first: int = 0) -> Iterator[Entry]:
    """One JSON value a line, not decoded; blank lines are no rows. UTF-8, with or without a byte order mark.

    Args:
        path: The file.
        name: Its name in origins.
        selection: The rows that are wanted.
        first: The position of the file's first row within the source.
    """
    position = first
    with open_bytes(path) as stream:
        for line, content in enumerate(stream, 1):
            content = content.removeprefix(BOM).strip()
            if not content:
                continue
            yield (Origin(name, line), content) if selection.wants(position) else None
            position += 1


def read_json(path: Path, name: str, selection: Selection, first: int = 0) -> Iterator[Entry]:
    """A JSON document: a list of rows, an object that wraps one, a single row; or JSON lines under a wrong name.

    Origins count lines where each row begins on a line of its own, else rows.

    Raises:
        ValueError: It is none of these, or breaks off.
    """
    if _begins_with_a_line(path):
        yield from read_json_lines(path, name, selection, first)
        return
    with open_bytes(path) as stream:
        content = stream.read()
    # Bytes that are not UTF-8 cost the row that holds them, not the file: they become lone surrogates.
    text = content.removeprefix(BOM).decode("utf-8", errors="surrogateescape")
    try:
        rows = _document_rows(text)
    except json.JSONDecodeError as error:
        if not text.lstrip().startswith("[") and any(_is_object(line) for line in content.split(b"\n")):
            yield from read_json_lines(path, name, selection, first)
            return
        raise ValueError(
            f"{name}:{error.lineno} is not JSON: {error.msg} at column {error.colno}. Allowed: a list of rows "
            f"[{{...}}, ...], an object with the list under {', '.join(LIST_KEYS)}, or one row a line. "
            "A file that breaks off has to be fetched again."
        ) from None
    lines = _line_numbers(text, [start for start, _ in rows])
    for position, (line, (_, row)) in enumerate(zip(lines, rows, strict=True), first):
        origin = Origin(name, line)
        if isinstance(row, BadRowError):
            row = RowRefused(row.reason, row.detail, origin)
        yield (origin, row) if selection.wants(position) else None


def _begins_with_a_line(path: Path) -> bool:
    """Whether the first line is an object by itself and another line follows: JSON lines."""
    with open_bytes(path) as stream:
        lines = (line.removeprefix(BOM).strip() for line in stream)
        filled = (line for line in lines if line)
        line = next(filled, b"")
        return line.startswith(b"{") and _is_object(line) and next(filled, None) is not None


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.removeprefix(BOM)), dict)
    except (ValueError, RecursionError):
        return False


def _line_numbers(text: str, starts: list[int]) -> list[int]:
    """The line on which each row begins; where rows share lines, their numbers instead."""
    lines, line, counted = [], 1, 0
    for start in starts:
        line, counted = line + text.count("\n", counted, start), start
        lines.append(line)
    return lines if len(set(lines)) == len(lines) else list(range(1, len(lines) + 1))


_SPACE: Final = re.compile(r"[ \t\r\n]*")
_TOKENS: Final = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
_NOT_UTF8: Final = re.compile("[\udc80-\udcff]")


def _after_space(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    return start if match is None else match.end()


def _document_rows(text: str) -> list[tuple[int, Any]]:
    """The rows of a JSON document: where each begins, and what it is, a BadRowError for a bad one.

    Raises:
        json.JSONDecodeError: At the first place that is no JSON.
    """
    start = _after_space(text, 0)
    if start == len(text):
        return []
    if text.startswith("{", start):
        found = _wrapped_list(text, start)
        if found is None:
            row, end = _item_at(text, start)
            rows = [(start, row)]
        else:
            rows, end = _list_rows(text, found)[0], _end_of_value(text, start)
    elif text.startswith("[", start):
        rows, end = _list_rows(text, start)
    else:
        raise json.JSONDecodeError("Expecting a list or an object", text, start)
    if _after_space(text, end) != len(text):
        raise json.JSONDecodeError("Extra data", text, _after_space(text, end))
    return rows


def _list_rows(text: str, start: int) -> tuple[list[tuple[int, Any]], int]:
    """The items of the list that opens at ``start``, and where it ends."""
    rows: list[tuple[int, Any]] = []
    place = _after_space(text, start + 1)
    if text.startswith("]", place):
        return rows, place + 1
    while True:
        row, end = _item_at(text, place)
        rows.append((place, row))
        place = _after_space(text, end)
        if text.startswith("]", place):
            return rows, place + 1
        if not text.startswith(",", place):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
        place = _after_space(text, place + 1)


def _item_at(text: str, start: int) -> tuple[Any, int]:
    """The value at ``start``, or the verdict on it, and where it ends."""
    row: Any
    try:
        row, end = STRICT_DECODER.raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except BadRowError as error:
        row, end = error, _end_of_value(text, start)
    except RecursionError:
        row, end = BadRowError("nested-too-deep", "the row is nested too deep to be read"), _end_of_value(text, start)
    except ValueError as error:  # an integer of thousands of digits
        row, end = BadRowError("broken-json", str(error)), _end_of_value(text, start)
    bad = None if text.isascii() else _NOT_UTF8.search(text, start, end)
    if bad is not None:
        row = BadRowError("invalid-utf8", f"the row holds the byte 0x{ord(bad.group()) & 0xFF:02x}, which is not UTF-8")
    return row, end


def _wrapped_list(text: str, start: int) -> int | None:
    """Where the list of rows opens inside of the object at ``start``; ``None`` if the object is itself a row."""
    place = _after_space(text, start + 1)
    while text.startswith('"', place):
        key, place = json.JSONDecoder().raw_decode(text, place)
        place = _after_space(text, place)
        if not text.startswith(":", place):
            raise json.JSONDecodeError("Expecting ':'", text, place)
        place = _after_space(text, place + 1)
        if key in LIST_KEYS and text.startswith("[", place):
            return place
        place = _after_space(text, _end_of_value(text, place))
        if text.startswith(",", place):
            place = _after_space(text, place + 1)
    return None


def _end_of_value(text: str, start: int) -> int:
    """Where the value at ``start`` ends, however deep it is: by counting brackets.

    Raises:
        json.JSONDecodeError: It does not end.
    """
    if text[start : start + 1] not in ("[", "{"):
        return int(json.JSONDecoder().raw_decode(text, start)[1])
    depth = 0
    for token in _TOKENS.finditer(text, start):
        if token.group() in ("[", "{"):
            depth += 1
        elif token.group() in ("]", "}"):
            depth -= 1
            if depth == 0:
                return token.end()
    raise json.JSONDecodeError("Unterminated value", text, start)
