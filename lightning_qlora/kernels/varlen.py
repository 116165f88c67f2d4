"""Flash attention over documents of any length in one call, from torch's own varlen kernel, where it can be trusted.

``torch.nn.attention.varlen`` came with torch 2.10 and its signature has changed with each release since. So the
arguments follow the signature that is installed, and the first call on a device compares the kernel with plain
arithmetic, forward and backward, on a small random batch; a kernel that fails is not used there. The operator around
the kernel is written in Python and costs the host more than the kernel's launch: where nobody looks at operators, and
the kernel without it computes the same, it is called without.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_qlora.kernels.launching import are_operators_wanted, autocast_dtype_of, on_gpu
from lightning_qlora.kernels.self_check import (
    CHECK_LENGTHS,
    CHECK_PROMPTS,
    CHECK_WINDOW,
    Attend,
    AttentionCase,
    find_fault,
)
from lightning_qlora.transfers import send

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch without the kernel
    varlen_attn = None  # type: ignore[assignment]

__all__ = [
    "SharedKeys",
    "attend_documents",
    "attend_in_graph",
    "document_offsets",
    "fits",
    "is_trusted",
    "padded_tokens",
    "product_dtype",
    "shared_keys",
    "takes",
]

_INDEX_LIMIT = 2**31  # the backward pass counts elements of its padded buffer in 32 bits
_PADDING = 128  # of each document in that buffer, in tokens
_DTYPES = (torch.bfloat16, torch.float16)
_LARGEST_HEAD = 256


class SharedKeys(NamedTuple):
    """Keys and values of documents that go on from a prompt: the prompt's, copied before their own.

    Attributes:
        tokens: (T',) int64 on the device, which token each of them is of.
        starts: (K + 1,) int32 on the device, where those of a document begin and the last one's end.
        longest: The most of a document.
        total: T'.
    """

    tokens: Tensor
    starts: Tensor
    longest: int
    total: int


def shared_keys(lengths: Sequence[int], shared_prompts: Sequence[int], device: torch.device) -> SharedKeys:
    """Say which keys each document sees, without waiting for the device.

    Args:
        lengths: Of the documents.
        shared_prompts: As of :class:`~lightning_qlora.kernels.attention.PackedDocuments`.
        device: Of the tokens.
    """
    parts, start, trunk = [], 0, 0
    for length, shared in zip(lengths, shared_prompts, strict=True):
        trunk = trunk if shared else start
        parts += [np.arange(trunk, trunk + shared), np.arange(start, start + length)]
        start += length
    tokens = torch.from_numpy(np.concatenate(parts))
    counts = [length + shared for length, shared in zip(lengths, shared_prompts, strict=True)]
    return SharedKeys(send(tokens, device), document_offsets(counts, device), max(counts), sum(counts))


def document_offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return where documents begin and the last one ends, (K + 1,) int32 on the device, without waiting for it."""
    # Lightning makes another device the default one while it builds a model.
    offsets = torch.tensor([0, *lengths], dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32)
    return send(offsets, device)


def padded_tokens(lengths: Sequence[int]) -> int:
    """Return the tokens of the buffer that the backward pass sums gradients in, upwards rounded."""
    return sum(lengths) + _PADDING * len(lengths)


def attend_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    padded: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    keys: SharedKeys | None = None,
) -> Tensor | None:
    """Attend causally within each document.

    Args:
        query: (1, heads, T, head_dim).
        key: (1, key-value heads, T, head_dim).
        value: (1, key-value heads, T, head_dim).
        offsets: Of :func:`document_offsets`.
        longest: Length of the longest document, in tokens.
        padded: Of :func:`padded_tokens`.
        scaling: Factor on the scores; ``None`` for ``head_dim ** -0.5``.
        sliding_window: How many positions a token sees, itself included.
        keys: Where documents go on from shared prompts.

    Returns:
        (1, T, heads, head_dim), or ``None`` where the kernel is missing or does not fit.
    """
    if varlen_attn is None or not on_gpu(query):
        return None
    dtype = product_dtype(query)
    window = sliding_window
    if window is not None and not _knows("window_size") and (longest if keys is None else keys.longest) <= window:
        window = None
    _, num_heads, _, head_dim = query.shape
    if not takes(dtype, head_dim):
        return None
    if not fits(padded, num_heads, head_dim):
        _say_once(
            "A batch has more tokens than the varlen attention kernel can index in its backward pass; documents are "
            "attended one by one."
        )
        return None
    kind = query.device, dtype, num_heads, key.shape[1], head_dim
    case = _case(*kind, windowed=window is not None, shared=keys is not None)
    bare = not are_operators_wanted() and _is_bare_trusted(case)
    if not bare and not _is_trusted(case):
        return None
    return attend_in_graph(query, key, value, offsets, longest, dtype, scaling, window, keys, bare)


def is_trusted(
    device: torch.device, dtype: torch.dtype, num_heads: int, num_key_heads: int, head_dim: int, windowed: bool
) -> bool:
    """Whether the kernel takes such inputs on a device and computes there what it should."""
    if varlen_attn is None or device.type != "cuda" or not takes(dtype, head_dim):
        return False
    return _is_trusted(_case(device, dtype, num_heads, num_key_heads, head_dim, windowed=windowed))


def fits(padded: int, num_heads: int, head_dim: int) -> bool:
    """Whether the backward pass can index a buffer of :func:`padded_tokens`."""
    return padded * num_heads * head_dim < _INDEX_LIMIT


def attend_in_graph(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    dtype: torch.dtype,
    scaling: float | None = None,
    sliding_window: int | None = None,
    keys: SharedKeys | None = None,
    bare: bool = False,
) -> Tensor:
    """Attend as :func:`attend_documents` does, unasked: where the caller knows that the kernel fits.

    Nothing here looks at numbers, so that a graph of ``torch.compile`` can contain it, unless the kernel is to be
    called bare.
    """
    query, key, value = (tensor.squeeze(0).transpose(0, 1).to(dtype) for tensor in (query, key, value))
    return _call(query, key, value, offsets, longest, scaling, sliding_window, keys, bare)[None]


def product_dtype(query: Tensor) -> torch.dtype:
    """Return the dtype that attention runs in."""
    return autocast_dtype_of(query) or query.dtype


def takes(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether there is a kernel for heads of this size and dtype."""
    return dtype in _DTYPES and head_dim <= _LARGEST_HEAD and head_dim % 8 == 0


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # graphs neither contain nor guard what follows from the installation
def _knows(option: str) -> bool:
    return option in _parameters()


@cache
def _parameters() -> frozenset[str]:
    return frozenset(inspect.signature(varlen_attn).parameters)


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
    keys: SharedKeys | None = None,
    bare: bool = False,
) -> Tensor:
    """Call the kernel with (T, heads, head_dim) tensors, by the names that this torch knows."""
    ends, most = offsets, longest
    if keys is not None:  # fewer queries than keys are the last ones
        key, value = key.index_select(0, keys.tokens), value.index_select(0, keys.tokens)
        ends, most = keys.starts, keys.longest
    if bare:
        apply: Any = _Bare.apply
        return apply(query, key, value, offsets, ends, longest, most, scaling, window)  # type: ignore[no-any-return]
    options: dict[str, Any] = {}
    if _knows("window_size"):  # how far to look back and ahead, the token itself not counted
        options["window_size"] = (-1 if window is None else window - 1, 0)
    else:
        options["is_causal"] = True
    if _knows("enable_gqa"):  # before, heads were grouped without asking
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    if scaling is not None and _knows("scale"):
        options["scale"] = scaling
    elif scaling is not None:
        query = query * (scaling * query.shape[-1] ** 0.5)
    output: Any = varlen_attn(query, key, value, offsets, ends, longest, most, **options)
    return output  # type: ignore[no-any-return]  # a tuple only where more is asked for


class _Bare(torch.autograd.Function):
    """The kernel without torch's operator around it; what is saved is the same."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        offsets: Tensor,
        ends: Tensor,
        longest: int,
        most: int,
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        ctx.numbers = longest, most, 0.0, window is None  # no dropout
        ctx.options = {
            "scale": scaling,
            "window_size_left": -1 if window is None else window - 1,
            "window_size_right": 0,
        }
        output, sums, *_ = _flash_forward(query, key, value, offsets, ends, *ctx.numbers, False, **ctx.options)
        ctx.save_for_backward(query, key, value, output, sums, offsets, ends)
        return output  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        random, unused = _of_no_dropout(gradient.device)
        found = _flash_backward(gradient, *ctx.saved_tensors, *ctx.numbers, random, unused, **ctx.options)
        return (*found, None, None, None, None, None, None)


_flash_forward: Any
_flash_backward: Any
try:
    _flash_forward = torch.ops.aten._flash_attention_forward.default
    _flash_backward = torch.ops.aten._flash_attention_backward.default
except AttributeError:  # not promised to anyone
    _flash_forward = _flash_backward = None


@cache
def _of_no_dropout(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what the backward pass takes for the state of random numbers, and an empty tensor."""
    return torch.zeros(2, dtype=torch.uint64, device=device), torch.empty(0, device=device)


# The check


@cache
def _is_bare_trusted(case: AttentionCase) -> bool:
    """Whether the kernel without its operator computes here what it should."""
    return case.device.type != "meta" and find_fault(_attend_check(case, bare=True), case) is None


@cache
def _is_trusted(case: AttentionCase) -> bool:
    """Whether the kernel computes here what it should; found out once for each kind of call."""
    if case.device.type == "meta":  # a simulation of a GPU
        return True
    if case.window is not None and not _knows("window_size"):
        return False
    error = find_fault(_attend_check(case), case)
    if error is not None:
        _say_once(
            f"torch's varlen attention is not used on {case.device} for {case.dtype}, head_dim {case.head_dim}"
            f"{'' if case.window is None else ', sliding window'}{', shared prompts' if case.shared_prompts else ''}: "
            f"{error}. It is done another way."
        )
    return error is None


def _case(
    device: torch.device,
    dtype: torch.dtype,
    num_heads: int,
    num_key_heads: int,
    head_dim: int,
    *,
    windowed: bool,
    shared: bool = False,
) -> AttentionCase:
    prompts, window = CHECK_PROMPTS if shared else None, CHECK_WINDOW if windowed else None
    return AttentionCase(device, dtype, num_heads, num_key_heads, head_dim, CHECK_LENGTHS, prompts, window)


def _attend_check(case: AttentionCase, bare: bool = False) -> Attend:
    offsets, longest = document_offsets(case.lengths, case.device), max(case.lengths)
    keys = shared_keys(case.lengths, case.shared_prompts, case.device) if case.shared_prompts else None
    more = case.window, keys, bare
    return lambda query, key, value, scaling: _call(query, key, value, offsets, longest, scaling, *more)


@cache
def _say_once(message: str) -> None:
    rank_zero_info(message)
