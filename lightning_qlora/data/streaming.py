"""Data larger than the disk: read, shuffle, tokenise and pack while training, and resume at the exact batch."""

from __future__ import annotations

import itertools
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
from lightning_qlora.data.encoding import RowEncoder, digest
from lightning_qlora.data.mixing import MixedRows, ShuffleBuffer
from lightning_qlora.data.preparation import CHUNK_ROWS
from lightning_qlora.data.report import SourceReport
from lightning_qlora.data.sources import Sources
from lightning_qlora.data.truncation import OverlongPolicy
from lightning_qlora.environment import WITHOUT_TOKENIZER_THREADS, environment
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
        report: The rows that the shard read since the batch before this one; ``None`` if it read none.
    """

    batch: SFTBatch
    state: dict[str, Any]
    origins: list[Origin]
    report: SourceReport | None


class _Share(NamedTuple):
    """The part of the rows that a worker reads.

    Attributes:
        own: Its number among those of its rank.
        number: Its number among those of all ranks.
        total: How many there are.
    """

    own: int
    number: int
    total: int


class _Tally:
    """Counts and judges the rows of a share as they are read, and hands the counts on to the main process.

    They travel with batches. A window whose rows are all refused has none, so its counts wait for the next batch.

    Args:
        max_invalid_fraction: Largest share of refused rows.
        overlong: What happens to longer rows: those that the user asked to be refused are not held against the data.

    Attributes:
        counts: All rows so far.
    """

    def __init__(self, max_invalid_fraction: float, overlong: OverlongPolicy) -> None:
        self.max_invalid_fraction = max_invalid_fraction
        self.overlong = overlong
        self.counts = SourceReport("stream")
        self._waiting = SourceReport("stream")

    def add(self, report: SourceReport) -> None:
        """Count some more rows.

        Raises:
            ValueError: If too many cannot be used.
        """
        self.counts.merge(report)
        self._waiting.merge(report)
        invalid, read = self.counts.invalid_rows(self.overlong), self.counts.rows_read
        if read >= ROWS_BEFORE_JUDGING and invalid > self.max_invalid_fraction * read:
            raise ValueError(
                f"{invalid} of the first {read} rows of this share of the stream cannot be used, more than the "
                f"allowed {self.max_invalid_fraction:.1%}:\n{self.table()}\nCorrect the rows, or raise "
                "max_invalid_fraction."
            )

    def take(self) -> SourceReport | None:
        """Return the counts since the last call; ``None`` if no row was read."""
        waiting, self._waiting = self._waiting, SourceReport("stream")
        return waiting if waiting.rows_read else None

    def table(self) -> str:
        """Return the refused rows by reason, with examples, as text."""
        lines = [f"  {count:>8}  {reason}" for reason, count in self.counts.refused.items()]
        return "\n".join([*lines, *(f"  {e['place']}: {e['detail']}" for e in self.counts.examples)])


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
        share = _Share(own, self.rank * num_workers + own, self.world_size * num_workers)
        state = self.states.get(own)
        tally = _Tally(self.max_invalid_fraction, self.encoder.overlong)
        epoch, start = (state["epoch"], state) if state else (0, None)
        for current in itertools.count(epoch):
            given = False
            for item in self._epoch(current, share, start, tally):
                given = True
                yield item
            if not given and start is None:
                raise ValueError(_say_nothing_usable(share, tally))
            start = None

    def _epoch(self, epoch: int, share: _Share, start: dict[str, Any] | None, tally: _Tally) -> Iterator[StreamItem]:
        mixed = MixedRows(self.sources, seed=self.seed, shard=share.number, num_shards=share.total)
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
            tally.add(report)
            for number, indices in enumerate(self._plan(documents, [epoch, share.number, before["block"]])):
                if window == 0 and number < done:
                    continue
                state = {"shard": share.own, "epoch": epoch, "rows": before, "batches_done": number + 1}
                batch = self.batching.collate([documents[i] for i in indices])
                yield StreamItem(batch, state, [origins[i] for i in indices], tally.take())

    def _encode(self, drawn: list[Any]) -> tuple[list[Document], list[Origin], SourceReport]:
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
        numbered = [d._replace(row_id=_row_id(origin)) for d, origin in zip(documents, origins, strict=True)]
        return numbered, origins, report

    def _plan(self, documents: list[Document], key: list[int]) -> list[list[int]]:
        lengths = [len(document.input_ids) for document in documents]
        seed = int(np.random.default_rng([self.seed, 6, *key]).integers(1 << 31))
        plan = self.batching.plan(lengths, seed)
        order = np.random.default_rng([seed, 7]).permutation(len(plan))
        return [plan[int(i)].tolist() for i in order]


def _row_id(origin: Origin) -> int:
    """Return 63 bits of a hash of a row's place: the same in every worker, epoch and run, where lines alone repeat."""
    return int(digest(*origin)[:16], 16) >> 1


def _say_nothing_usable(share: _Share, tally: _Tally) -> str:
    if tally.counts.rows_read:
        what = "the data" if share.total == 1 else f"share {share.number + 1} of {share.total} of the data"
        return f"A whole pass over {what} gave no usable row:\n{tally.table()}"
    if share.total == 1:
        return "The weights of the train sources leave no row. Raise them."
    return (
        f"Share {share.number + 1} of {share.total} of the data got no row: every worker of every process reads a "
        "share of its own, and no source has rows enough for all. Lower num_workers or the number of processes, give "
        "more rows, or raise a weight below 1."
    )


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
        if self._given:
            raise RuntimeError("An endless stream is iterated once; ask the data module for a new loader.")
        if self._seen_before is None:
            self._seen_before = self.batches_seen()
        states = self._states[0]
        with environment(**WITHOUT_TOKENIZER_THREADS):
            items = super().__iter__()  # begins workers
        for item in items:
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
