"""Rows -> documents: what a process does that tokenises, so nothing here needs torch or Lightning."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import transformers

from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.data.documents import Document
from lightning_qlora.data.formats import ParsedRow, Task
from lightning_qlora.data.lines import JsonLine, ReadRow
from lightning_qlora.data.prepared import DocumentBatch
from lightning_qlora.data.report import SourceReport
from lightning_qlora.data.truncation import Fitted, OverlongPolicy, fit_rows
from lightning_qlora.schema import Origin, RowRefused

__all__ = ["EncodedChunk", "RowEncoder", "StoredChunk", "digest"]


class EncodedChunk(NamedTuple):
    """Some rows of one source after tokenising: the usable ones as documents with their places, all of them counted."""

    part: int
    documents: list[Document]
    origins: list[Origin]
    report: SourceReport


class StoredChunk(NamedTuple):
    """Some rows of one source as they are stored, all of them counted."""

    part: int
    batch: DocumentBatch
    report: SourceReport


@dataclass(frozen=True)
class RowEncoder:
    """Turns rows into documents; pickles, so that worker processes can do it too.

    Args:
        chat: The chat template.
        max_length: Most tokens of a document.
        overlong: What happens to longer rows.
    """

    chat: ChatTemplate
    max_length: int = 2048
    overlong: OverlongPolicy = "drop_oldest_turns"

    @property
    def task(self) -> Task:
        """What the rows are read for."""
        return "sft"

    def fit(self, rows: Sequence[Any], max_length: int) -> Sequence[Fitted]:
        """Tokenise rows of the task, and bring those that are too long down to a limit."""
        return fit_rows(self.chat, rows, max_length, self.overlong)

    def __call__(self, part: int, rows: Sequence[ParsedRow]) -> EncodedChunk:
        """Encode rows of the source ``part``, in their order."""
        report = SourceReport("")
        documents, origins = [], []
        for fitted in self.fit(rows, self.max_length):
            report.add(fitted)
            for encoded, kind in fitted.documents:
                documents.append(Document.from_row(encoded, -1, kind))
                origins.append(encoded.origin)
        return EncodedChunk(part, documents, origins, report)

    def store(self, part: int, rows: Sequence[ReadRow]) -> StoredChunk:
        """Parse what was not parsed yet, encode what can be used, and lay it out as it is stored."""
        report = SourceReport("")
        usable: list[ParsedRow] = []
        for read in rows:
            row = read.parse() if isinstance(read, JsonLine) else read
            if isinstance(row, RowRefused):
                report.refuse(row)
            else:
                usable.append(row)
        chunk = self(part, usable)
        report.merge(chunk.report)
        return StoredChunk(part, DocumentBatch.of(chunk.documents, chunk.origins, part), report)

    def identity(self) -> dict[str, str]:
        """Return a hash of each thing that the tokens of a row depend on, by name."""
        chat, tokenizer = self.chat, self.chat.tokenizer
        special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
        return {
            "task": self.task,
            "tokenizer": digest(tokenizer.backend_tokenizer.to_str(), special),
            "chat_template": digest(tokenizer.chat_template, chat.template_kwargs),
            "length_and_supervision_policy": digest(
                self.max_length, self.overlong, chat.supervise, sorted(chat.content_tokens)
            ),
            "code": _code_digest(),
        }


def digest(*values: Any) -> str:
    """Return a hash of plain values; others count as their text."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@cache
def _code_digest() -> str:
    """Return a hash of the code that prepares: this folder, the vocabulary, and the libraries that tokenise."""
    here = Path(__file__).parent
    files = sorted([*here.glob("*.py"), here.parent / "schema.py"])
    return digest([file.read_text("utf-8") for file in files], transformers.__version__, tokenizers.__version__)
