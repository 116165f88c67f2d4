"""Supervised fine-tuning: cross-entropy over the supervised tokens of a batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_qlora.losses.cross_entropy import TokenLoss, head_cross_entropy
from lightning_qlora.modules.base import CausalLMModule
from lightning_qlora.modules.measured import Measured
from lightning_qlora.modules.metrics import ExactMean, MeanPerplexity, Stage, StageMetrics
from lightning_qlora.schema import SFTBatch

__all__ = ["SFTModule"]


class SFTModule(Measured, CausalLMModule):
    """Supervised fine-tuning of a 4-bit base with adapters.

    Logs ``train_loss`` at each optimizer step (exact over its micro-batches and ranks), and per epoch
    ``train_perplexity`` and ``train_token_accuracy``; ``val_loss``, ``val_perplexity`` and ``val_token_accuracy`` in
    validation, likewise ``test_...``. All are weighted by supervised tokens. Losses are in nats.
    Several data loaders of a stage are measured each by itself, as ``val_loss/dataloader_idx_0`` and so on.
    """

    def __init__(self, model_name: str, **kwargs: Any) -> None:
        super().__init__(model_name, **kwargs)
        self.metrics = StageMetrics({stage: _metrics(stage) for stage in ("train", "val", "test")})

    def token_loss(self, batch: SFTBatch) -> TokenLoss:
        """Sum of the cross-entropy over the supervised tokens of a packed or padded batch."""
        hidden_ND, head = self.supervised_forward(batch)
        return head_cross_entropy(hidden_ND, head, batch["targets"])

    def _step(self, batch: SFTBatch, stage: Stage, dataloader_idx: int = 0) -> TokenLoss:
        loss = self.token_loss(batch)
        metrics: Any = self.metrics.of(stage, dataloader_idx)
        for name, metric in metrics.items():
            metric.update(loss.num_correct if name == "token_accuracy" else loss.loss_sum.detach(), loss.num_tokens)
        self.metrics.log(self, stage, dataloader_idx, shown=frozenset({"val_loss"}))
        return loss

    @override
    def training_step(self, batch: SFTBatch, batch_idx: int) -> Tensor:
        loss = self._step(batch, "train")
        self.metrics.keep_sums(batch_idx)
        self.count_terms(loss.loss_sum, loss.num_tokens)
        return loss.loss_sum

    @override
    def validation_step(self, batch: SFTBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._step(batch, "val", dataloader_idx)

    @override
    def test_step(self, batch: SFTBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._step(batch, "test", dataloader_idx)


def _metrics(stage: Stage) -> nn.ModuleDict:
    metrics = {"perplexity": MeanPerplexity(), "token_accuracy": ExactMean()}
    # The loss of training is logged for each optimizer step, by the base class.
    return nn.ModuleDict(metrics if stage == "train" else {"loss": ExactMean(), **metrics})
