"""What stands in for CUDA graphs on a CPU: operators on the very memory they ran on, replayed without Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_qlora.kernels import attention


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.operations.append((func, *(tree_map(_alias, each) for each in (args, kwargs or {}, output))))
        return output


def _alias(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        return value.detach()


def record_on_tape() -> Callable[[Callable[[], Sequence[Tensor | None]]], Any]:
    """Return a recorder as of DecoderGraphs."""

    def record(work: Callable[[], Sequence[Tensor | None]]) -> Any:
        with _Tape() as tape:
            found = list(work())

        def replay() -> None:
            with torch.no_grad():
                for operation in tape.operations:
                    _again(*operation)

        return replay, found

    return record


def _again(func: Any, args: Any, kwargs: Any, output: Any) -> None:
    schema = func._schema
    is_view = not schema.is_mutable and any(each.alias_info is not None for each in schema.returns)
    if is_view or "empty" in schema.name:
        return
    found = func(*args, **kwargs)
    if not schema.is_mutable:
        for old, new in zip(tree_leaves(output), tree_leaves(found), strict=True):
            if isinstance(old, Tensor) and 0 not in old.stride():
                old.copy_(new)


def attend_by_starts(monkeypatch: Any) -> None:
    """Let attention go by where documents begin on a CPU too, as it does on a GPU."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts: Tensor,
        longest: int,
        padded: int,
        scaling: float | None = None,
        window: int | None = None,
        keys: Any = None,
    ) -> Tensor:
        places = torch.arange(query.shape[2])
        owner = torch.bucketize(places, starts[1:].long(), right=True)
        distance = places[:, None] - places[None]
        mask = (owner[:, None] == owner[None]) & (distance >= 0)
        if window is not None:
            mask &= distance < window
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
        return output.transpose(1, 2).contiguous()

    monkeypatch.setattr(attention, "attend_documents", attend)
