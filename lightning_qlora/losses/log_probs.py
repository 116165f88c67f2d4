"""Log-probabilities of given tokens, a chunk of logits at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

__all__ = ["head_log_probs"]


def head_log_probs(
    hidden_ND: Tensor, head: Callable[[Tensor], Tensor], targets_N: Tensor, *, chunk_size: int = 1024
) -> tuple[Tensor, Tensor]:
    """``log softmax(head(hidden))[target]`` at N positions, ``chunk_size`` of them at a time.

    Only one chunk's logits, ``chunk_size`` x V in float32, exist at any moment. Where the head is frozen the gradient
    of each log-probability with respect to its own hidden state is formed together with it, and scaled by what comes
    back (two products with the head's weight a step, not three: the third would be the recomputed forward). Where the
    head is trained each chunk is recomputed in the backward pass instead.

    Args:
        hidden_ND: (N, D) hidden states at the supervised positions.
        head: Maps (n, D) to (n, V) logits; any softcap or scale of the model is part of it.
        targets_N: (N,) int64 token ids.
        chunk_size: Positions whose logits exist at once.

    Returns:
        (N,) float32 log-probabilities in nats, differentiable, and (N,) bool, whether the target is the most likely
        token. With N = 0 they are empty and still reach ``hidden_ND`` and a trained head: other ranks wait for the
        gradients of all that is trained.
    """
    if targets_N.numel() == 0:
        reached = hidden_ND if _is_frozen(head) else head(hidden_ND)
        return reached.float().sum(-1), targets_N.bool()
    if torch.is_grad_enabled() and hidden_ND.requires_grad and _is_frozen(head):
        log_probs_N, correct_N = _FrozenHeadLogProbs.apply(hidden_ND, head, targets_N, chunk_size)  # type: ignore[no-untyped-call]
        return log_probs_N, correct_N
    chunks = []
    for hidden, targets in zip(hidden_ND.split(chunk_size), targets_N.split(chunk_size), strict=True):
        if torch.is_grad_enabled():
            chunks.append(checkpoint(_chunk_log_probs, head, hidden, targets, use_reentrant=False))
        else:
            chunks.append(_chunk_log_probs(head, hidden, targets))
    log_probs, correct = zip(*chunks, strict=True)
    return torch.cat(log_probs), torch.cat(correct)


def _is_frozen(head: Callable[[Tensor], Tensor]) -> bool:
    parameters = getattr(head, "parameters", None)
    return parameters is not None and not any(p.requires_grad for p in parameters())


def _chunk_log_probs(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float()
    return -functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


class _FrozenHeadLogProbs(torch.autograd.Function):
    """Forms the gradient of the hidden states in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head: Callable[[Tensor], Tensor],
        targets_N: Tensor,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        log_probs_N = hidden_ND.new_empty(targets_N.shape, dtype=torch.float32)
        correct_N = torch.empty_like(targets_N, dtype=torch.bool)
        gradient_ND = torch.empty_like(hidden_ND)
        for start in range(0, targets_N.numel(), chunk_size):
            rows = slice(start, start + chunk_size)
            hidden = hidden_ND[rows].detach().requires_grad_()
            with torch.enable_grad():
                log_probs, correct_N[rows] = _chunk_log_probs(head, hidden, targets_N[rows])
                # Rows do not depend on one another, so the gradient of their sum holds that of each.
                (gradient_ND[rows],) = torch.autograd.grad(log_probs.sum(), hidden)
            log_probs_N[rows] = log_probs.detach()
        ctx.save_for_backward(gradient_ND)
        ctx.mark_non_differentiable(correct_N)
        return log_probs_N, correct_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        scaled_ND = torch.empty_like(gradient_ND)
        torch.mul(gradient_ND, grad_N[:, None], out=scaled_ND)  # the factors are not rounded to 16 bits
        return scaled_ND, None, None, None
