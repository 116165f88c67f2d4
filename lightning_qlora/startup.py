"""What a process that trains imports before it starts, in two thirds of the time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_qlora.environment import environment

__all__ = ["quick_imports"]


@contextmanager
def quick_imports() -> Iterator[None]:
    """Speed up the imports within; for the file that a process starts with, since it concerns the whole process.

    Imports make hundreds of thousands of objects that stay and next to no garbage, and looking for it among them took a
    fifth of their time. Nothing is collected meanwhile, and what was imported is left out of later collections.
    """
    gc.disable()
    try:
        _import_bitsandbytes()
        yield
    finally:
        gc.enable()
    gc.freeze()


def _import_bitsandbytes() -> None:
    """Import bitsandbytes without the compiler, another fifth of the time.

    When imported it hands five functions to ``torch.compile``, for which torch loads all of Inductor, 540 modules. They
    are for devices that it has no kernels for; there they run as they are written.
    """
    with environment(TORCHDYNAMO_DISABLE="1"):  # torch.compile asks at each call, so that later ones compile
        import bitsandbytes  # noqa: F401
