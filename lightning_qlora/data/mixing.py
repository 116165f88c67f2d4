"""Several sources as one stream with weights, and a shuffle buffer; both resume at the exact row.

The weight of a source is the number of times its rows are used in an epoch. 2 means two passes over all of them,
0.5 a seeded half, 1.5 a pass and a half: what remains after the whole passes is a seeded sample without
replacement. So a mix has ``sum(weight * rows)`` rows, and a source's share of it grows with its size; to fix the
share ``p`` of a source, give it the weight ``p * total / rows``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Final, Generic, Protocol, Self, TypeVar

from lightning_qlora.data.accounting import RowCounts
from lightning_qlora.data.formats import ParsedRow, Task
from lightning_qlora.data.sources import DataSource, Sources, as_sources, estimated_rows, read_rows
from lightning_qlora.schema import RowRefused

__all__ = ["MixedRows", "Resumable", "ShuffleBuffer", "mix", "weighted_indices"]

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")

_SAMPLE_BLOCK: Final = 16
"""Rows among which a fraction is sampled: a stream of any length then holds the fraction to within a few rows."""


def weighted_indices(num_rows: int, weight: float, seed: int) -> list[int]:
    """The rows of a source of known size that one epoch uses, in reading order within each pass.

    Args:
        num_rows: How many rows there are.
        weight: How often each is used: ``int(weight)`` whole passes, then a sample of the remaining fraction.
        seed: Decides the sample.

    Returns:
        ``round(num_rows * weight)`` indices.
    """
    passes = int(weight)
    rest = round(num_rows * weight) - passes * num_rows
    sample = sorted(random.Random(f"{seed}:weight").sample(range(num_rows), rest))
    return [*range(num_rows)] * passes + sample


def is_sampled(position: int, fraction: float, seed: int) -> bool:
    """Whether a row of a stream of unknown length belongs to the seeded sample of a fraction."""
    block, offset = divmod(position, _SAMPLE_BLOCK)
    return offset in _sampled_offsets(block, fraction, seed)


@lru_cache(maxsize=64)
def _sampled_offsets(block: int, fraction: float, seed: int) -> frozenset[int]:
    start = random.Random(f"{seed}:sample").random()
    before, after = (int((block + n) * _SAMPLE_BLOCK * fraction + start) for n in (0, 1))
    return frozenset(random.Random(f"{seed}:sample:{block}").sample(range(_SAMPLE_BLOCK), after - before))


class Resumable(Protocol[T_co]):
    """An iterator that can say where it is, and go on from there in another process."""

    def __iter__(self) -> Iterator[T_co]: ...

    def __next__(self) -> T_co: ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position."""


@dataclass
class _Progress:
    """Where a source stands: in which pass, at which row of it, and how many items it gave in all."""

    passes: int = 0
    position: int = 0
    given: int = 0
    exhausted: bool = False


class MixedRows(Iterator[ParsedRow | RowRefused]):
    """One epoch over several sources, interleaved evenly, each row as often as its source's weight says.

    The next row always comes from the source that is furthest behind its share, so every stretch of the stream
    holds the sources in their proportions, whatever their sizes. Refused rows come through once, in place.

    Args:
        sources: What to read.
        task: What the rows are for.
        seed: Decides the samples of fractional weights and where each source starts in the interleaving.
        shard: Which share of every source's rows to read, from 0.
        num_shards: How many readers there are.

    Attributes:
        counts: The rows so far by source and verdict.
    """

    def __init__(
        self, sources: Sources, *, task: Task = "sft", seed: int = 0, shard: int = 0, num_shards: int = 1
    ) -> None:
        self.sources = as_sources(sources)
        self.task: Task = task
        self.seed, self.shard, self.num_shards = seed, shard, num_shards
        self.counts = RowCounts()
        self._progress = [_Progress() for _ in self.sources]
        self._streams: dict[int, Iterator[ParsedRow | RowRefused]] = {}
        self._expected = [estimated_rows(source) * source.weight for source in self.sources]
        self._offsets = [random.Random(f"{seed}:offset:{number}").random() for number in range(len(self.sources))]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ParsedRow | RowRefused:
        while True:
            waiting = [number for number, progress in enumerate(self._progress) if not progress.exhausted]
            if not waiting:
                raise StopIteration
            number = min(waiting, key=self._share_given)
            item = self._next_of(number)
            if item is not None:
                self._progress[number].given += 1
                return item

    def _share_given(self, number: int) -> float:
        return (self._progress[number].given + self._offsets[number]) / self._expected[number]

    def _next_of(self, number: int) -> ParsedRow | RowRefused | None:
        """The next item of a source, ``None`` at the end of its last pass."""
        source, progress = self.sources[number], self._progress[number]
        while True:
            fraction = min(1.0, source.weight - progress.passes)
            if fraction <= 0:
                progress.exhausted = True
                return None
            for row in self._stream(number):
                position, progress.position = progress.position, progress.position + 1
                used = fraction == 1 or is_sampled(position, fraction, self._seed_of(number))
                if self._count(str(source), row, first_pass=progress.passes == 0, used=used):
                    return row
            del self._streams[number]
            progress.passes, progress.position = progress.passes + 1, 0

    def _seed_of(self, number: int) -> int:
        return self.seed * 1_000_003 + number * 1009 + self.shard

    def _stream(self, number: int) -> Iterator[ParsedRow | RowRefused]:
        if number not in self._streams:
            self._streams[number] = read_rows(
                self.sources[number],
                self.task,
                skip=self._progress[number].position * self.num_shards,
                shard=self.shard,
                num_shards=self.num_shards,
            )
        return self._streams[number]

    def _count(self, name: str, row: ParsedRow | RowRefused, *, first_pass: bool, used: bool) -> bool:
        """Count a row; return whether it goes out."""
        counts = self.counts[name]
        refused = isinstance(row, RowRefused)
        if not first_pass:
            counts.repeats += used and not refused
            return used and not refused
        counts.read += 1
        if isinstance(row, RowRefused):
            counts.refuse(row)
            return True
        counts.kept += used
        counts.left_out += not used
        return used

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a position to mean the same row."""
        return {
            "sources": [asdict(source) for source in self.sources],
            "task": self.task,
            "seed": self.seed,
            "shard": [self.shard, self.num_shards],
            "expected": self._expected,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the counts as plain values."""
        progress = [asdict(progress) for progress in self._progress]
        return {"mix": self._identity(), "progress": progress, "counts": self.counts.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the row at which the state was taken.

        Raises:
            ValueError: The state is of another mix.
        """
        mine = self._identity()
        changed = [key for key, value in mine.items() if state["mix"].get(key) != value]
        if changed:
            raise ValueError(
                f"The saved position belongs to another mix of data: {', '.join(changed)} differ. Resume with the data "
                "configuration and files that the checkpoint was made with, or start a new run."
            )
        self._streams.clear()
        self._progress = [_Progress(**progress) for progress in state["progress"]]
        self.counts = RowCounts.from_state(state["counts"])


def mix(
    sources: Sources,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    *,
    task: Task = "sft",
    shard: int = 0,
    num_shards: int = 1,
) -> MixedRows:
    """Interleave sources in a deterministic order.

    Args:
        sources: What to read.
        weights: How often each source's rows are used; instead of the weights that the sources carry.
        seed: See :class:`MixedRows`.
        task: What the rows are for.
        shard: Which share of the rows, from 0.
        num_shards: How many readers share the mix.

    Raises:
        ValueError: There is not one weight for each source.
    """
    parts: list[str | DataSource] = [*as_sources(sources)]
    if weights is not None:
        if len(weights) != len(parts):
            raise ValueError(
                f"Found {len(weights)} weights for {len(parts)} sources. Write one weight for each source."
            )
        parts = [replace(part, weight=weight) for part, weight in zip(as_sources(parts), weights, strict=True)]
    return MixedRows(parts, task=task, seed=seed, shard=shard, num_shards=num_shards)


class ShuffleBuffer(Iterator[T], Generic[T]):
    """Shuffle a stream in constant memory, exactly resumable from a position of a few numbers.

    The stream is cut into blocks of ``size`` items; each is permuted by the seed and its number. While a block is
    given out, the next is read an item at a time, so there is no pause between them. The state holds no items but
    the stream's position at the start of the block; resuming reads at most ``2 * size`` items again.

    Args:
        stream: What to shuffle.
        size: Items in a block. Up to twice as many are in memory.
        seed: Decides the permutations; add the epoch to it for another order in each.

    Raises:
        ValueError: If ``size`` is below 1.
    """

    def __init__(self, stream: Resumable[T], size: int, seed: int = 0) -> None:
        if size < 1:
            raise ValueError(f"The shuffle buffer's size is {size}. Allowed: 1 (no shuffling) or more items.")
        self.stream, self.size, self.seed = stream, size, seed
        self._restart(stream.state_dict(), 0)

    def _restart(self, start: dict[str, Any], number: int) -> None:
        """Stand before block ``number``, which begins where the stream is now."""
        self._block: list[T] = []
        self._given = 0
        self._next: list[T] = []
        self._start = self._next_start = start
        self._number = number - 1

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        if self._given == len(self._block):
            self._turn_over()
        item = self._block[self._given]
        self._given += 1
        self._read(1)
        return item

    def _turn_over(self) -> None:
        self._read(self.size - len(self._next))
        if not self._next:
            raise StopIteration
        self._block, self._given, self._start = self._next, 0, self._next_start
        self._next, self._next_start = [], self.stream.state_dict()
        self._number += 1
        random.Random(f"{self.seed}:{self._number}").shuffle(self._block)

    def _read(self, count: int) -> None:
        for _ in range(count):
            try:
                self._next.append(next(self.stream))
            except StopIteration:
                return

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain values."""
        order = {"size": self.size, "seed": self.seed}
        return {**order, "stream": self._start, "block": max(0, self._number), "given": self._given}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the item at which the state was taken.

        Raises:
            ValueError: Size or seed differ: the order would not be the same.
        """
        if (state["size"], state["seed"]) != (self.size, self.seed):
            raise ValueError(
                f"The saved position is of a shuffle buffer with size {state['size']} and seed {state['seed']}; found "
                f"size {self.size} and seed {self.seed}. Write the saved ones."
            )
        self.stream.load_state_dict(dict(state["stream"]))
        self._restart(dict(state["stream"]), state["block"])
        for _ in range(state["given"]):
            next(self)
