"""Where a kernel of Triton's is launched."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["on_device_of"]

_HERE = nullcontext()


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make a tensor's GPU the current one, on which Triton launches; where it is that already, at no cost."""
    gpu = tensor.get_device()
    return _HERE if gpu < 0 or gpu == torch.cuda.current_device() else torch.cuda.device(gpu)
