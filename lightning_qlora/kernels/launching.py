"""Where and when a kernel is launched."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["are_operators_wanted", "autocast_dtype_of", "on_device_of", "on_gpu"]

_HERE = nullcontext()


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor is on a GPU; what asks here can be made to believe it."""
    return tensor.is_cuda


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make a tensor's GPU the current one, on which Triton launches; where it is that already, at no cost."""
    gpu = tensor.get_device()
    return _HERE if gpu < 0 or gpu == torch.cuda.current_device() else torch.cuda.device(gpu)


def are_operators_wanted() -> bool:
    """Whether someone looks at operators: torch.compile, or a count of memory."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def autocast_dtype_of(near: Tensor) -> torch.dtype | None:
    """Return what autocast brings products to on a tensor's device, ``None`` where it is off; ``meta`` is a GPU's."""
    kind = "cuda" if near.is_meta else near.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
