"""Losses that are sums, and gradients of their mean over all that one optimizer step sees."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from typing_extensions import override

from lightning_qlora.ranks import add_up
from lightning_qlora.transfers import Readback

__all__ = ["SummedLossModule"]


class SummedLossModule(L.LightningModule):
    """A module whose steps return sums of losses and report to :meth:`count_terms` how many terms each has.

    The gradient is divided once per optimizer step, by the count of the whole step over all micro-batches and ranks.
    """

    _window: Tensor | None = None
    """Sums of the optimizer step under way: loss, terms, extras."""
    _shown: Readback | None = None
    """The loss of the last step."""

    @override
    def on_train_start(self) -> None:
        self._window = self._shown = None  # of an earlier fit that broke off; of a resumed epoch no start is told

    def count_terms(self, loss_sum: Tensor, num_terms: int, *extras: Tensor) -> None:
        """Add one micro-batch to the running optimizer step.

        Args:
            loss_sum: Its summed loss.
            num_terms: How many tokens or pairs it sums over.
            extras: Further scalars that :meth:`on_step_totals` is given the sums of.
        """
        terms = loss_sum.new_full((), float(num_terms))
        sums = torch.stack([value.detach().float() for value in (loss_sum, terms, *extras)])
        self._window = sums if self._window is None else self._window + sums

    @override
    def on_train_epoch_start(self) -> None:
        self._window = self._shown = None

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn the gradient of summed losses into that of the mean over all terms of the step.

        Lightning has divided each loss by ``accumulate_grad_batches`` (also in a short last window) and the strategy
        averages over ranks; a mean of such means is off by over 20 % on ragged batches (huggingface/transformers#34191,
        Lightning-AI/pytorch-lightning#20350). This hook runs before gradients are clipped, and logs their norm as it is
        then.
        """
        if self._window is None:
            return
        totals, self._window = add_up(self._window), None
        loss_sum, num_terms = totals[0], totals[1].clamp(min=1.0)
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / num_terms
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, scale.to(gradients[0].device))  # on the host where a strategy offloads them
            self.log("gradient_norm", _full(get_total_norm(gradients)))
        # On the host: Lightning would copy a Python number to the GPU and wait for it.
        self.log("learning_rate", torch.tensor(float(optimizer.param_groups[0]["lr"])))
        loss = loss_sum / num_terms
        self.log("train_loss", loss)
        self._show(loss)
        self.on_step_totals(totals[2:])

    def _show(self, loss: Tensor) -> None:
        """Log what the progress bar shows; Lightning reads that in every step, and would wait for this one's loss."""
        before, self._shown = self._shown, Readback(loss)
        arrived = before if loss.is_cuda else self._shown
        if arrived is not None:
            self.log("loss", arrived.wait(), prog_bar=True, logger=False)

    def on_step_totals(self, extras: Tensor) -> None:
        """Hook for subclasses: the sums of :meth:`count_terms`' extras over the optimizer step and all ranks."""


def _full(norm: Tensor) -> Tensor:
    """Return the norm over all ranks where gradients are sharded."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
