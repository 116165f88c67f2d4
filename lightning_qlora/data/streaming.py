"""Data larger than the disk: read, shuffle, tokenise and pack while training, and resume at the exact batch."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from typing_extensions import override

from lightning_qlora.data.batching import Batching
from lightning_qlora.data.collators import Document
from lightning_qlora.data.encoding import RowEncoder
from lightning_qlora.data.mixing import MixedRows, ShuffleBuffer
from lightning_qlora.data.preparation import CHUNK_ROWS
from lightning_qlora.data.report import SourceReport
from lightning_qlora.data.sources import Sources
from lightning_qlora.schema import Origin, RowRefused, SFTBatch

__all__ = ["StreamItem", "StreamingBatches", "StreamingLoader"]

ROWS_BEFORE_JUDGING = 1_000
"""Rows of a stream that are read before the share of refused ones may stop the run."""

BATCHES_REMEMBERED = 64
"""Batches whose rows' places are kept, so that a message about a batch can name them."""


class StreamItem(NamedTuple):
    """A batch, with what the main process keeps of it.

    Attributes:
        batch: The batch.
        state: Where its shard stands after it.
        origins: The places of its rows, in the order of ``row_ids``.
        report: The rows that were tokenised for this and the batches after it; ``None`` if they were counted already.
    """

    batch: SFTBatch
    state: dict[str, Any]
    origins: list[Origin]
    report: SourceReport | None


@dataclass
class StreamingBatches(IterableDataset[StreamItem]):
    """An endless stream of batches, shared between ranks and their workers row by row.

    Each shard reads its rows through a shuffle buffer, tokenises as many as the buffer holds, packs them, and gives
    the batches out in random order. When its rows are used up, it begins the next epoch in another order. It never
    ends, so that with several workers the batches take turns in a fixed order, and every rank always has one more.

    Args:
        sources: What to read.
        encoder: How a row becomes tokens.
        batching: How rows become batches.
        shuffle_buffer: Rows that are shuffled and packed together.
        seed: Of the order.
        rank: This process.
        world_size: Processes.
        max_invalid_fraction: Largest share of refused rows, judged from 1,000 rows on.
        states: Where each shard of this rank continues, by its number.
        turn: Batches that were given out before: which worker's turn it is.
    """

    sources: Sources
    encoder: RowEncoder
    batching: Batching
    shuffle_buffer: int
    seed: int
    rank: int
    world_size: int
    max_invalid_fraction: float
    states: dict[int, dict[str, Any]] = field(default_factory=dict)
    turn: int = 0

    @override
    def __iter__(self) -> Iterator[StreamItem]:
        info = get_worker_info()
        num_workers, worker = (info.num_workers, info.id) if info else (1, 0)
        # torch asks worker 0 first; after a resume, the first turn is that of the worker whose batch comes next.
        own = (worker + self.turn) % num_workers
        shard = self.rank * num_workers + own
        state = self.states.get(own)
        counts = SourceReport("stream")
        epoch, start = (state["epoch"], state) if state else (0, None)
        for current in itertools.count(epoch):
            given = False
            for item in self._epoch(current, own, shard, self.world_size * num_workers, start):
                given = True
                if item.report is not None:
                    self._judge(counts, item.report)
                yield item
            if not given and start is None:
                raise ValueError(f"A whole pass over the data gave no usable row:\n{_table(counts)}")
            start = None

    def _epoch(
        self, epoch: int, own: int, shard: int, num_shards: int, start: dict[str, Any] | None
    ) -> Iterator[StreamItem]:
        mixed = MixedRows(self.sources, seed=self.seed, shard=shard, num_shards=num_shards)
        rows = ShuffleBuffer(mixed, self.shuffle_buffer, seed=self.seed + epoch)
        done = 0
        if start is not None:
            rows.load_state_dict(start["rows"])
            done = start["batches_done"]
        for window in itertools.count():
            before = rows.state_dict()
            drawn = list(itertools.islice(rows, self.shuffle_buffer))
            if not drawn:
                return
            documents, origins, report = self._encode(drawn)
            for number, indices in enumerate(self._plan(documents, [epoch, shard, before["block"]])):
                if window == 0 and number < done:
                    continue
                state = {"shard": own, "epoch": epoch, "rows": before, "batches_done": number + 1}
                batch = self.batching.collate([documents[i] for i in indices])
                yield StreamItem(batch, state, [origins[i] for i in indices], report)
                report = None

    def _encode(self, drawn: list[Any]) -> tuple[list[Document], list[Origin], SourceReport | None]:
        report = SourceReport("stream")
        usable = []
        for row in drawn:
            if isinstance(row, RowRefused):
                report.refuse(row)
            else:
                usable.append(row)
        documents: list[Document] = []
        origins: list[Origin] = []
        for begin in range(0, len(usable), CHUNK_ROWS):
            chunk = self.encoder(0, usable[begin : begin + CHUNK_ROWS])
            documents += chunk.documents
            origins += chunk.origins
            report.merge(chunk.report)
        numbered = [document._replace(row_id=origin.line) for document, origin in zip(documents, origins, strict=True)]
        return numbered, origins, report

    def _plan(self, documents: list[Document], key: list[int]) -> list[list[int]]:
        lengths = [len(document.input_ids) for document in documents]
        seed = int(np.random.default_rng([self.seed, 6, *key]).integers(1 << 31))
        plan = self.batching.plan(lengths, seed)
        order = np.random.default_rng([seed, 7]).permutation(len(plan))
        return [plan[int(i)].tolist() for i in order]

    def _judge(self, counts: SourceReport, more: SourceReport) -> None:
        counts.merge(more)
        refused = sum(counts.refused.values())
        if counts.rows_read >= ROWS_BEFORE_JUDGING and refused > self.max_invalid_fraction * counts.rows_read:
            raise ValueError(
                f"{refused} of the first {counts.rows_read} rows of this share of the stream cannot be used, more than "
                f"the allowed {self.max_invalid_fraction:.1%}:\n{_table(counts)}\nCorrect the rows, or raise "
                "max_invalid_fraction."
            )


def _table(counts: SourceReport) -> str:
    lines = [f"  {count:>8}  {reason}" for reason, count in counts.refused.items()]
    return "\n".join([*lines, *(f"  {e['place']}: {e['detail']}" for e in counts.examples)])


class StreamingLoader(DataLoader[Any]):
    """Loads a stream of batches, and knows where each shard stood after each of them.

    A loader without a length is asked for one batch ahead, so the position counts the batches that were trained on,
    not those that were given out.

    Args:
        dataset: The stream.
        batches_seen: Returns how many batches this rank has trained on, over the whole run.
        position: Where to continue, as of :meth:`position`; from the beginning without it.
        kwargs: As of ``DataLoader``.
    """

    def __init__(
        self,
        dataset: StreamingBatches,
        *,
        batches_seen: Callable[[], int],
        position: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, **kwargs)
        self.stream = dataset
        self.batches_seen = batches_seen
        self.report = SourceReport("stream")
        self.origins: deque[tuple[tuple[int, ...], list[Origin]]] = deque(maxlen=BATCHES_REMEMBERED)
        self.replaced = False
        """Whether a checkpoint was restored after this loader had begun."""
        self._seen_before: int | None = None
        if position is not None:
            self.stream.states, self.stream.turn = dict(position["shards"]), position["turn"]
            self._seen_before = position["batches_seen"]
        self._given = 0
        self._states: dict[int, dict[int, dict[str, Any]]] = {0: dict(self.stream.states)}

    @override
    def __iter__(self) -> Iterator[SFTBatch]:  # type: ignore[override]
        if self.num_workers:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are the parallelism
        if self._given:
            raise RuntimeError("An endless stream is iterated once; ask the data module for a new loader.")
        if self._seen_before is None:
            self._seen_before = self.batches_seen()
        states = self._states[0]
        for item in super().__iter__():
            if self.replaced:
                raise MisconfigurationException(
                    "The stream had begun when the checkpoint was restored, as strategies do that shard the model if "
                    "max_epochs is set beside max_steps. Leave max_epochs out."
                )
            states = {**states, item.state["shard"]: item.state}
            self._given += 1
            self._states[self._given] = states
            self._states.pop(self._given - BATCHES_REMEMBERED, None)
            self.origins.append((item.batch["row_ids"], item.origins))
            if item.report is not None:
                self.report.merge(item.report)
            yield item.batch

    @property
    def begun(self) -> bool:
        """Whether a batch was given out."""
        return self._given > 0

    def position(self) -> dict[str, Any]:
        """Return where this rank's shards stand after the last batch that was trained on, as plain values."""
        seen = self.batches_seen()
        trained = 0 if self._seen_before is None or not self.begun else seen - self._seen_before
        return {"shards": self._states[trained], "turn": self.stream.turn + trained, "batches_seen": seen}
