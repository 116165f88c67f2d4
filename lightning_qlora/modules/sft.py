"""Supervised fine-tuning: cross-entropy over the supervised tokens of a batch."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from typing_extensions import override

from lightning_qlora.losses.cross_entropy import TokenLoss, head_cross_entropy
from lightning_qlora.modules.base import CausalLMModule
from lightning_qlora.modules.metrics import ExactMean, MeanPerplexity
from lightning_qlora.schema import SFTBatch

__all__ = ["SFTModule"]

Stage = Literal["train", "val", "test"]


class SFTModule(CausalLMModule):
    """Supervised fine-tuning of a 4-bit base with adapters.

    Logs ``train_loss`` at each optimizer step (exact over its micro-batches and ranks), and per epoch
    ``train_perplexity`` and ``train_token_accuracy``; ``val_loss``, ``val_perplexity`` and ``val_token_accuracy`` in
    validation, likewise ``test_...``. All are weighted by supervised tokens. Losses are in nats.
    """

    def __init__(self, model_name: str, **kwargs: Any) -> None:
        super().__init__(model_name, **kwargs)
        self.metrics = nn.ModuleDict(
            {
                f"{stage}_": nn.ModuleDict(
                    {"loss": ExactMean(), "perplexity": MeanPerplexity(), "token_accuracy": ExactMean()}
                )
                for stage in ("train", "val", "test")
            }
        )

    def token_loss(self, batch: SFTBatch) -> TokenLoss:
        """Sum of the cross-entropy over the supervised tokens of a packed or padded batch."""
        hidden_ND, head = self.supervised_forward(batch)
        return head_cross_entropy(hidden_ND, head, batch["targets"])

    def _step(self, batch: SFTBatch, stage: Stage) -> TokenLoss:
        loss = self.token_loss(batch)
        metrics: Any = self.metrics[f"{stage}_"]
        for name, total in (
            ("loss", loss.loss_sum.detach()),
            ("perplexity", loss.loss_sum.detach()),
            ("token_accuracy", loss.num_correct),
        ):
            metrics[name].update(total, loss.num_tokens)
        for name, metric in metrics.items():
            if (stage, name) != ("train", "loss"):  # logged per optimizer step by the base class
                self.log(
                    f"{stage}_{name}", metric, on_step=False, on_epoch=True, prog_bar=(stage, name) == ("val", "loss")
                )
        return loss

    @override
    def training_step(self, batch: SFTBatch, batch_idx: int) -> Tensor:
        loss = self._step(batch, "train")
        self.count_terms(loss.loss_sum, loss.num_tokens)
        return loss.loss_sum

    @override
    def validation_step(self, batch: SFTBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._step(batch, "val")

    @override
    def test_step(self, batch: SFTBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._step(batch, "test")
