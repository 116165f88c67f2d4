"""The bytes that are alive, counted as tensors come and go."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

__all__ = ["MemoryTracker", "held_tensors"]


def _product_scratch(args: Sequence[Any]) -> int:
    """``gemm_4bit(A, B, shape, absmax, blocksize, ...)`` dequantises the weight and its constants."""
    numel = int(torch.Size(args[2]).numel())
    blocksize: int = args[4]
    return numel * int(args[0].dtype.itemsize) + 4 * -(numel // -blocksize)


def _group_scratch(args: Sequence[Any]) -> int:
    """``lora_products(x, low, shapes, weights, constants, biases, b, heights, blocksize, ..., inside)``.

    It dequantises weight by weight; with the adapters inside its products, into longer rows, and copies the input.
    """
    x, low, heights, blocksize, inside = args[0], args[1], args[7], args[8], args[10]
    height = max(heights)
    constants = 4 * -(height * x.shape[1] // -int(blocksize))
    width = x.shape[1] + (low.shape[1] if inside else 0)
    copied = x.shape[0] * width if inside else 0
    return int((height * width + copied) * x.dtype.itemsize + constants)


def _stack_scratch(args: Sequence[Any]) -> int:
    """``stack_4bit(weights, constants, below, heights, width, blocksize, ...)`` may dequantise constants first."""
    return 4 * -(int(max(args[3])) * int(args[4]) // -int(args[5]))


def _flash_scratch(args: Sequence[Any]) -> int:
    """The backward pass of flash attention sums the gradient of the queries in float32."""
    return 4 * int(args[1].numel())


def _varlen_scratch(args: Sequence[Any]) -> int:
    """Likewise; and where heads share keys, the gradients of keys and values of each head, before they are summed."""
    query, key = args[1], args[2]
    shared = 2 * query.numel() * query.dtype.itemsize if query.shape[1] != key.shape[1] else 0
    return 4 * int(query.numel()) + int(shared)


_HIDDEN: dict[str, Callable[[Sequence[Any]], int]] = {
    "bitsandbytes.gemm_4bit.default": _product_scratch,
    "lightning_qlora.lora_products.default": _group_scratch,
    "lightning_qlora.stack_4bit.default": _stack_scratch,
    "aten._scaled_dot_product_flash_attention_backward.default": _flash_scratch,
    "torch_attn._varlen_attn_backward.default": _varlen_scratch,
}
"""What operators allocate and free inside themselves, in bytes, from their arguments."""


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and the most of them at any moment.

    What operators allocate inside themselves cannot be seen; :data:`_HIDDEN` adds what is known of it.

    Args:
        held: Tensors that are there all the time and not to be counted.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        """Bytes alive now, ``held`` left out."""
        self._peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in held)

    def take_peak(self) -> int:
        """Return the most since the last call."""
        peak, self._peak = self._peak, self.live
        return peak

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        hidden = _HIDDEN.get(str(func))
        self._peak = max(self._peak, self.live + (hidden(args) if hidden else 0))
        return result

    def _add(self, storage: Any) -> None:
        if storage not in self._known:
            self._known.add(storage)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, nbytes: int) -> None:
        self.live -= nbytes


def held_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Everything that is there before the step: parameters, the constants of quantised ones, gradients, buffers."""
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            constants = [state.absmax, state.code, state.offset]
            constants += [] if state.state2 is None else [state.state2.absmax, state.state2.code]
            yield from (constant for constant in constants if constant is not None)
