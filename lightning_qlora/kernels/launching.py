"""Where and when a kernel is launched."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["are_operators_wanted", "on_device_of"]

_HERE = nullcontext()


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make a tensor's GPU the current one, on which Triton launches; where it is that already, at no cost."""
    gpu = tensor.get_device()
    return _HERE if gpu < 0 or gpu == torch.cuda.current_device() else torch.cuda.device(gpu)


def are_operators_wanted() -> bool:
    """Whether someone looks at operators: torch.compile, or a count of memory."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
