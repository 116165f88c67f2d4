"""Documents -> batches: packed without padding, padded on the right, and prompts padded on the left.

All index arithmetic that the loss and the attention need happens here, on the host and in the loader's workers,
so that a training step never waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_qlora.data.documents import FILLER_ROW_ID, AnswerKind, Document, expand_spans, spans_of
from lightning_qlora.schema import IGNORE_INDEX, PromptBatch, SFTBatch

__all__ = [
    "AnswerKind",
    "Document",
    "PackedCollator",
    "PaddedCollator",
    "PromptCollator",
    "expand_spans",
    "spans_of",
]


class PackedCollator:
    """Lay documents one after the other into one flat row: no padding, and no document sees another.

    Args:
        pad_to_multiple_of: Round the token count up with a filler document of its own (``row_id`` -1, nothing
            supervised), for kernels and compiled graphs that like round shapes.
        pad_token_id: The token of that filler.

    Three documents of 3, 2 and 4 tokens become::

        input_ids     a a a b b c c c c
        position_ids  0 1 2 0 1 0 1 2 3
        cu_seq_lens   0     3   5       9

    A document that goes on from another one's beginning (``shared``) is laid down without it: see
    :class:`~lightning_qlora.schema.PreferenceBatch`.
    """

    def __init__(self, *, pad_to_multiple_of: int | None = None, pad_token_id: int = 0) -> None:
        self.pad_to_multiple_of = _check_multiple(pad_to_multiple_of)
        self.pad_token_id = pad_token_id

    def __call__(self, documents: Sequence[Document], shared: Sequence[int] | None = None) -> SFTBatch:
        """Return the packed batch of the documents, in their order.

        Args:
            documents: What to pack; a filler may be added.
            shared: How many tokens each has in common with the nearest document before it that has a 0 here.
        """
        left_out = np.zeros(len(documents), dtype=np.int64) if shared is None else np.asarray(shared, dtype=np.int64)
        filler = self._filler(sum(len(d.input_ids) for d in documents) - int(left_out.sum()))
        documents = [*documents, *filler]
        left_out = np.pad(left_out, (0, len(filler)))
        lengths = np.asarray([len(d.input_ids) for d in documents], dtype=np.int64) - left_out
        bounds = np.concatenate(([0], np.cumsum(lengths)))
        ids_T = np.concatenate([d.input_ids[n:] for d, n in zip(documents, left_out, strict=True)]).astype(np.int64)
        position_T = np.arange(len(ids_T), dtype=np.int64) - np.repeat(bounds[:-1] - left_out, lengths)
        labels_BL, positions_N, targets_N = _supervision(documents, bounds[:-1], left_out, ids_T, (1, len(ids_T)))
        return SFTBatch(
            input_ids=torch.from_numpy(ids_T)[None],
            position_ids=torch.from_numpy(position_T)[None],
            attention_mask=None,
            cu_seq_lens=torch.from_numpy(bounds.astype(np.int32)),
            document_lengths=tuple(lengths.tolist()),
            row_ids=tuple(d.row_id for d in documents),
            labels=labels_BL,
            target_positions=positions_N,
            targets=targets_N,
        )

    def _filler(self, num_tokens: int) -> list[Document]:
        missing = -num_tokens % self.pad_to_multiple_of if self.pad_to_multiple_of else 0
        if not missing:
            return []
        ids = np.full(missing, self.pad_token_id, dtype=np.int32)
        return [Document(ids, np.empty((0, 2), dtype=np.int32), FILLER_ROW_ID)]


class PaddedCollator:
    """Put each document into a row of its own, padded on the right.

    Padding is masked by position, never by token id, so a padding token that equals the end-of-turn token does no
    harm (huggingface/trl#976).

    Args:
        pad_to_multiple_of: Round the length of the rows up.
        pad_token_id: The token written into the padding; nothing depends on it.
    """

    def __init__(self, *, pad_to_multiple_of: int | None = None, pad_token_id: int = 0) -> None:
        self.pad_to_multiple_of = _check_multiple(pad_to_multiple_of)
        self.pad_token_id = pad_token_id

    def __call__(self, documents: Sequence[Document]) -> SFTBatch:
        """Return the padded batch of the documents, in their order."""
        lengths = [len(d.input_ids) for d in documents]
        width = max(lengths)
        width += -width % self.pad_to_multiple_of if self.pad_to_multiple_of else 0
        ids_BL = np.full((len(documents), width), self.pad_token_id, dtype=np.int64)
        mask_BL = np.zeros((len(documents), width), dtype=np.int64)
        for row, document in enumerate(documents):
            ids_BL[row, : lengths[row]] = document.input_ids
            mask_BL[row, : lengths[row]] = 1
        starts = np.arange(len(documents), dtype=np.int64) * width
        none = np.zeros_like(starts)
        labels_BL, positions_N, targets_N = _supervision(documents, starts, none, ids_BL.reshape(-1), ids_BL.shape)
        return SFTBatch(
            input_ids=torch.from_numpy(ids_BL),
            position_ids=torch.arange(width).expand(len(documents), width).contiguous(),
            attention_mask=torch.from_numpy(mask_BL),
            cu_seq_lens=None,
            document_lengths=tuple(lengths),
            row_ids=tuple(d.row_id for d in documents),
            labels=labels_BL,
            target_positions=positions_N,
            targets=targets_N,
        )


class PromptCollator:
    """Pad prompts on the left, so that generation continues all of them at the same position.

    Args:
        pad_token_id: The token written into the padding, masked by position.
    """

    def __init__(self, *, pad_token_id: int = 0) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, prompts: Sequence[tuple[Sequence[int], dict[str, Any]]]) -> PromptBatch:
        """Return the batch of ``(token ids, question as it was read)`` pairs."""
        width = max(len(ids) for ids, _ in prompts)
        ids_BL = torch.full((len(prompts), width), self.pad_token_id, dtype=torch.int64)
        mask_BL = torch.zeros((len(prompts), width), dtype=torch.int64)
        for row, (ids, _) in enumerate(prompts):
            ids_BL[row, width - len(ids) :] = torch.as_tensor(ids, dtype=torch.int64)
            mask_BL[row, width - len(ids) :] = 1
        return PromptBatch(input_ids=ids_BL, attention_mask=mask_BL, rows=tuple(question for _, question in prompts))


def _supervision(
    documents: Sequence[Document],
    starts: npt.NDArray[np.int64],
    left_out: npt.NDArray[np.int64],
    ids_T: npt.NDArray[np.int64],
    shape: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return labels, the positions that predict, and their targets.

    Args:
        documents: The K documents.
        starts: (K,) where each begins among the T flattened positions.
        left_out: (K,) how many tokens each goes on from, of the nearest document before it with a 0.
        ids_T: The flattened token ids.
        shape: (B, L), of the labels.
    """
    offsets = starts - left_out
    spans = [d.supervised.astype(np.int64) + offset for d, offset in zip(documents, offsets, strict=True)]
    supervised_N = expand_spans(np.concatenate(spans))
    # Nothing comes before a document's first token to predict it from; the position before it, if there is one,
    # belongs to another document.
    supervised_N = supervised_N[~np.isin(supervised_N, starts[left_out == 0])]
    targets_N = ids_T[supervised_N]
    labels_T = np.full(len(ids_T), IGNORE_INDEX, dtype=np.int64)
    labels_T[supervised_N] = targets_N
    before_T = np.arange(-1, len(ids_T) - 1)
    branches = np.flatnonzero(left_out)
    trunks = np.maximum.accumulate(np.where(left_out == 0, np.arange(len(left_out)), 0))[branches]
    before_T[starts[branches]] = starts[trunks] + left_out[branches] - 1
    return (
        torch.from_numpy(labels_T.reshape(shape)),
        torch.from_numpy(before_T[supervised_N]),
        torch.from_numpy(targets_N),
    )


def _check_multiple(multiple: int | None) -> int | None:
    if multiple is not None and multiple < 1:
        raise ValueError(f"pad_to_multiple_of is {multiple}; write a positive number of tokens, or null for none.")
    return multiple
