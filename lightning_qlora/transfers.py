"""Numbers on their way between a device and the host, which goes on meanwhile."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Readback", "send"]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host's tensor on a device; a GPU fetches it from pinned memory, behind all it was given before."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Readback:
    """A copy of numbers to the host that is begun now and read later.

    To read a tensor (``item``, ``tolist``) waits until the device has done all that it was given before. A host that
    does so in every step has nothing ready for the device when the next one begins. A step later the numbers are there.

    Args:
        numbers: Of any shape and device; what they are now is copied.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._arrival: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._numbers = numbers.detach().to("cpu", non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record(torch.cuda.current_stream(numbers.device))
        else:
            self._numbers = numbers.detach().to("cpu", copy=True)

    def wait(self) -> Tensor:
        """Return them, on the host, once they have come."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._numbers
