"""4-bit weights dequantised by Triton, their constants with them, into rows of any stride."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["dequantize"]

_TILE = 2048  # elements of a program
_WARPS = 2  # so that a thread reads 16 bytes: with 4 an H200 takes 1.4 times as long, with 8 it takes 1.1
_ALIGNMENT = 8  # elements, 16 bytes of 16-bit numbers


# Only built-in functions of Triton's language: others cannot be interpreted where Triton was imported to compile.
# The names in capitals are constants of a compiled kernel.
@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _dequantize(  # type: ignore[no-untyped-def]  # noqa: ANN202
    packed: tl.tensor,
    absmax: tl.tensor,
    offset: tl.tensor,
    absmax2: tl.tensor,
    code2: tl.tensor,
    code: tl.tensor,
    out: tl.tensor,
    num_bytes: tl.tensor,
    numel: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    tiles: tl.tensor,
    NESTED: tl.constexpr,  # noqa: N803
    NESTED_BLOCK: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    BLOCKS: tl.constexpr,  # noqa: N803
    IN_ROWS: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # noqa: N803
):
    # What may be beyond 32 bits is the same for all elements of a program.
    program = tl.program_id(0)
    if IN_ROWS:  # tiles end where rows do
        row, column = (program // tiles).to(tl.int64), program % tiles * (BLOCK * BLOCKS)
        # The compiler moves 16 bytes at once where it sees what a distance is a multiple of.
        begin, left = row * (width // BLOCK * BLOCK) + column, width - column
        out += row * (stride * ALIGNMENT) + column
    else:
        begin = program.to(tl.int64) * (BLOCK * BLOCKS)
        left = numel - begin
    starts = tl.arange(0, BLOCKS) * BLOCK
    blocks = begin // BLOCK + tl.arange(0, BLOCKS)
    if NESTED:
        index = tl.load(absmax + blocks, mask=starts < left, other=0).to(tl.int32)
        scale = tl.load(code2 + index) * tl.load(absmax2 + blocks // NESTED_BLOCK, mask=starts < left, other=0.0)
        scale += tl.load(offset)
    else:
        scale = tl.load(absmax + blocks, mask=starts < left, other=0.0)
    pairs = (starts // 2)[:, None] + tl.arange(0, BLOCK // 2)[None, :]
    columns = tl.arange(0, BLOCK)[None, :]
    if IN_ROWS:
        is_byte = starts[:, None] < left
        is_element = is_byte
        places = starts[:, None] + columns
    else:
        is_byte = pairs < num_bytes - begin // 2
        is_element = starts[:, None] + columns < left
        elements = begin + starts[:, None] + columns
        places = elements // width * (stride * ALIGNMENT) + elements % width
    both = tl.load(packed + begin // 2 + pairs, mask=is_byte, other=0).to(tl.int32)
    values = tl.join(tl.load(code + (both >> 4)), tl.load(code + (both & 15)))
    values = tl.reshape(values, (BLOCKS, BLOCK)) * scale[:, None]
    tl.store(out + places, values.to(out.dtype.element_ty), mask=is_element)


def dequantize(
    out: Tensor, packed: Tensor, constants: Sequence[Tensor], code: Tensor, blocksize: int, nested_blocksize: int
) -> None:
    """Write a 4-bit weight's values.

    Args:
        out: (rows, width); the elements of a row lie side by side.
        packed: ceil(rows * width / 2) uint8 of any shape, one after another.
        constants: The blocks' constants; if these are quantised too, also their offset, constants and values.
        code: (16,) float32, the values of the 4-bit type.
        blocksize: Values that share a constant.
        nested_blocksize: Constants that share one of the second level.
    """
    absmax, *second = constants
    offset, absmax2, code2 = second or (absmax, absmax, absmax)  # not read
    (height, width), blocks = out.shape, max(1, _TILE // blocksize)
    in_rows = width % blocksize == 0
    tiles = -(-(width if in_rows else height * width) // (blocks * blocksize))  # of a row, or of all
    alignment = _ALIGNMENT if out.stride(0) % _ALIGNMENT == 0 else 1
    _dequantize[(height * tiles if in_rows else tiles,)](
        packed, absmax, offset, absmax2, code2, code, out,
        packed.numel(), height * width, width, out.stride(0) // alignment, tiles,
        NESTED=bool(second), NESTED_BLOCK=nested_blocksize, BLOCK=blocksize, BLOCKS=blocks, IN_ROWS=in_rows,
        ALIGNMENT=alignment, num_warps=_WARPS, enable_fp_fusion=False,  # bitsandbytes rounds between product and sum
    )  # fmt: skip
