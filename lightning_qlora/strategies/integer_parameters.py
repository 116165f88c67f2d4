"""Frozen parameters of integers under FSDP2, on releases of torch that want a gradient of every parameter at first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from packaging.version import Version
from torch import Tensor, nn

__all__ = ["integer_parameters"]

_FIRST_WITHOUT = Version("2.13")  # torch 2.11 shards as nn.Parameter(part), and sets requires_grad afterwards


@contextmanager
def integer_parameters() -> Iterator[None]:
    """Let ``fully_shard`` cut up 4-bit weights, which are bytes and can have no gradient."""
    if Version(torch.__version__) >= _FIRST_WITHOUT:
        yield
        return
    with patch("torch.distributed.fsdp._fully_shard._fsdp_param.nn", _Modules()):
        yield


class _Modules:
    """``torch.nn``, whose parameters of integers ask for no gradient."""

    def __getattr__(self, name: str) -> Any:
        return getattr(nn, name)

    @staticmethod
    def Parameter(data: Tensor, requires_grad: bool = True) -> nn.Parameter:  # noqa: N802
        return nn.Parameter(data, requires_grad and data.is_floating_point())
