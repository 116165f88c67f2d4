"""RMS norms, gated activations and rotary embeddings by Triton: each forward and backward one pass over its tensors.

Between its steps a kernel rounds where transformers' code does, by storing numbers in the dtype of its tensors; what
only the backward pass computes stays in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["activate", "activate_backward", "normalise", "normalise_backward", "rotate"]

_ELEMENTS = 4096  # of a program's tile, where rows are short
_FLAT = 1024


# Only built-in functions of Triton's language: others cannot be interpreted where Triton was imported to compile.
# The names in capitals are constants of a compiled kernel.
@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _add(one: tl.tensor, two: tl.tensor):  # type: ignore[no-untyped-def]  # noqa: ANN202
    return one + two


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _normalise(  # type: ignore[no-untyped-def]  # noqa: ANN202
    x: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    inverse: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    CENTRED: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    places = rows[:, None] * width + columns[None, :]
    mask = (rows[:, None] < num_rows) & (columns[None, :] < width)
    value = tl.load(x + places, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.reduce(value * value, 1, _add) / width + eps)
    tl.store(inverse + rows, scale, mask=rows < num_rows)
    factor = tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    value = value * scale[:, None]
    # A factor's distance from one is Gemma's, which rounds at the end only.
    value = value * (1.0 + factor) if CENTRED else value.to(y.dtype.element_ty).to(tl.float32) * factor
    tl.store(y + places, value.to(y.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _normalise_backward(  # type: ignore[no-untyped-def]  # noqa: ANN202
    gradient: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    inverse: tl.tensor,
    of_x: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    CENTRED: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    places = rows[:, None] * width + columns[None, :]
    mask = (rows[:, None] < num_rows) & (columns[None, :] < width)
    factor = tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    if CENTRED:
        factor += 1.0
    of_normed = tl.load(gradient + places, mask=mask, other=0.0).to(tl.float32) * factor
    scale = tl.load(inverse + rows, mask=rows < num_rows, other=0.0)[:, None]
    normed = tl.load(x + places, mask=mask, other=0.0).to(tl.float32) * scale
    mean = tl.reduce(of_normed * normed, 1, _add)[:, None] / width
    tl.store(of_x + places, (scale * (of_normed - normed * mean)).to(of_x.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _activate(  # type: ignore[no-untyped-def]  # noqa: ANN202
    gate: tl.tensor,
    up: tl.tensor,
    y: tl.tensor,
    numel: tl.tensor,
    TANH: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < numel
    a = tl.load(gate + places, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(up + places, mask=mask, other=0.0).to(tl.float32)
    # x (1 + tanh(z)) / 2 = x sigmoid(2 z)
    inner = 1.5957691216057308 * (a + 0.044715 * a * a * a) if TANH else a
    a = a / (1.0 + tl.exp(-inner))
    tl.store(y + places, (a.to(y.dtype.element_ty).to(tl.float32) * b).to(y.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _activate_backward(  # type: ignore[no-untyped-def]  # noqa: ANN202
    gradient: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    of_gate: tl.tensor,
    of_up: tl.tensor,
    numel: tl.tensor,
    TANH: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < numel
    g = tl.load(gradient + places, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(gate + places, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(up + places, mask=mask, other=0.0).to(tl.float32)
    inner = 1.5957691216057308 * (a + 0.044715 * a * a * a) if TANH else a
    slope = 1.5957691216057308 * (1.0 + 0.134145 * a * a) if TANH else 1.0
    share = 1.0 / (1.0 + tl.exp(-inner))
    tl.store(of_up + places, (g * a * share).to(of_up.dtype.element_ty), mask=mask)
    of_a = g * b * share * (1.0 + a * slope * (1.0 - share))
    tl.store(of_gate + places, of_a.to(of_gate.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rotate(  # type: ignore[no-untyped-def]  # noqa: ANN202
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    y: tl.tensor,
    num_heads: tl.tensor,
    length: tl.tensor,
    half: tl.tensor,
    x_batch: tl.tensor,
    x_head: tl.tensor,
    x_token: tl.tensor,
    y_batch: tl.tensor,
    y_head: tl.tensor,
    y_token: tl.tensor,
    angle_batch: tl.tensor,
    angle_token: tl.tensor,
    BACKWARD: tl.constexpr,  # noqa: N803
    HEADS: tl.constexpr,  # noqa: N803
    HALF: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // length, row % length
    heads, columns = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    mask = (heads < num_heads) & (columns < half)
    source = x + batch * x_batch + token * x_token + heads * x_head + columns
    target = y + batch * y_batch + token * y_token + heads * y_head + columns
    angle = batch * angle_batch + token * angle_token + columns
    cos1 = tl.load(cos + angle, mask=columns < half, other=0.0).to(tl.float32)
    cos2 = tl.load(cos + angle + half, mask=columns < half, other=0.0).to(tl.float32)
    sin1 = tl.load(sin + angle, mask=columns < half, other=0.0).to(tl.float32)
    sin2 = tl.load(sin + angle + half, mask=columns < half, other=0.0).to(tl.float32)
    a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    kind = y.dtype.element_ty
    if BACKWARD:  # the transposed rotation
        one = (a * cos1).to(kind).to(tl.float32) + (b * sin2).to(kind).to(tl.float32)
        two = (b * cos2).to(kind).to(tl.float32) - (a * sin1).to(kind).to(tl.float32)
    else:
        one = (a * cos1).to(kind).to(tl.float32) - (b * sin1).to(kind).to(tl.float32)
        two = (b * cos2).to(kind).to(tl.float32) + (a * sin2).to(kind).to(tl.float32)
    tl.store(target, one.to(kind), mask=mask)
    tl.store(target + half, two.to(kind), mask=mask)


def normalise(x: Tensor, weight: Tensor, y: Tensor, inverse: Tensor, eps: float, centred: bool) -> None:
    """Write ``x / rms(x)`` times a weight.

    Args:
        x: (rows, width), contiguous, like everything here.
        weight: (width,).
        y: (rows, width), written.
        inverse: (rows,) float32, written: ``1 / rms(x)``.
        eps: Added to the mean square.
        centred: Whether the weight is the factor's distance from one.
    """
    rows, width = x.shape
    tile = _tile(width)
    _normalise[(-(-rows // tile["ROWS"]),)](
        x, weight, y, inverse, rows, width, eps, CENTRED=bool(centred), **tile, num_warps=_warps(tile)
    )


def normalise_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, of_x: Tensor, centred: bool
) -> None:
    """Write the gradient of :func:`normalise`'s input into ``of_x``."""
    rows, width = x.shape
    tile = _tile(width)
    _normalise_backward[(-(-rows // tile["ROWS"]),)](
        gradient, x, weight, inverse, of_x, rows, width, CENTRED=bool(centred), **tile, num_warps=_warps(tile)
    )


def activate(gate: Tensor, up: Tensor, y: Tensor, tanh: bool) -> None:
    """Write ``silu(gate) * up``, or with GELU in its form with tanh; all contiguous, of one shape."""
    _activate[(-(-gate.numel() // _FLAT),)](gate, up, y, gate.numel(), TANH=bool(tanh), BLOCK=_FLAT)


def activate_backward(gradient: Tensor, gate: Tensor, up: Tensor, of_gate: Tensor, of_up: Tensor, tanh: bool) -> None:
    """Write the gradients of :func:`activate`'s inputs, which may be the inputs' own memory."""
    _activate_backward[(-(-gate.numel() // _FLAT),)](
        gradient, gate, up, of_gate, of_up, gate.numel(), TANH=bool(tanh), BLOCK=_FLAT
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, backward: bool) -> None:
    """Write ``x * cos + rotate_half(x) * sin``, or with ``backward`` its transpose.

    Args:
        x: (B, heads, L, head_dim), the elements of a head side by side.
        cos: (B or 1, L, head_dim), contiguous.
        sin: As ``cos``.
        y: As ``x``, of any strides but the last.
        backward: Whether ``x`` is a gradient.
    """
    batch, heads, length, head_dim = x.shape
    half = head_dim // 2
    _rotate[(batch * length,)](
        x, cos, sin, y, heads, length, half, *x.stride()[:3], *y.stride()[:3],
        cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1),
        BACKWARD=backward, HEADS=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(half),
    )  # fmt: skip


def _tile(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"ROWS": max(1, _ELEMENTS // block), "BLOCK": block}


def _warps(tile: dict[str, int]) -> int:
    return min(16, max(4, tile["ROWS"] * tile["BLOCK"] // 512))
