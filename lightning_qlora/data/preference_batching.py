"""Answers of preference data -> batches: packed, with prompts shared or not, or padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_qlora.data.answer_documents import AnswerDocuments, shared_lengths
from lightning_qlora.data.batching import Batching
from lightning_qlora.data.collators import AnswerKind, Document, PackedCollator
from lightning_qlora.data.loading import BatchDataset
from lightning_qlora.data.packing import BatchPlan, IntArray, group_by_length, pack_documents
from lightning_qlora.schema import PreferenceBatch

__all__ = ["PreferenceBatchDataset", "PreferenceBatching"]


@dataclass(frozen=True)
class PreferenceBatching(Batching):
    """How answers become batches; the answers of a row always share one, side by side.

    Args:
        share_prompts: Whether a packed batch holds the prompt of a row once, with its answers as branches.
    """

    share_prompts: bool = False

    def plan_rows(self, documents: AnswerDocuments, rows: IntArray, seed: int) -> BatchPlan:
        """Decide which rows share a batch.

        Args:
            documents: All answers.
            rows: The numbers of the rows to plan for.
            seed: Decides which rows meet.

        Returns:
            A plan of documents.
        """
        numbers, offsets = documents.by_row()
        if self.packing:
            assert self.tokens_per_batch is not None
            positions = documents.positions(share_prompts=self.share_prompts)
            by_row = np.add.reduceat(positions[numbers], offsets[:-1])[rows] if len(rows) else rows
            return documents.expand(pack_documents(by_row, self.tokens_per_batch, seed=seed), rows)
        lengths = documents.lengths
        longest = np.maximum.reduceat(lengths[numbers], offsets[:-1])[rows] if len(rows) else rows
        most = int(np.diff(offsets).max(initial=1))
        budget = None if self.tokens_per_batch is None else self.tokens_per_batch // most
        grouped = group_by_length(longest, batch_size=self.batch_size, tokens_per_batch=budget, seed=seed)
        plan = documents.expand(grouped, rows)
        used = lengths[plan.rows]
        capacity = np.maximum.reduceat(used, plan.offsets[:-1]) * np.diff(plan.offsets) if len(plan) else used
        return replace(plan, num_tokens=int(used.sum()), capacity=int(capacity.sum()))

    @override
    def collate(self, documents: Sequence[Document]) -> PreferenceBatch:
        """Make a batch of the documents, the answers of a row next to one another."""
        shared: list[int] | None = None
        if self.share_prompts:
            shared = shared_lengths(documents)
            pack = PackedCollator(pad_to_multiple_of=self.pad_to_multiple_of, pad_token_id=self.pad_token_id)
            batch = pack(documents, shared)
            shared += [0] * (len(batch["document_lengths"]) - len(shared))
        else:
            batch = super().collate(documents)
        counts = [_num_targets(document) for document in documents]
        counts += [0] * (len(batch["document_lengths"]) - len(counts))
        kinds = [document.kind for document in documents]
        return PreferenceBatch(
            **batch,
            target_documents=torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)),
            num_targets=tuple(counts),
            chosen=_numbers_of(kinds, AnswerKind.CHOSEN, AnswerKind.DESIRABLE),
            rejected=_numbers_of(kinds, AnswerKind.REJECTED, AnswerKind.UNDESIRABLE),
            mismatched=_numbers_of(kinds, AnswerKind.MISMATCHED),
            shared_prompts=None if shared is None else tuple(shared),
            reference_log_probs=None,
        )


def _num_targets(document: Document) -> int:
    spans = document.supervised
    begins_supervised = bool(len(spans)) and int(spans[0, 0]) == 0  # nothing comes before to predict it from
    return int((spans[:, 1] - spans[:, 0]).sum()) - begins_supervised


def _numbers_of(kinds: Sequence[AnswerKind], *wanted: AnswerKind) -> Tensor:
    return torch.tensor([number for number, kind in enumerate(kinds) if kind in wanted], dtype=torch.int64)


class PreferenceBatchDataset(BatchDataset):
    """Batches of answers, with the log-probabilities of the reference where they are known.

    Args:
        documents: All answers.
        plan: Which of them make each batch.
        batching: Makes a batch of them.
        reference_log_probs: By document number, in nats.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        plan: BatchPlan,
        batching: PreferenceBatching,
        reference_log_probs: Tensor | None = None,
    ) -> None:
        super().__init__(documents, plan, batching)
        self.reference_log_probs = reference_log_probs

    @override
    def __getitem__(self, index: int) -> PreferenceBatch:
        batch: PreferenceBatch = super().__getitem__(index)  # type: ignore[assignment]  # what the batching makes
        if self.reference_log_probs is not None:
            numbers = torch.tensor(batch["row_ids"])
            known = self.reference_log_probs[numbers.clamp(min=0)]
            batch["reference_log_probs"] = torch.where(numbers < 0, 0.0, known)
        return batch
