"""Log-probabilities of given tokens, together with their gradient by the logits.

torch's operators make about ten passes over the logits for it, in float32. On a GPU with Triton one kernel reads them
and writes the gradient in their own dtype. The first use on a device compares it with torch's operators; where it
differs, and everywhere else, these compute.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lightning_qlora.kernels.launching import on_device_of, on_gpu
from lightning_qlora.kernels.self_check import may_be_used

triton_log_softmax: Any
try:
    from lightning_qlora.kernels.log_softmax_triton import log_softmax as triton_log_softmax
except ImportError:  # torch for CPUs comes without Triton
    triton_log_softmax = None

__all__ = ["PLAIN_BYTES", "bytes_per_logit", "has_kernel", "log_softmax_with_gradient"]

PLAIN_BYTES = 10
"""What torch's operators hold at a time for each logit: itself in bfloat16 and in float32, and its log-softmax."""

_TOLERANCES = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}  # of each number of the gradient
_CHECK_WIDTHS = (203, 9_001, 20_000)  # few, and blocks with a rest, of rows that begin anywhere; and that are aligned
_CHECKED_ROWS = 6


class _Kind(NamedTuple):
    """What decides which kernel runs."""

    device: torch.device
    dtype: torch.dtype


def log_softmax_with_gradient(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities, whether the target is the most likely token, and minus the gradient by the logits.

    Args:
        logits_NV: (N, V) logits of any floating dtype. They are not changed: the operator that made them may have kept
            them for its own gradient.
        targets_N: (N,) int64 token ids.

    Returns:
        (N,) float32 log-probabilities in nats; (N,) bool, whether the target is the first of the largest logits; and
        (N, V), of the logits' dtype, their softmax less one at the target. Where NaN or +inf is among the logits, or
        they all are -inf, log-probability and gradient are NaN; of a row with NaN the second says nothing.
    """
    return (_by_kernel if _is_fast(logits_NV, logits_NV.dtype) else _plain)(logits_NV, targets_N)


def bytes_per_logit(near: Tensor, dtype: torch.dtype) -> int:
    """Return what :func:`log_softmax_with_gradient` holds at a time for each logit, itself and its gradient included.

    Args:
        near: Any tensor on the device where the logits will be.
        dtype: Of the logits.
    """
    return 2 * dtype.itemsize if _is_fast(near, dtype) else PLAIN_BYTES


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GPU's own kernel can be trusted with logits of this dtype."""
    return dtype in _TOLERANCES and _is_trusted(_Kind(device, dtype))


def _is_fast(near: Tensor, dtype: torch.dtype) -> bool:
    return on_gpu(near) and has_kernel(near.device, dtype)


def _by_kernel(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits_NV, targets_N = logits_NV.contiguous(), targets_N.contiguous()
    log_probs_N = torch.empty_like(targets_N, dtype=torch.float32)
    correct_N = torch.empty_like(targets_N, dtype=torch.bool)
    negative_NV = torch.empty_like(logits_NV)
    if logits_NV.device.type != "meta":
        with on_device_of(logits_NV):
            triton_log_softmax(logits_NV, targets_N, log_probs_N, correct_N, negative_NV)
    return log_probs_N, correct_N, negative_NV


def _plain(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_probs_NV = functional.log_softmax(logits_NV, -1, dtype=torch.float32)
    log_probs_N = log_probs_NV.gather(1, targets_N[:, None])[:, 0]
    correct_N = logits_NV.argmax(-1) == targets_N
    negative_NV = log_probs_NV.exp_()  # d(-log p) / d logits = softmax - one at the target
    negative_NV[torch.arange(targets_N.numel(), device=targets_N.device), targets_N] -= 1
    return log_probs_N, correct_N, negative_NV.to(logits_NV.dtype)


# The check


@cache
def _is_trusted(kind: _Kind) -> bool:
    """Whether the kernel computes here what torch's operators do; found out once for each kind of logits."""
    complaint = (
        f"Triton's kernel for the loss is not used on {kind.device} for {kind.dtype}: {{fault}}. torch's own operators "
        "are used."
    )
    return may_be_used(triton_log_softmax, kind.device, lambda: _compare(kind), complaint)


def _compare(kind: _Kind) -> str | None:
    """Return what is wrong with the kernel, compared with float32 on the CPU, or ``None``."""
    for width in _CHECK_WIDTHS:
        logits, targets = _random_logits(width)
        logits = logits.to(kind.dtype)
        found = [each.cpu() for each in _by_kernel(logits.to(kind.device), targets.to(kind.device))]
        expected = _plain(logits.float(), targets)
        if not torch.allclose(found[0], expected[0], rtol=1e-6, atol=1e-5, equal_nan=True):
            return "its log-probabilities differ from torch's"
        if not torch.equal(found[1], expected[1]):
            return "it takes other tokens for the most likely"
        if not torch.allclose(found[2].float(), expected[2], rtol=_TOLERANCES[kind.dtype], atol=1e-7, equal_nan=True):
            return "its gradients differ from torch's"
    return None


def _random_logits(width: int) -> tuple[Tensor, Tensor]:
    """Return logits, with ties and infinities among them, and targets."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(_CHECKED_ROWS, width, generator=generator, device="cpu")
    targets = torch.randint(width, (_CHECKED_ROWS,), generator=generator, device="cpu")
    largest = logits.max() + 1  # no more: of a probability close to one little would be left
    logits[0, -1], targets[0] = largest, width - 1
    logits[1:3, [width // 3, width // 2]] = largest  # the first of them, and the other
    targets[1], targets[2] = width // 3, width // 2
    logits[3, : width // 2] = -torch.inf
    targets[3] = 0
    logits[4] = -torch.inf
    return logits, targets
