"""What surrounds the building of a model on several ranks, and what a strategy that cuts models up asks of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, runtime_checkable

from lightning.pytorch.strategies import ParallelStrategy
from peft import PeftModel
from transformers.utils import logging as transformers_logging

from lightning_qlora.ranks import together

__all__ = ["ShardsModel", "build_sharded", "shard"]


@runtime_checkable
class ShardsModel(Protocol):
    """A strategy that cuts a model up right after it was built."""

    def building(self) -> AbstractContextManager[None]:
        """Surround the building of the model, up to and including :meth:`shard`, on every rank."""
        ...

    def shard(self, model: PeftModel) -> None:
        """Keep this rank's part of a whole model, in place; parameters change, names in state_dict do not."""
        ...


@contextmanager
def build_sharded(strategy: object) -> Iterator[None]:
    """Surround the building of a model: as the strategy wants it, and so that all ranks end where one fails alone.

    Only the first rank shows how loading goes on.

    Raises:
        RankError: On the ranks that did not fail themselves.
    """
    with (
        _on_all_ranks(strategy) if isinstance(strategy, ParallelStrategy) else nullcontext(),
        strategy.building() if isinstance(strategy, ShardsModel) else nullcontext(),
    ):
        yield


@contextmanager
def _on_all_ranks(strategy: ParallelStrategy) -> Iterator[None]:
    silences = not strategy.is_global_zero and transformers_logging.is_progress_bar_enabled()
    if silences:
        transformers_logging.disable_progress_bar()
    try:
        with together():
            yield
    finally:
        if silences:
            transformers_logging.enable_progress_bar()


def shard(strategy: object, model: PeftModel) -> None:
    """Let the strategy cut the model up if it is one that does."""
    if isinstance(strategy, ShardsModel):
        strategy.shard(model)
