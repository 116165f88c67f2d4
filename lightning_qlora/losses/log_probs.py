"""Log-probabilities of given tokens, a chunk of logits at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightning_qlora.kernels.launching import autocast_dtype_of
from lightning_qlora.kernels.log_softmax import PLAIN_BYTES, bytes_per_logit, log_softmax_with_gradient
from lightning_qlora.parts import whole

__all__ = ["chunk_positions", "head_log_probs"]

_BUDGET = 320 * 2**20
"""Bytes that a chunk's logits, what they are computed with and their gradient may take."""
_MOST_POSITIONS = 1024  # of a chunk: the products are as fast as they get
_FEWEST_POSITIONS = 256  # fewer, and reading the head's weight takes longer than multiplying with it
_STEP = 64  # rows of a product come in tiles


def chunk_positions(vocab_size: int, *, frozen: bool = True, logit_bytes: int = PLAIN_BYTES) -> int:
    """Return how many positions' logits to hold at once.

    Args:
        vocab_size: Logits of a position.
        frozen: Whether no parameter of the head is trained. Where one is, gradients are left to autograd, which takes
            twice the bytes.
        logit_bytes: What there is at a time for each position and token of the vocabulary, as of
            :func:`~lightning_qlora.kernels.log_softmax.bytes_per_logit`.
    """
    positions = _BUDGET // ((1 if frozen else 2) * logit_bytes * vocab_size)
    return max(_FEWEST_POSITIONS, min(_MOST_POSITIONS, positions // _STEP * _STEP))


def head_log_probs(
    hidden_ND: Tensor, head: Callable[[Tensor], Tensor], targets_N: Tensor, *, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """``log softmax(head(hidden))[target]`` at N positions, a chunk of them at a time.

    Only one chunk's logits exist at any moment. Where the head is frozen the gradient of each log-probability with
    respect to its own hidden state is formed together with it, and scaled by what comes back (two products with the
    head's weight a step, not three: the third would be the recomputed forward). Where the head is trained each chunk is
    recomputed in the backward pass instead.

    Args:
        hidden_ND: (N, D) hidden states at the supervised positions.
        head: Maps (n, D) to (n, V) logits; any softcap or scale of the model is part of it.
        targets_N: (N,) int64 token ids.
        chunk_size: Positions whose logits exist at once; ``None`` for :func:`chunk_positions` of the head's largest
            linear layer. The result does not depend on it.

    Returns:
        (N,) float32 log-probabilities in nats, differentiable, and (N,) bool, whether the target is the most likely
        token. With N = 0 they are empty and still reach ``hidden_ND`` and a trained head: other ranks wait for the
        gradients of all that is trained.
    """
    with whole(head):  # once for all chunks, of which each rank has its own number
        if targets_N.numel() == 0:
            reached = hidden_ND if _is_frozen(head) else head(hidden_ND)
            return reached.float().sum(-1), targets_N.bool()
        if chunk_size is None:
            chunk_size = chunk_positions(
                _vocab_size(head, hidden_ND), frozen=_is_frozen(head), logit_bytes=_logit_bytes(head, hidden_ND)
            )
        return _log_probs(hidden_ND, head, targets_N, chunk_size)


def _log_probs(
    hidden_ND: Tensor, head: Callable[[Tensor], Tensor], targets_N: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    if _forms_gradient(head, hidden_ND):
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


def _vocab_size(head: Callable[[Tensor], Tensor], hidden_ND: Tensor) -> int:
    """Return the width of the logits without computing any; adapters of a head are narrower than itself."""
    modules = head.modules() if isinstance(head, nn.Module) else ()
    return max((each.out_features for each in modules if isinstance(each, nn.Linear)), default=hidden_ND.shape[-1])


def _logit_bytes(head: Callable[[Tensor], Tensor], hidden_ND: Tensor) -> int:
    """Return what a logit takes, before there are any; of a head that may make more than logits, the most."""
    if not (_forms_gradient(head, hidden_ND) and _is_linear(head)):
        return PLAIN_BYTES
    return bytes_per_logit(hidden_ND, autocast_dtype_of(hidden_ND) or hidden_ND.dtype)


def _is_linear(head: Callable[[Tensor], Tensor]) -> bool:
    """Whether a head is one linear layer, perhaps in a module of its own, and no softcap follows it."""
    if getattr(head, "softcap", None) is not None:
        return False
    children = list(head.children()) if isinstance(head, nn.Module) else []
    return isinstance(head, nn.Linear) or (len(children) == 1 and isinstance(children[0], nn.Linear))


def _forms_gradient(head: Callable[[Tensor], Tensor], hidden_ND: Tensor) -> bool:
    """Whether the gradient of the hidden states is formed together with the log-probabilities."""
    return torch.is_grad_enabled() and hidden_ND.requires_grad and _is_frozen(head)


def _is_frozen(head: Callable[[Tensor], Tensor]) -> bool:
    parameters = getattr(head, "parameters", None)
    return parameters is not None and not any(p.requires_grad for p in parameters())


def _chunk_log_probs(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits_NV = head(hidden)
    log_probs_NV = functional.log_softmax(logits_NV, -1, dtype=torch.float32)
    return log_probs_NV.gather(1, targets[:, None])[:, 0], logits_NV.argmax(-1) == targets


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
                logits_NV = head(hidden)
            log_probs_N[rows], correct_N[rows], negative_NV = log_softmax_with_gradient(
                logits_NV.detach(), targets_N[rows]
            )
            # Rows do not depend on one another, so the gradient of their sum holds that of each.
            (negative_ND,) = torch.autograd.grad(logits_NV, hidden, negative_NV)
            torch.neg(negative_ND, out=gradient_ND[rows])
            del logits_NV, negative_NV  # not to be there beside the next chunk's
        ctx.save_for_backward(gradient_ND)
        ctx.mark_non_differentiable(correct_N)
        return log_probs_N, correct_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        scaled_ND = torch.empty_like(gradient_ND)
        torch.mul(gradient_ND, grad_N[:, None], out=scaled_ND)  # the factors are not rounded to 16 bits
        return scaled_ND, None, None, None
