"""The two things that a strategy which cuts models up asks of a module that builds one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

from peft import PeftModel

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


def build_sharded(strategy: object) -> AbstractContextManager[None]:
    """Surround the building of a model as the strategy wants it; do nothing for those that keep models whole."""
    return strategy.building() if isinstance(strategy, ShardsModel) else nullcontext()


def shard(strategy: object, model: PeftModel) -> None:
    """Let the strategy cut the model up if it is one that does."""
    if isinstance(strategy, ShardsModel):
        strategy.shard(model)
