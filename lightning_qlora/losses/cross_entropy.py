"""Cross-entropy over supervised positions only, without ever holding the logits of a whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lightning_qlora.losses.log_probs import head_log_probs

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
    hidden_ND: Tensor, head: Callable[[Tensor], Tensor], targets_N: Tensor, *, chunk_size: int | None = None
) -> TokenLoss:
    """Sum of ``-log softmax(head(hidden))[target]`` over N positions, a chunk of them at a time.

    Args:
        hidden_ND: (N, D) hidden states at the supervised positions.
        head: Maps (n, D) to (n, V) logits, as in :func:`~lightning_qlora.losses.log_probs.head_log_probs`.
        targets_N: (N,) int64 token ids.
        chunk_size: Positions whose logits exist at once; ``None`` for as many as a budget of memory allows.

    Returns:
        The sum and its counts. With N = 0 the sum is an exact zero that still reaches ``hidden_ND``.
    """
    log_probs_N, correct_N = head_log_probs(hidden_ND, head, targets_N, chunk_size=chunk_size)
    return TokenLoss(-log_probs_N.sum(), correct_N.sum(), targets_N.numel())
