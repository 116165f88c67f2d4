"""Whether a kernel computes what it should on the device that it is to be used on; for attention, against arithmetic.

Attention is compared with plain operators, forward and backward, on a small random batch.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

__all__ = [
    "CHECK_LENGTHS",
    "CHECK_PROMPTS",
    "CHECK_WINDOW",
    "Attend",
    "AttentionCase",
    "compare_attention",
    "find_fault",
    "first_line",
    "in_clean_thread",
    "may_be_used",
]

CHECK_LENGTHS = (5, 64, 1, 131)
CHECK_PROMPTS = (0, 3, 0, 1)
CHECK_WINDOW = 17
_TOLERANCE = 2e-2  # relative to the norm; bfloat16 keeps 8 bits


class AttentionCase(NamedTuple):
    """What decides which kernel runs, and what it is checked on.

    Attributes:
        device: Where.
        dtype: Of the inputs.
        num_heads: Of the queries.
        num_key_heads: Of keys and values.
        head_dim: Of all.
        lengths: Of the documents.
        shared_prompts: As of :class:`~lightning_qlora.kernels.attention.PackedDocuments`.
        window: How many positions a token sees, itself included.
        softcap: Bound of the scores.
    """

    device: torch.device
    dtype: torch.dtype
    num_heads: int
    num_key_heads: int
    head_dim: int
    lengths: Sequence[int] = CHECK_LENGTHS
    shared_prompts: Sequence[int] | None = None
    window: int | None = None
    softcap: float | None = None


Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""From (T, heads, head_dim) queries, keys, values and the factor on the scores to an output like the queries."""


def in_clean_thread(compare: Callable[[], str | None]) -> str | None:
    """Return what a comparison finds wrong, or ``None``.

    It runs in a thread of its own, where autocast, hooks, modes and the default device of the caller do not reach; on
    the caller's GPU all the same.
    """
    found: list[str | None] = []
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        if gpu is not None:
            torch.cuda.set_device(gpu)
        found.append(compare())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0] if found else "the comparison failed"


def may_be_used(kernel: object, device: torch.device, compare: Callable[[], str | None], complaint: str) -> bool:
    """Whether a kernel is there and computes on a device what it should; where it does not, that is said.

    Args:
        kernel: What importing it gave here, or ``None``. It says something of this machine's GPU; of a GPU that is only
            simulated and stands elsewhere, which comes with Triton, it says nothing.
        device: Where; ``meta`` for a simulated GPU.
        compare: Finds what is wrong, or fails as the kernel does; run in a clean thread.
        complaint: What is said, with ``{fault}`` for what is wrong.
    """
    if device.type == "meta":
        return kernel is not None or not torch.cuda.is_available()
    if kernel is None:
        return False
    fault = in_clean_thread(functools.partial(_fault_of, compare))
    if fault is not None:
        rank_zero_info(complaint.format(fault=fault))
    return fault is None


def _fault_of(compare: Callable[[], str | None]) -> str | None:
    try:
        return compare()
    except Exception as error:  # a compiler that is missing or does not know this device fails in many ways
        return first_line(error)


def first_line(error: Exception) -> str:
    """Return what an error says, in short; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def find_fault(attend: Attend, case: AttentionCase) -> str | None:
    """Return what :func:`compare_attention` finds, in a clean thread."""
    return in_clean_thread(lambda: compare_attention(attend, case))


def compare_attention(attend: Attend, case: AttentionCase) -> str | None:
    """Return what is wrong with a kernel, or ``None``."""
    generator = torch.Generator().manual_seed(0)
    total, heads = sum(case.lengths), (case.num_heads, case.num_key_heads, case.num_key_heads)
    inputs = [torch.randn(total, n, case.head_dim, generator=generator).to(case.dtype) for n in heads]
    weights = torch.randn(total, case.num_heads, case.head_dim, generator=generator).to(case.dtype)
    scaling = 0.7 * case.head_dim**-0.5
    try:
        fast = [x.to(case.device).requires_grad_() for x in inputs]
        output = attend(fast[0], fast[1], fast[2], scaling)
        gradients = torch.autograd.grad(output, fast, weights.to(case.device))
        found = [x.double().cpu() for x in (output.detach(), *gradients)]
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return first_line(error)
    plain = [x.double().requires_grad_() for x in inputs]
    expected = _plain_attention(plain[0], plain[1], plain[2], scaling, case)
    references = [expected.detach(), *torch.autograd.grad(expected, plain, weights.double())]
    for name, one, two in zip(("output", "dQ", "dK", "dV"), found, references, strict=True):
        distance = float((one - two).norm() / two.norm())
        if not distance <= _TOLERANCE:  # NaN never passes
            return f"its {name} is off by {distance:.2g} of its norm"
    return None


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, case: AttentionCase) -> Tensor:
    """Attend under a mask over all documents, by plain operators."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scaling
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    weights = scores.masked_fill(~_allowed(case), -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def _allowed(case: AttentionCase) -> Tensor:
    """(T, T) bool, query by query: the last positions of the text that it ends."""
    allowed = torch.zeros(sum(case.lengths), sum(case.lengths), dtype=torch.bool)
    start, trunk = 0, 0
    for length, shared in zip(case.lengths, case.shared_prompts or [0] * len(case.lengths), strict=True):
        trunk = trunk if shared else start
        text = [*range(trunk, trunk + shared), *range(start, start + length)]
        for last in range(shared, len(text)):
            first = 0 if case.window is None else max(0, last + 1 - case.window)
            allowed[text[last], text[first : last + 1]] = True
        start += length
    return allowed
