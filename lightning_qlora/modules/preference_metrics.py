"""What is measured of preferences, exact however the rows were cut into batches and dealt to ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from lightning_qlora.losses.preference import AnswerLogProbs, PreferenceLoss, PreferenceTerms
from lightning_qlora.modules.metrics import ExactMean, MeanDifference

__all__ = ["EpochLoss", "PreferenceMetrics"]


class EpochLoss(Metric):
    """The loss of all answers of an epoch at once, as if they had been one batch.

    A mean over batches would depend on the cut where a loss holds two averages (over pairs and over tokens), or an
    estimate that is shared by all answers (the divergence in KTO). A few numbers for each answer are kept instead.

    Args:
        loss: The loss.
    """

    full_state_update = False
    chosen: list[Tensor]
    rejected: list[Tensor]
    mismatched: list[Tensor]

    def __init__(self, loss: PreferenceLoss) -> None:
        super().__init__()
        self.loss = loss
        for name in ("chosen", "rejected", "mismatched"):
            self.add_state(name, [], dist_reduce_fx="cat")

    @override
    def update(self, chosen: AnswerLogProbs, rejected: AnswerLogProbs, mismatched: AnswerLogProbs) -> None:
        for state, answers in ((self.chosen, chosen), (self.rejected, rejected), (self.mismatched, mismatched)):
            reference = answers.policy.new_zeros(()) if answers.reference is None else answers.reference
            columns = answers.policy, reference.expand_as(answers.policy), answers.num_tokens
            state.append(torch.stack([column.detach() for column in columns], dim=1))

    @override
    def compute(self) -> Tensor:
        states = (self.chosen, self.rejected, self.mismatched)
        chosen, rejected, mismatched = (AnswerLogProbs(*dim_zero_cat(state).unbind(1)) for state in states)
        kl = mismatched.log_ratio.sum() / max(1, len(mismatched.policy)) if self.loss.needs_kl else None
        terms = self.loss(chosen, rejected, kl)
        loss = terms.loss_sum / terms.num_terms
        if self.loss.nll_weight:
            loss = loss - self.loss.nll_weight * chosen.policy.sum() / chosen.num_tokens.sum()
        return loss


class PreferenceMetrics(nn.ModuleDict):
    """The metrics of one stage by their names: means over pairs, over answers, or over tokens.

    Args:
        loss: The loss, which decides what there is to measure.
        with_loss: Whether to measure the loss too; in training it is logged for each optimizer step.
    """

    def __init__(self, loss: PreferenceLoss, *, with_loss: bool) -> None:
        means = ["reward_chosen", "reward_rejected", "reward_accuracy", "log_prob_chosen", "log_prob_rejected", "nll"]
        means += ["kl"] if loss.needs_reference else []
        means += ["longer_chosen"] if loss.is_paired else []
        metrics: dict[str, Metric] = {"loss": EpochLoss(loss)} if with_loss else {}
        metrics |= {"reward_margin": MeanDifference(), "length_difference": MeanDifference()}
        super().__init__(metrics | {name: ExactMean() for name in means})

    @torch.no_grad()
    def add_batch(
        self, terms: PreferenceTerms, chosen: AnswerLogProbs, rejected: AnswerLogProbs, mismatched: AnswerLogProbs
    ) -> None:
        """Measure a batch."""
        metrics: Any = self
        if "loss" in self:
            metrics["loss"].update(chosen, rejected, mismatched)
        metrics["reward_margin"].update(terms.reward_chosen, terms.reward_rejected)
        metrics["length_difference"].update(chosen.num_tokens, rejected.num_tokens)
        means = {
            "reward_chosen": terms.reward_chosen,
            "reward_rejected": terms.reward_rejected,
            "reward_accuracy": terms.correct.float(),
            "log_prob_chosen": chosen.policy,
            "log_prob_rejected": rejected.policy,
        }
        if "kl" in self:
            # Pairs hold no mismatched answers; their own then stand for what the model might say.
            answers = [mismatched] if len(mismatched.policy) else [chosen, rejected]
            means["kl"] = torch.cat([side.log_ratio for side in answers])
        if "longer_chosen" in self:
            means["longer_chosen"] = (chosen.num_tokens > rejected.num_tokens).float()
        for name, values in means.items():
            metrics[name].update(values.sum(), len(values))
        metrics["nll"].update(-chosen.policy.sum(), chosen.num_tokens.sum())
