"""LoRA's two products with the gradient of an output, which Triton reads once for both."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Blocks", "both_products"]

_ALIGNMENT = 8  # elements, 16 bytes of 16-bit numbers
_FEWEST = 16  # columns that the matrix units multiply at a time
_SUMS = 512  # elements that a program adds up: four of a thread, in one piece of 16 bytes


class Blocks(NamedTuple):
    """How the gradient is divided."""

    rows: int = 64  # of a tile; with fewer, Hopper does not multiply what lies in shared memory
    columns: int = 512  # of a tile; the wider, the fewer parts of the product with rows there are to store and add up
    warps: int = 4
    stages: int = 3  # tiles of a program that are in shared memory, or on their way there
    programs: int = 132  # at most, where the gradient is not wider than so many tiles: multiprocessors of an H100


_BLOCKS = Blocks()  # with which a program fills the shared memory of a multiprocessor, for ranks up to 16


# Only built-in functions of Triton's language: others cannot be interpreted where Triton was imported to compile.
# The names in capitals are constants of a compiled kernel.
@triton.jit(do_not_specialize=["height", "steps"])  # type: ignore[untyped-decorator, unused-ignore]
def _multiply(  # type: ignore[no-untyped-def]  # noqa: ANN202
    gradient: tl.tensor,
    rows: tl.tensor,
    low: tl.tensor,
    parts_of_lows: tl.tensor,
    parts_of_b: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    rows_stride: tl.tensor,
    low_stride: tl.tensor,
    steps: tl.tensor,
    RANK: tl.constexpr,  # noqa: N803
    PADDED: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    ALIGNMENT: tl.constexpr,  # noqa: N803
):
    # The compiler has to see that these are multiples.
    width, stride = width * ALIGNMENT, stride * ALIGNMENT
    rows_stride, low_stride = rows_stride * ALIGNMENT, low_stride * ALIGNMENT
    block, piece = tl.program_id(0), tl.program_id(1)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, PADDED)
    lines = tl.arange(0, ROWS)
    is_column, is_rank = columns < width, ranks < RANK
    # What is outside is zero on both sides of a product, so that nothing is zero times infinity.
    b = tl.load(
        rows + columns[:, None].to(tl.int64) * rows_stride + ranks[None, :],
        mask=is_column[:, None] & is_rank[None, :],
        other=0.0,
    )
    of_b = tl.full((COLUMNS, PADDED), 0.0, tl.float32)
    begin = piece * steps * ROWS
    end = tl.minimum(begin + steps * ROWS, height)
    # What may be beyond 32 bits is the same for all elements of a tile.
    gradient += begin.to(tl.int64) * stride
    low += begin.to(tl.int64) * low_stride
    parts_of_lows += (block.to(tl.int64) * height + begin) * RANK
    for start in tl.range(begin, end, ROWS):
        is_line = lines < height - start
        is_low = is_line[:, None] & is_rank[None, :]
        g = tl.load(
            gradient + (lines[:, None] * stride + columns[None, :]),
            mask=is_line[:, None] & is_column[None, :],
            other=0.0,
        )
        x = tl.load(low + (lines[:, None] * low_stride + ranks[None, :]), mask=is_low, other=0.0)
        # In the other order ptxas has every multiplication wait for the one before.
        of_b = tl.dot(tl.trans(g), x, of_b, input_precision="ieee")
        lows = tl.dot(g, b, input_precision="ieee")
        tl.store(parts_of_lows + (lines[:, None] * RANK + ranks[None, :]), lows, mask=is_low)
        gradient += ROWS * stride
        low += ROWS * low_stride
        parts_of_lows += ROWS * RANK
    place = piece.to(tl.int64) * width * RANK
    tl.store(
        parts_of_b + place + (columns[:, None] * RANK + ranks[None, :]),
        of_b,
        mask=is_column[:, None] & is_rank[None, :],
    )


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _add_up(  # type: ignore[no-untyped-def]  # noqa: ANN202
    parts_of_lows: tl.tensor,
    parts_of_b: tl.tensor,
    lows: tl.tensor,
    of_b: tl.tensor,
    scale: tl.tensor,
    numel_of_lows: tl.tensor,
    numel_of_b: tl.tensor,
    lows_stride: tl.tensor,
    programs_of_lows: tl.tensor,
    RANK: tl.constexpr,  # noqa: N803
    BLOCKS: tl.constexpr,  # noqa: N803
    PIECES: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
    ALIGNMENT: tl.constexpr,  # noqa: N803
):
    # Always in the same order.
    program = tl.program_id(0)
    numel_of_lows, numel_of_b = numel_of_lows * ALIGNMENT, numel_of_b * ALIGNMENT
    if program < programs_of_lows:
        index = program * SIZE + tl.arange(0, SIZE)
        mask = index < numel_of_lows
        total = tl.full((SIZE,), 0.0, tl.float32)
        for _ in tl.static_range(BLOCKS):
            total += tl.load(parts_of_lows + index, mask=mask, other=0.0)
            parts_of_lows += numel_of_lows
        line = (index // RANK).to(tl.int64)
        place = lows + line * (lows_stride * ALIGNMENT) + index % RANK
        tl.store(place, total.to(lows.dtype.element_ty), mask=mask)
    else:
        index = (program - programs_of_lows) * SIZE + tl.arange(0, SIZE)
        mask = index < numel_of_b
        total = tl.full((SIZE,), 0.0, tl.float32)
        for _ in tl.static_range(PIECES):
            total += tl.load(parts_of_b + index, mask=mask, other=0.0)
            parts_of_b += numel_of_b
        tl.store(of_b + index, total * scale, mask=mask)


def both_products(
    gradient: Tensor,
    rows: Tensor,
    low: Tensor,
    scale: float,
    lows_out: Tensor,
    of_b_out: Tensor,
    blocks: Blocks = _BLOCKS,
) -> None:
    """Write ``gradient @ rows`` and ``scale * gradient^T @ low``.

    Sums are formed in float32, always in the same order. The elements of a row lie side by side in every matrix, and
    rows are any number of elements apart, if nothing else is said.

    Args:
        gradient: (T, O) of an output.
        rows: (O, r) of the adapter's B, times its factor, in the same dtype.
        low: (T, r), the input's product with the adapter's A, in the same dtype.
        scale: The adapter's factor.
        lows_out: (T, r) of any dtype.
        of_b_out: (O, r) float32, contiguous.
        blocks: How the gradient is divided, if not as usual.
    """
    (height, width), rank = gradient.shape, rows.shape[1]
    padded = max(_FEWEST, triton.next_power_of_2(rank))
    across = -(-width // blocks.columns)
    pieces = max(1, blocks.programs // across)  # no fewer where there are few rows: their number is compiled
    steps = -(-height // (blocks.rows * pieces))  # tiles of a piece
    numel_of_lows, numel_of_b = height * rank, width * rank
    parts = gradient.new_empty(across * numel_of_lows + pieces * numel_of_b, dtype=torch.float32)
    parts_of_lows, parts_of_b = parts.tensor_split((across * numel_of_lows,))
    strides = gradient.stride(0), rows.stride(0), low.stride(0), lows_out.stride(0)
    alignment = 1 if any(number % _ALIGNMENT for number in (width, rank, *strides)) else _ALIGNMENT
    of_gradient, of_rows, of_low, of_lows = (stride // alignment for stride in strides)
    _multiply[(across, pieces)](
        gradient, rows, low, parts_of_lows, parts_of_b,
        height, width // alignment, of_gradient, of_rows, of_low, steps,
        RANK=rank, PADDED=padded, ROWS=blocks.rows, COLUMNS=blocks.columns, ALIGNMENT=alignment,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    programs_of_lows = -(-numel_of_lows // _SUMS)
    _add_up[(programs_of_lows + -(-numel_of_b // _SUMS),)](
        parts_of_lows, parts_of_b, lows_out, of_b_out,
        scale, numel_of_lows // alignment, numel_of_b // alignment, of_lows, programs_of_lows,
        RANK=rank, BLOCKS=across, PIECES=pieces, SIZE=_SUMS, ALIGNMENT=alignment,
    )  # fmt: skip
