"""Supervised fine-tuning: cross-entropy over the supervised tokens of a batch."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from typing_extensions import override

from lightning_qlora.kernels.attention import packed_attention_arguments
from lightning_qlora.losses.cross_entropy import TokenLoss, head_cross_entropy
from lightning_qlora.model import base_model
from lightning_qlora.modules.base import CausalLMModule
from lightning_qlora.schema import SFTBatch

__all__ = ["MeanPerplexity", "SFTModule"]

Stage = Literal["train", "val", "test"]


class MeanPerplexity(MeanMetric):
    """``exp`` of the mean cross-entropy in nats, weighted by tokens."""

    @override
    def compute(self) -> Tensor:
        return super().compute().exp()


class _Head(nn.Module):
    """The output embedding with the model's own softcap, as one function from hidden states to logits."""

    def __init__(self, output_embeddings: nn.Module, softcap: float | None) -> None:
        super().__init__()
        self.output_embeddings = output_embeddings
        self.softcap = softcap

    @override
    def forward(self, hidden_ND: Tensor) -> Tensor:
        logits_NV: Tensor = self.output_embeddings(hidden_ND)
        return logits_NV if self.softcap is None else self.softcap * torch.tanh(logits_NV / self.softcap)


class SFTModule(CausalLMModule):
    """Supervised fine-tuning of a 4-bit base with adapters.

    Logs ``train_loss`` at each optimizer step (exact over its micro-batches and ranks), and per epoch
    ``train_perplexity`` and ``train_token_accuracy``; ``val_loss``, ``val_perplexity`` and ``val_token_accuracy`` in
    validation, likewise ``test_...``. All are weighted by supervised tokens. Losses are in nats.
    """

    def __init__(self, model_name: str, **kwargs: Any) -> None:
        super().__init__(model_name, **kwargs)
        self._head: list[_Head] = []  # in a list, so that the head is not registered a second time
        # "disable": the check for NaN would wait for the device at every step, and the mean shows it anyway.
        self.metrics = nn.ModuleDict(
            {
                f"{stage}_": nn.ModuleDict(
                    {
                        "loss": MeanMetric(nan_strategy="disable"),
                        "perplexity": MeanPerplexity(nan_strategy="disable"),
                        "token_accuracy": MeanMetric(nan_strategy="disable"),
                    }
                )
                for stage in ("train", "val", "test")
            }
        )

    @override
    def on_model_built(self) -> None:
        assert self.model is not None
        base = base_model(self.model)
        head = _Head(base.get_output_embeddings(), getattr(base.config, "final_logit_softcapping", None))
        self._head = [head] if _head_is_plain(base, head) else []

    def token_loss(self, batch: SFTBatch) -> TokenLoss:
        """Sum of the cross-entropy over the supervised tokens of a packed or padded batch."""
        assert self.model is not None, "configure_model has not run"
        inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        if batch["attention_mask"] is not None:
            inputs["attention_mask"] = batch["attention_mask"]
        elif self.isolates_documents:
            inputs.update(packed_attention_arguments(batch["input_ids"], batch["document_lengths"]))
        base = base_model(self.model)
        positions_N, targets_N = batch["target_positions"], batch["targets"]
        if self._head:
            hidden_BLD = base.get_decoder()(**inputs, use_cache=False).last_hidden_state
            return head_cross_entropy(hidden_BLD.flatten(0, 1)[positions_N], self._head[0], targets_N)
        logits_BLV = self.model(**inputs, use_cache=False).logits
        return head_cross_entropy(logits_BLV.flatten(0, 1)[positions_N], nn.Identity(), targets_N)

    def _step(self, batch: SFTBatch, stage: Stage) -> TokenLoss:
        loss = self.token_loss(batch)
        metrics: Any = self.metrics[f"{stage}_"]
        if loss.num_tokens:
            mean = loss.loss_sum.detach() / loss.num_tokens
            for name, value in (
                ("loss", mean),
                ("perplexity", mean),
                ("token_accuracy", loss.num_correct / loss.num_tokens),
            ):
                metrics[name].update(value, weight=loss.num_tokens)
        for name, metric in metrics.items():
            if (stage, name) != ("train", "loss"):  # logged per optimizer step by the base class
                self.log(
                    f"{stage}_{name}", metric, on_step=False, on_epoch=True, prog_bar=(stage, name) == ("val", "loss")
                )
        return loss

    @override
    def training_step(self, batch: SFTBatch, batch_idx: int) -> Tensor:
        loss = self._step(batch, "train")
        self.count_tokens(loss.loss_sum, loss.num_tokens)
        return loss.loss_sum

    @override
    def validation_step(self, batch: SFTBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._step(batch, "val")

    @override
    def test_step(self, batch: SFTBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._step(batch, "test")


@torch.no_grad()
def _head_is_plain(base: Any, head: _Head) -> bool:
    """Whether this family's logits are just the head of the decoder's hidden states.

    Some families scale or offset their logits besides. Two tokens through both ways tell, for any family there will be.
    """
    ids_BL = torch.tensor([[0, 1]], device=head.output_embeddings.weight.device)  # type: ignore[arg-type]
    training = base.training
    base.eval()
    try:
        expected = base(input_ids=ids_BL, use_cache=False).logits
        found = head(base.get_decoder()(input_ids=ids_BL, use_cache=False).last_hidden_state)
    finally:
        base.train(training)
    return found.shape == expected.shape and torch.allclose(found.float(), expected.float(), rtol=1e-3, atol=1e-4)
