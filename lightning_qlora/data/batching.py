"""One place for what makes batches of rows: packed or padded, by which limits, rounded to what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_qlora.data.collators import Document, PackedCollator, PaddedCollator
from lightning_qlora.data.packing import BatchPlan, group_by_length, pack_documents
from lightning_qlora.schema import SFTBatch

__all__ = ["Batching"]


@dataclass(frozen=True)
class Batching:
    """How rows become batches.

    Args:
        packing: Without padding, isolated from one another; else rows of similar length, padded.
        tokens_per_batch: Most positions of a batch; ``None``, for padded batches, leaves it to ``batch_size``.
        batch_size: Most rows of a padded batch.
        pad_to_multiple_of: Round the positions of a batch up.
        pad_token_id: What padding is written with.
    """

    packing: bool
    tokens_per_batch: int | None
    batch_size: int
    pad_to_multiple_of: int | None = None
    pad_token_id: int = 0

    def plan(self, lengths: Sequence[int] | npt.NDArray[np.integer], seed: int) -> BatchPlan:
        """Decide which rows share a batch."""
        if self.packing:
            assert self.tokens_per_batch is not None
            return pack_documents(lengths, self.tokens_per_batch, seed=seed)
        return group_by_length(lengths, batch_size=self.batch_size, tokens_per_batch=self.tokens_per_batch, seed=seed)

    def collate(self, documents: Sequence[Document]) -> SFTBatch:
        """Make a batch of the documents."""
        make = PackedCollator if self.packing else PaddedCollator
        return make(pad_to_multiple_of=self.pad_to_multiple_of, pad_token_id=self.pad_token_id)(documents)

    def filler(self) -> SFTBatch:
        """Return a batch that supervises nothing, for a rank that has run out of rows."""
        return self.collate([Document.filler(self.pad_token_id)])

    def identity(self) -> dict[str, Any]:
        """Return what decides which rows share a batch, as plain values."""
        return {key: value for key, value in asdict(self).items() if not key.startswith("pad_")}
