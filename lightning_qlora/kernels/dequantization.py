"""4-bit weights as numbers, written where they are wanted.

bitsandbytes dequantises a weight's constants first and the weight after that, into memory of its own. On a GPU with
Triton one kernel does both, into rows of any stride, so that several weights and what is multiplied with them can share
a buffer. The first use on a device compares it with bitsandbytes bit by bit; where it differs, and everywhere else,
bitsandbytes computes and the result is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor

from lightning_qlora.kernels.launching import on_device_of
from lightning_qlora.kernels.self_check import may_be_used

triton_dequantize: Any
try:
    from lightning_qlora.kernels.dequantization_triton import dequantize as triton_dequantize
except ImportError:  # torch for CPUs comes without Triton
    triton_dequantize = None

__all__ = ["NESTED_BLOCK", "constants_of", "dequantize_into", "has_kernel", "is_fast", "quant_state"]

NESTED_BLOCK = 256
"""The only block of second-level constants that bitsandbytes multiplies with."""

_CHECK_SHAPES = ((48, 512), (14, 201))  # whole blocks in each row, and blocks that end anywhere
_CHECK_MARGIN = 8


class _Kind(NamedTuple):
    """What decides which kernel runs."""

    device: torch.device
    dtype: torch.dtype
    blocksize: int
    quant_type: str
    nested: bool


def constants_of(state: QuantState) -> list[Tensor]:
    """Return what dequantises a weight: its blocks' constants, and what dequantises these."""
    return [state.absmax, state.offset, state.state2.absmax, state.state2.code] if state.nested else [state.absmax]


def quant_state(
    constants: Sequence[Tensor], shape: torch.Size, blocksize: int, quant_type: str, dtype: torch.dtype
) -> QuantState:
    """Return bitsandbytes' own form of :func:`constants_of`."""
    absmax, *second = constants
    nested: dict[str, Any] = {}
    if second:
        offset, absmax2, code2 = second
        nested["offset"] = offset
        nested["state2"] = QuantState(absmax=absmax2, code=code2, blocksize=NESTED_BLOCK, dtype=torch.float32)
    return QuantState(absmax, shape=shape, blocksize=blocksize, quant_type=quant_type, dtype=dtype, **nested)


def dequantize_into(out: Tensor, packed: Tensor, constants: Sequence[Tensor], blocksize: int, quant_type: str) -> None:
    """Write a 4-bit weight's values into a matrix.

    Args:
        out: (rows, columns) of float32, bfloat16 or float16, perhaps a part of a larger matrix: its rows may have any
            distance, and the elements of a row lie side by side.
        packed: The weight, two values a byte, in any dtype that it is stored in.
        constants: Of :func:`constants_of`.
        blocksize: Values that share a constant.
        quant_type: ``nf4`` or ``fp4``.
    """
    if is_fast(out, constants, blocksize, quant_type):
        _write(out, packed, constants, blocksize, quant_type)
        return
    out.copy_(bnb.dequantize_4bit(packed.detach(), quant_state(constants, out.shape, blocksize, quant_type, out.dtype)))


def is_fast(out: Tensor, constants: Sequence[Tensor], blocksize: int, quant_type: str) -> bool:
    """Whether :func:`dequantize_into` writes at once into a tensor of this device and dtype, without a copy."""
    return out.is_cuda and has_kernel(out.device, out.dtype, blocksize, quant_type, len(constants) > 1)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def has_kernel(device: torch.device, dtype: torch.dtype, blocksize: int, quant_type: str, nested: bool) -> bool:
    """Whether a GPU's own kernel can be trusted with this kind of weight."""
    return _is_trusted(_Kind(device, dtype, blocksize, quant_type, nested))


def _write(out: Tensor, packed: Tensor, constants: Sequence[Tensor], blocksize: int, quant_type: str) -> None:
    assert triton_dequantize is not None
    stored = packed if packed.dtype is torch.uint8 else packed.view(torch.uint8)
    with on_device_of(out):
        triton_dequantize(out, stored, constants, _values(quant_type, out.device), blocksize, NESTED_BLOCK)


@cache
def _values(quant_type: str, device: torch.device) -> Tensor:
    values: Tensor = bnb.get_4bit_type(quant_type, device=device)
    return values


# The check


@cache
def _is_trusted(kind: _Kind) -> bool:
    """Whether the kernel writes here what bitsandbytes does; found out once for each kind of weight."""
    complaint = (
        f"Triton's dequantisation of {kind.quant_type} weights is not used on {kind.device} for {kind.dtype}: "
        "{fault}. bitsandbytes' own is used."
    )
    return may_be_used(triton_dequantize, kind.device, lambda: _compare(kind), complaint)


def _compare(kind: _Kind) -> str | None:
    """Return what is wrong with the kernel, or ``None``."""
    for rows, columns in _CHECK_SHAPES:
        packed, constants = _random_weight(rows * columns, kind)
        out = torch.zeros(rows, columns + _CHECK_MARGIN, dtype=kind.dtype, device=kind.device)
        _write(out[:, :columns], packed, constants, kind.blocksize, kind.quant_type)
        found = out.cpu()
        state = quant_state(constants, torch.Size((1, rows * columns)), kind.blocksize, kind.quant_type, kind.dtype)
        expected = bnb.dequantize_4bit(packed, state).view(rows, columns).cpu()
        if not torch.equal(found[:, :columns], expected) or found[:, columns:].any():
            return "its values differ from bitsandbytes'"
    return None


def _random_weight(numel: int, kind: _Kind) -> tuple[Tensor, list[Tensor]]:
    """Return a packed weight and its constants."""
    generator = torch.Generator().manual_seed(0)
    blocks = -(-numel // kind.blocksize)
    packed = torch.randint(256, (-(-numel // 2), 1), dtype=torch.uint8, generator=generator)
    if not kind.nested:
        constants = [torch.rand(blocks, generator=generator)]
    else:
        constants = [
            torch.randint(256, (blocks,), dtype=torch.uint8, generator=generator),
            torch.rand((), generator=generator),
            torch.rand(-(-blocks // NESTED_BLOCK), generator=generator),
            bnb.create_dynamic_map(),
        ]
    return packed.to(kind.device), [each.to(kind.device) for each in constants]
