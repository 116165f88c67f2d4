"""Log-probabilities of given tokens and their gradient by the logits by Triton: a row of logits is a program's.

A row is read twice and its gradient written once. The second time it is read from its end, of which most is still in
the GPU's cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["log_softmax"]

# One program to a multiprocessor: as many rows as there are of these fit into the cache.
_BLOCK = 8192  # elements of a row that a program has in hand
_WARPS = 32


# Only built-in functions of Triton's language: others cannot be interpreted where Triton was imported to compile.
# The names in capitals are constants of a compiled kernel.
@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _larger(one: tl.tensor, two: tl.tensor):  # type: ignore[no-untyped-def]  # noqa: ANN202
    return tl.maximum(one, two)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _smaller(one: tl.tensor, two: tl.tensor):  # type: ignore[no-untyped-def]  # noqa: ANN202
    return tl.minimum(one, two)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _add(one: tl.tensor, two: tl.tensor):  # type: ignore[no-untyped-def]  # noqa: ANN202
    return one + two


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _log_softmax(  # type: ignore[no-untyped-def]  # noqa: ANN202
    logits: tl.tensor,
    targets: tl.tensor,
    log_probs: tl.tensor,
    correct: tl.tensor,
    negative: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    source, out = logits + row * width, negative + row * width
    lanes = tl.arange(0, BLOCK)
    # Each lane has a maximum, its first place and a sum of its own until the row is over. The maximum begins at the
    # least finite number: from -inf on, -inf - (-inf) would be NaN, which is to come of NaN and +inf only.
    most = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)
    total = tl.full((BLOCK,), 0.0, tl.float32)
    first = lanes
    for start in range(0, width, BLOCK):
        columns = start + lanes
        value = tl.load(
            source + columns, mask=columns < width, other=-float("inf"), eviction_policy="evict_last"
        ).to(tl.float32)  # fmt: skip
        above = value > most
        share = tl.exp(-tl.abs(value - most))  # of the smaller in the larger
        total = tl.where(above, total * share + 1.0, total + share)
        first = tl.where(above, columns, first)
        most = tl.where(above, value, most)
    maximum = tl.reduce(most, 0, _larger)
    log_total = tl.log(tl.reduce(total * tl.exp(most - maximum), 0, _add))
    first_maximum = tl.reduce(tl.where(most == maximum, first, width), 0, _smaller)
    target = tl.load(targets + row)
    # A target that is no column has no memory to be read, and NaN for a log-probability.
    is_column = (target >= 0) & (target < width)
    chosen = tl.load(source + target, mask=is_column, other=float("nan")).to(tl.float32)
    tl.store(log_probs + row, chosen - maximum - log_total)
    tl.store(correct + row, first_maximum == target)
    last = (width - 1) // BLOCK * BLOCK
    for start in range(0, width, BLOCK):
        columns = last - start + lanes
        value = tl.load(source + columns, mask=columns < width, other=0.0, eviction_policy="evict_first").to(tl.float32)
        value = tl.exp(value - maximum - log_total) - tl.where(columns == target, 1.0, 0.0)
        tl.store(out + columns, value.to(out.dtype.element_ty), mask=columns < width, eviction_policy="evict_first")


def log_softmax(logits: Tensor, targets: Tensor, log_probs: Tensor, correct: Tensor, negative: Tensor) -> None:
    """Write log-probabilities of given tokens and minus their gradient by the logits.

    Args:
        logits: (rows, width), contiguous, like everything here.
        targets: (rows,) int64.
        log_probs: (rows,) float32, written.
        correct: (rows,) bool, written: whether the target is the first of the largest logits. NaN is never the largest.
        negative: Like ``logits``, written: softmax, less one at the target.
    """
    rows, width = logits.shape
    _log_softmax[(rows,)](logits, targets, log_probs, correct, negative, width, BLOCK=_BLOCK, num_warps=_WARPS)
