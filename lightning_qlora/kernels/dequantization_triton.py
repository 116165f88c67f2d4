"""4-bit weights dequantised by Triton, their constants with them, into rows of any stride."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["dequantize"]

_TILE = 4096  # elements of a program


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
    NESTED: tl.constexpr,  # noqa: N803
    NESTED_BLOCK: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    BLOCKS: tl.constexpr,  # noqa: N803
    IN_ROWS: tl.constexpr,
):
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    starts = blocks * BLOCK
    if NESTED:
        index = tl.load(absmax + blocks, mask=starts < numel, other=0).to(tl.int32)
        scale = tl.load(code2 + index) * tl.load(absmax2 + blocks // NESTED_BLOCK, mask=starts < numel, other=0.0)
        scale += tl.load(offset)
    else:
        scale = tl.load(absmax + blocks, mask=starts < numel, other=0.0)
    pairs = (starts // 2)[:, None] + tl.arange(0, BLOCK // 2)[None, :]
    both = tl.load(packed + pairs, mask=pairs < num_bytes, other=0).to(tl.int32)
    values = tl.join(tl.load(code + (both >> 4)), tl.load(code + (both & 15)))
    values = tl.reshape(values, (BLOCKS, BLOCK)) * scale[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    elements = starts[:, None] + columns
    if IN_ROWS:
        places = (starts // width * stride + starts % width)[:, None] + columns
    else:
        places = elements // width * stride + elements % width
    tl.store(out + places, values.to(out.dtype.element_ty), mask=elements < numel)


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
    numel, width, blocks = out.numel(), out.shape[1], max(1, _TILE // blocksize)
    _dequantize[(-(-numel // (blocks * blocksize)),)](
        packed, absmax, offset, absmax2, code2, code, out,
        packed.numel(), numel, width, out.stride(0),
        NESTED=bool(second), NESTED_BLOCK=nested_blocksize, BLOCK=blocksize, BLOCKS=blocks,
        IN_ROWS=width % blocksize == 0,
        enable_fp_fusion=False,  # bitsandbytes rounds between product and sum
    )  # fmt: skip
