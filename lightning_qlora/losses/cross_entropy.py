"""Cross-entropy over supervised positions only, without ever holding the logits of a whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

__all__ = ["TokenLoss", "head_cross_entropy"]


class TokenLoss(NamedTuple):
    """A sum over N supervised tokens, to be divided by the token count of the whole optimizer step.

    Attributes:
        loss_sum: () float32, in nats, differentiable.
        num_correct: () int64, positions whose most likely token is the target.
        num_tokens: N, on the host.
    """

    loss_sum: Tensor
    num_correct: Tensor
    num_tokens: int


def head_cross_entropy(
    hidden_ND: Tensor, head: Callable[[Tensor], Tensor], targets_N: Tensor, *, chunk_size: int = 1024
) -> TokenLoss:
    """Sum of ``-log softmax(head(hidden))[target]`` over N positions, ``chunk_size`` of them at a time.

    Only one chunk's logits, ``chunk_size`` x V in float32, exist at any moment. Where the head is frozen its gradient
    is formed together with the loss (two products with the head's weight a step, not three: the third would be the
    recomputed forward). Where the head is trained each chunk is recomputed in the backward pass instead.

    Args:
        hidden_ND: (N, D) hidden states at the supervised positions.
        head: Maps (n, D) to (n, V) logits; any softcap or scale of the model is part of it.
        targets_N: (N,) int64 token ids.
        chunk_size: Positions whose logits exist at once.

    Returns:
        The sum and its counts. With N = 0 the sum is an exact zero that still reaches ``hidden_ND``.
    """
    num_tokens = targets_N.numel()
    if num_tokens == 0:
        return TokenLoss(hidden_ND.sum().float() * 0.0, targets_N.new_zeros(()), 0)
    if torch.is_grad_enabled() and hidden_ND.requires_grad and _is_frozen(head):
        loss_sum, num_correct = _FrozenHeadCrossEntropy.apply(hidden_ND, head, targets_N, chunk_size)  # type: ignore[no-untyped-call]
        return TokenLoss(loss_sum, num_correct, num_tokens)
    loss_sum = hidden_ND.new_zeros((), dtype=torch.float32)
    num_correct = targets_N.new_zeros(())
    for hidden, targets in zip(hidden_ND.split(chunk_size), targets_N.split(chunk_size), strict=True):
        if torch.is_grad_enabled():
            chunk_loss, correct = checkpoint(_chunk_loss, head, hidden, targets, use_reentrant=False)
        else:
            chunk_loss, correct = _chunk_loss(head, hidden, targets)
        loss_sum = loss_sum + chunk_loss
        num_correct = num_correct + correct
    return TokenLoss(loss_sum, num_correct, num_tokens)


def _is_frozen(head: Callable[[Tensor], Tensor]) -> bool:
    parameters = getattr(head, "parameters", None)
    return parameters is not None and not any(p.requires_grad for p in parameters())


def _chunk_loss(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float()
    return functional.cross_entropy(logits, targets, reduction="sum"), (logits.argmax(-1) == targets).sum()


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    """Forms the gradient of the hidden states in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head: Callable[[Tensor], Tensor],
        targets_N: Tensor,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        loss_sum = hidden_ND.new_zeros((), dtype=torch.float32)
        num_correct = targets_N.new_zeros(())
        gradient_ND = torch.empty_like(hidden_ND)
        for start in range(0, targets_N.numel(), chunk_size):
            rows = slice(start, start + chunk_size)
            hidden = hidden_ND[rows].detach().requires_grad_()
            with torch.enable_grad():
                chunk_loss, correct = _chunk_loss(head, hidden, targets_N[rows])
            (gradient_ND[rows],) = torch.autograd.grad(chunk_loss, hidden)
            loss_sum += chunk_loss.detach()
            num_correct += correct
        ctx.save_for_backward(gradient_ND)
        ctx.mark_non_differentiable(num_correct)
        return loss_sum, num_correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * grad_loss.to(gradient_ND.dtype), None, None, None
