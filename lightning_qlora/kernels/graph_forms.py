"""The one size that batches are padded to where a recording is to take them, and the memory it reads them from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_qlora.kernels.attention import PackedDocuments
from lightning_qlora.kernels.varlen import document_offsets

__all__ = ["Form", "GraphInputs"]

_TOKENS = 128  # sizes are rounded up to multiples of these
_DOCUMENTS = 16
_FULL = 0.9  # of the most tokens of a batch: from here on others are expected to have as many


class Form(NamedTuple):
    """The size of the batches that a recording takes.

    Attributes:
        tokens: Of a batch with its padding.
        documents: Of the same; some may be empty.
        longest: The most tokens of a document.
        are_alike: Whether all are of that length, so that attention sees a batch without padding.
    """

    tokens: int
    documents: int
    longest: int
    are_alike: bool

    @classmethod
    def around(cls, lengths: Sequence[int], before: Form | None = None, most_tokens: int | None = None) -> Form:
        """Return one for documents of these lengths and somewhat larger ones; not less than another was made for.

        Only what was all of one length so far is recorded as such, where it is that again.

        Args:
            lengths: Of a batch's documents.
            before: What they did not fit.
            most_tokens: Of any batch, if that is known.
        """
        total = sum(lengths)
        if len(set(lengths)) == 1 and (before is None or before.are_alike):
            return cls(total, len(lengths), lengths[0], True)
        tokens, longest = _up(total, _TOKENS), 1 << (max(lengths) - 1).bit_length()
        if most_tokens is not None and _FULL * most_tokens <= total <= most_tokens:
            tokens = most_tokens
        documents = len(lengths)
        if before is not None:
            tokens, longest = max(tokens, before.tokens), max(longest, before.longest)
            documents = max(documents, before.documents // (1 if before.are_alike else 2))
        longest = min(longest, tokens)
        # Those that padding needs, and one more, so that they are never all of one length.
        needed = documents + -(-tokens // longest) + 1
        return cls(tokens, _up(max(2 * documents, needed), _DOCUMENTS), longest, False)

    def padded(self, lengths: Sequence[int]) -> list[int] | None:
        """Return the lengths with those of documents of padding behind them, or ``None`` where they do not fit."""
        if self.are_alike:
            fits = len(lengths) <= self.documents and set(lengths) == {self.longest}
            return [self.longest] * self.documents if fits else None
        rest, free = self.tokens - sum(lengths), self.documents - len(lengths)
        if rest < 0 or free < 0 or max(lengths) > self.longest or rest > free * self.longest:
            return None
        if not rest:
            return [*lengths, *([0] * free)]
        each = -(-rest // free)  # of equal length, for the sake of attention
        padding = [each] * (rest // each) + [rest % each]
        return [*lengths, *padding, *([0] * free)][: self.documents]

    def is_too_large(self, lengths: Sequence[int]) -> bool:
        """Whether most of a batch would be padding."""
        return 2 * _up(sum(lengths), _TOKENS) < self.tokens

    def largest(self) -> list[int]:
        """Return lengths that are as large as can be."""
        if self.are_alike:
            return [self.longest] * self.documents
        found = self.padded([self.longest])
        assert found is not None, f"a form has room for its tokens: {self}"
        return found


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class GraphInputs:
    """Where a graph reads its batch.

    Args:
        form: Of the recording.
        near: Of the device and dtype of token ids.
    """

    def __init__(self, form: Form, near: Tensor) -> None:
        self.input_ids = near.new_zeros(1, form.tokens)
        self.position_ids = torch.zeros_like(self.input_ids)
        self.starts = near.new_zeros(form.documents + 1, dtype=torch.int32)
        self.documents = PackedDocuments(form.largest(), starts=self.starts)
        del self.documents.lengths  # they are other ones in each batch: whoever asks for them cannot be recorded

    def fill(self, input_ids: Tensor, position_ids: Tensor, padded: Sequence[int]) -> None:
        """Write a batch, and padding of its first token, again and again, at the first position.

        Of what was there before, a model would see more than it should: how long a document is that it has elsewhere in
        the batch, or a token whose hidden state is not finite, from which the gradient is not either.
        """
        tokens = input_ids.shape[1]
        self.input_ids[:, :tokens].copy_(input_ids)
        self.position_ids[:, :tokens].copy_(position_ids)
        if tokens < self.input_ids.shape[1]:
            self.input_ids[:, tokens:].copy_(input_ids[:, :1].expand(1, self.input_ids.shape[1] - tokens))
            self.position_ids[:, tokens:].zero_()
        self.starts.copy_(document_offsets(padded, self.starts.device))

    def __iter__(self) -> Iterator[Any]:
        return iter((self.input_ids, self.position_ids, self.documents))
