"""FlexAttention over packed documents, for what torch's varlen kernel does not compute: bounds of the scores.

Which tokens see which follows from four numbers for each token, read inside the kernel; which blocks of 128 x 128 have
any such pair follows from the lengths, on the host, without a mask of all pairs. Both are made once for a batch. The
compiled kernel is used on GPUs only, and trusted only after the comparison that the varlen kernel passes too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lightning_qlora.kernels.self_check import (
    CHECK_LENGTHS,
    CHECK_PROMPTS,
    CHECK_WINDOW,
    Attend,
    AttentionCase,
    find_fault,
)
from lightning_qlora.transfers import send

__all__ = ["attend_with_flex", "block_mask"]

_BLOCK = 128
_SMALLEST_HEAD = 16
_LARGEST_HEAD = 256


def attend_with_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask_of: Callable[[int | None], BlockMask],
    dtype: torch.dtype,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor | None:
    """Attend causally within each document.

    Args:
        query: (1, heads, T, head_dim).
        key: (1, key-value heads, T, head_dim).
        value: (1, key-value heads, T, head_dim).
        mask_of: From a window, or ``None``, to the batch's :func:`block_mask`.
        dtype: That attention runs in.
        scaling: Factor on the scores; ``None`` for ``head_dim ** -0.5``.
        sliding_window: How many positions a token sees, itself included.
        softcap: Bound of the scores.

    Returns:
        (1, T, heads, head_dim), or ``None`` where the kernel cannot be trusted.
    """
    head_dim = query.shape[3]
    if dtype not in (torch.bfloat16, torch.float16) or not _SMALLEST_HEAD <= head_dim <= _LARGEST_HEAD:
        return None
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    if query.device.type == "meta":  # a simulation of a GPU: another kernel that keeps as much
        options: dict[str, Any] = {"is_causal": True, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
        return functional.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)
    window = None if sliding_window is None else CHECK_WINDOW
    heads = query.shape[1], key.shape[1], head_dim
    if not _is_trusted(AttentionCase(query.device, dtype, *heads, CHECK_LENGTHS, CHECK_PROMPTS, window, softcap)):
        return None
    return _call(query, key, value, mask_of(sliding_window), scaling, softcap, compiled=True)


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scaling: float | None,
    softcap: float | None,
    *,
    compiled: bool,
) -> Tensor:
    attend = _compiled() if compiled else flex_attention
    bound = None if softcap is None else _bound(softcap, query.shape[1], query.device)
    grouped = query.shape[1] != key.shape[1]
    output: Any = attend(query, key, value, score_mod=bound, block_mask=mask, scale=scaling, enable_gqa=grouped)
    return output.transpose(1, 2)  # type: ignore[no-any-return]


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)


@cache
def _bound(softcap: float, num_heads: int, device: torch.device) -> Callable[..., Tensor]:
    """Gemma 2's bound of the scores, read from a tensor, so that no graph is made for it."""
    bounds = torch.full((num_heads,), softcap, device=device)

    def bound(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return bounds[head] * torch.tanh(score / bounds[head])

    return bound


# Which tokens see which


def block_mask(
    lengths: Sequence[int], shared_prompts: Sequence[int] | None, window: int | None, device: torch.device
) -> BlockMask:
    """Say which tokens see which, without holding all pairs of them.

    Args:
        lengths: Of the documents.
        shared_prompts: As of :class:`~lightning_qlora.kernels.attention.PackedDocuments`.
        window: How many positions a token sees, itself included.
        device: Of the tokens.
    """
    shared = list(shared_prompts or [0] * len(lengths))
    owners, position, trunk, prompt, earliest = send(_tokens(lengths, shared, window), device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = owners[query] == owners[key]
        of_prompt = (trunk[query] == owners[key]) & (position[key] < prompt[query])
        allowed: Tensor = (own | of_prompt) & (position[key] <= position[query]) & (position[key] >= earliest[query])
        return allowed

    some, whole = _blocks(lengths, shared, window)
    counts, indices, whole_counts, whole_indices = (
        send(each, device) for kind in (some, whole) for each in _listed(kind)
    )
    total = sum(lengths)
    return BlockMask.from_kv_blocks(
        counts, indices, whole_counts, whole_indices, _BLOCK, sees, seq_lengths=(total, total)
    )


def _tokens(lengths: Sequence[int], shared: Sequence[int], window: int | None) -> Tensor:
    """Return (5, T) int32, for each token what it sees.

    Its document, its position in its text, the document that its prompt is in, how many tokens that has there, and the
    first position that it sees.
    """
    rows: list[tuple[int, int, int, int]] = []  # of each document, with its first position
    trunk = 0
    for index, length in enumerate(shared):
        trunk = trunk if length else index
        rows.append((index, length, trunk, length))
    counts = torch.tensor(lengths, device="cpu")  # whatever the default device is
    starts = counts.cumsum(0) - counts
    found = torch.tensor(rows, device="cpu").repeat_interleave(counts, 0).t().contiguous()
    found[1] += torch.arange(sum(lengths), device="cpu") - starts.repeat_interleave(counts)
    earliest = torch.zeros_like(found[1]) if window is None else found[1] - window + 1
    return torch.cat((found, earliest[None])).to(torch.int32)


def _blocks(lengths: Sequence[int], shared: Sequence[int], window: int | None) -> tuple[Tensor, Tensor]:
    """(blocks, blocks) bool twice: of queries and keys some of which, and all of which, see one another."""
    num = -(-sum(lengths) // _BLOCK)
    some, whole = torch.zeros(2, num, num, dtype=torch.bool, device="cpu")
    positions = torch.arange(num, device="cpu")
    back = positions[:, None] - positions[None, :]
    near = (back >= 0) if window is None else (back >= 0) & ((back - 1) * _BLOCK + 1 < window)
    inside = (back > 0) if window is None else (back > 0) & ((back + 1) * _BLOCK - 1 < window)
    start = trunk = 0
    for length, prompt in zip(lengths, shared, strict=True):
        rows, whole_rows = _span(start, start + length)
        some[rows, rows] |= near[rows, rows]
        whole[whole_rows, whole_rows] |= inside[whole_rows, whole_rows]
        if prompt:
            columns, whole_columns = _span(trunk, trunk + prompt)
            some[rows, columns] = True
            whole[whole_rows, whole_columns] |= window is None
        else:
            trunk = start
        start += length
    return some & ~whole, whole


def _span(start: int, end: int) -> tuple[slice, slice]:
    """Blocks that have some, and only, tokens from ``start`` to ``end``."""
    first = -(-start // _BLOCK)
    return slice(start // _BLOCK, -(-end // _BLOCK)), slice(first, max(first, end // _BLOCK))


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which, these first."""
    order = torch.argsort(blocks.to(torch.int8), dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


# The check


@cache
def _is_trusted(case: AttentionCase) -> bool:
    """Whether the kernel computes here what it should; found out once for each kind of call."""
    error = find_fault(_attend_check(case), case)
    if error is not None:
        rank_zero_info(
            f"FlexAttention is not used on {case.device} for {case.dtype}, head_dim {case.head_dim}"
            f"{'' if case.window is None else ', sliding window'}{', softcap' if case.softcap else ''}: {error}. "
            "Documents are attended one by one."
        )
    return error is None


def _attend_check(case: AttentionCase) -> Attend:
    mask = block_mask(case.lengths, case.shared_prompts, case.window, case.device)

    def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        query, key, value = (each.transpose(0, 1)[None] for each in (query, key, value))
        return _call(query, key, value, mask, scaling, case.softcap, compiled=True)[0]

    return attend
