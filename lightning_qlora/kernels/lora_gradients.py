"""What the gradient of a layer's output gives its adapter: two skinny products, each of which reads all of it.

On a GPU with Triton one kernel makes both of what it reads once. The first use on a device compares it with plain
products; where it differs, for adapters of high rank, for narrow outputs and everywhere else, these compute.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_qlora.kernels.launching import are_operators_wanted, on_device_of, on_gpu
from lightning_qlora.kernels.self_check import may_be_used

triton_products: Any
try:
    from lightning_qlora.kernels.lora_gradients_triton import both_products as triton_products
except ImportError:  # torch for CPUs comes without Triton
    triton_products = None

__all__ = ["both_products", "has_kernel", "product"]

# An H200, 8,192 tokens, rank 16: 81 us for 130 where outputs are 14,336 wide, 33 for 50 at 4,096, 17 to 20 for 20 at
# 1,024. Of rank 64 it is no faster.
_HIGHEST_RANK = 16
_NARROWEST = 2048
_FEWEST_TOKENS = 1024
_ALIGNMENT = 8  # elements, a power of two; of rows that begin anywhere the kernel reads less at a time

_WIDENED = {(torch.bfloat16, torch.float32), (torch.float16, torch.float32)}  # what cuBLAS can write, of what
_CHECK_SHAPE = (1100, 1048)  # tokens and width: a rest of each block
_TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of the norm


class _Kind(NamedTuple):
    """What decides which kernel runs."""

    device: torch.device
    dtype: torch.dtype
    rank: int


def both_products(
    gradient: Tensor, rows: Tensor, low: Tensor, scale: float, lows_out: Tensor, dtype: torch.dtype
) -> Tensor:
    """Write ``gradient @ rows``; return ``scale * gradient^T @ low``, the gradient of an adapter's B.

    Args:
        gradient: (T, O), of an output.
        rows: (O, r), the adapter's B times its factor.
        low: (T, r), the input's product with its A.
        scale: The factor.
        lows_out: (T, r), written. All four are of one dtype, and the elements of a row lie side by side.
        dtype: Of what is returned, (O, r).
    """
    if not _is_fast(gradient, rows, low, lows_out, dtype):
        torch.mm(gradient, rows, out=lows_out)
        return product(gradient.t(), low, dtype, scale)
    of_b = gradient.new_empty(rows.shape, dtype=dtype)
    with on_device_of(gradient):
        triton_products(gradient, rows, low, scale, lows_out, of_b)
    return of_b


def product(one: Tensor, two: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Return ``scale * one @ two``, in another dtype than theirs without a kernel for that where there is one."""
    shape, alone = (one.shape[0], two.shape[1]), {"beta": 0, "alpha": scale}  # what is there before counts for nothing
    # torch 2.11 cannot trace the first.
    if one.is_cuda and (one.dtype, dtype) in _WIDENED and not are_operators_wanted():
        return torch.addmm(one.new_empty(shape, dtype=dtype), one, two, out_dtype=dtype, **alone)  # type: ignore[call-overload, no-any-return, unused-ignore]
    return one.new_empty(shape).addmm_(one, two, **alone).to(dtype)


def has_kernel(device: torch.device, dtype: torch.dtype, rank: int) -> bool:
    """Whether a GPU's own kernel can be trusted with adapters of this rank, in this dtype."""
    return dtype in _TOLERANCES and _is_trusted(_Kind(device, dtype, rank))


def _is_fast(gradient: Tensor, rows: Tensor, low: Tensor, lows_out: Tensor, dtype: torch.dtype) -> bool:
    (tokens, width), rank = gradient.shape, rows.shape[1]
    return (
        rank <= _HIGHEST_RANK
        and width >= _NARROWEST
        and tokens >= _FEWEST_TOKENS
        and on_gpu(gradient)
        and dtype == torch.float32
        and (width | rank | gradient.stride(0) | rows.stride(0) | low.stride(0) | lows_out.stride(0)) % _ALIGNMENT == 0
        and gradient.stride(1) == rows.stride(1) == low.stride(1) == lows_out.stride(1) == 1
        and not are_operators_wanted()
        and has_kernel(gradient.device, gradient.dtype, rank)
    )


# The check


@cache
def _is_trusted(kind: _Kind) -> bool:
    """Whether the kernel computes here what plain products do; found out once for each kind of adapter."""
    complaint = (
        f"Triton's kernel for the gradients of adapters of rank {kind.rank} is not used on {kind.device} for "
        f"{kind.dtype}: {{fault}}. Plain products are used."
    )
    return may_be_used(triton_products, kind.device, lambda: _compare(kind), complaint)


def _compare(kind: _Kind) -> str | None:
    """Return what is wrong with the kernel, compared with float32 on the CPU, or ``None``."""
    tokens, width = _CHECK_SHAPE
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(kind.dtype)

    # Of two adapters' matrices the second's part.
    gradient, rows, low = random(tokens, width), random(width, 2 * kind.rank), random(tokens, 2 * kind.rank)
    part, scale = slice(kind.rank, None), 0.5
    lows, of_b = torch.zeros_like(low), torch.zeros(width, kind.rank)
    stored = [each.to(kind.device) for each in (gradient, rows, low, lows, of_b)]
    triton_products(stored[0], stored[1][:, part], stored[2][:, part], scale, stored[3][:, part], stored[4])
    lows, of_b = stored[3].cpu(), stored[4].cpu()
    expected = gradient.float() @ rows[:, part].float(), scale * gradient.float().t() @ low[:, part].float()
    for name, found, right in zip(
        ("input's share", "gradient of B"), (lows[:, part].float(), of_b), expected, strict=True
    ):
        distance = float((found - right).norm() / right.norm())
        if not distance <= _TOLERANCES[kind.dtype]:  # NaN never passes
            return f"its {name} is off by {distance:.2g} of the norm"
    return "it writes beside its output" if lows[:, : kind.rank].any() else None
