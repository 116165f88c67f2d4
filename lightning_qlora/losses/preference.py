"""Losses on the log-probabilities of answers that were preferred and answers that lost.

In the equations x is a prompt, y_w the preferred (chosen) and y_l the losing (rejected) answer, |y| the number of an
answer's tokens, pi the model, pi_ref the reference, s the logistic function, and

    r(y) = log pi(y|x) - log pi_ref(y|x),    h = r(y_w) - r(y_l).

Each loss is summed over pairs, to be divided by the pairs of the whole optimizer step.

An option has one meaning and one default wherever its name occurs (save for SimPO's beta), because the command line
keeps options when one class is written over another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

__all__ = [
    "AnswerLogProbs",
    "CPOLoss",
    "DPOLoss",
    "HingeLoss",
    "IPOLoss",
    "KTOLoss",
    "ORPOLoss",
    "PairLoss",
    "PreferenceLoss",
    "PreferenceTerms",
    "RobustDPOLoss",
    "SimPOLoss",
]

_HIGHEST_MEAN_LOG_PROB = -1e-6  # an answer that is certain has infinite odds


class AnswerLogProbs(NamedTuple):
    """Log-probabilities of A answers, in nats.

    Attributes:
        policy: (A,) float32, log pi(y|x): the sum over each answer's tokens, under the model that is trained.
        reference: (A,) float32, log pi_ref(y|x); ``None`` for a loss that needs no reference.
        num_tokens: (A,) float32, |y|.
    """

    policy: Tensor
    reference: Tensor | None
    num_tokens: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """(A,) r(y) = log pi(y|x) - log pi_ref(y|x)."""
        assert self.reference is not None, "this loss has needs_reference set"
        return self.policy - self.reference

    @property
    def mean(self) -> Tensor:
        """(A,) log pi(y|x) / |y|: per token."""
        return self.policy / self._lengths

    @property
    def mean_log_ratio(self) -> Tensor:
        """(A,) r(y) / |y|: per token."""
        return self.log_ratio / self._lengths

    @property
    def _lengths(self) -> Tensor:
        return self.num_tokens.clamp(min=1.0)


class PreferenceTerms(NamedTuple):
    """What a loss makes of a batch.

    Attributes:
        loss_sum: () float32, differentiable: the sum over pairs, or over unpaired answers.
        num_terms: How many that are, on the host.
        correct: One bool for each term: the chosen answer's reward is the higher one; unpaired, it is on the right
            side of the point of reference.
        reward_chosen: (P,) the implicit rewards of the preferred answers, without gradient.
        reward_rejected: (Q,) those of the answers that lost; Q = P for pairs.
    """

    loss_sum: Tensor
    num_terms: int
    correct: Tensor
    reward_chosen: Tensor
    reward_rejected: Tensor


class PreferenceLoss(ABC):
    """A loss on the log-probabilities of answers.

    Attributes:
        needs_reference: Whether it compares the model with a reference.
        needs_kl: Whether it needs an estimate of their divergence, from mismatched answers.
        is_paired: Whether each chosen answer stands against a rejected one of the same prompt.
        beta: Scale of the rewards.
    """

    needs_reference: ClassVar[bool] = True
    needs_kl: ClassVar[bool] = False
    is_paired: ClassVar[bool] = True
    beta: float

    @property
    def nll_weight(self) -> float:
        """Weight of the negative log-likelihood of the chosen answers per token, which is added to the loss."""
        return 0.0

    @abstractmethod
    def __call__(self, chosen: AnswerLogProbs, rejected: AnswerLogProbs, kl: Tensor | None = None) -> PreferenceTerms:
        """Sum the loss over a batch, without the part that ``nll_weight`` weighs.

        Args:
            chosen: The P preferred answers.
            rejected: The answers that lost, pair by pair; Q of them where the loss is not paired.
            kl: () the divergence of the model from the reference, for a loss with ``needs_kl``.
        """

    def reward(self, answers: AnswerLogProbs) -> Tensor:
        """Return the (A,) implicit rewards of answers: ``beta r(y)`` where there is a reference."""
        return self.beta * answers.log_ratio


class PairLoss(PreferenceLoss):
    """A loss that weighs the two answers of a pair against each other."""

    @override
    def __call__(self, chosen: AnswerLogProbs, rejected: AnswerLogProbs, kl: Tensor | None = None) -> PreferenceTerms:
        losses_P = self.pair_losses(chosen, rejected)
        reward_chosen, reward_rejected = self.reward(chosen).detach(), self.reward(rejected).detach()
        correct_P = reward_chosen > reward_rejected
        return PreferenceTerms(losses_P.sum(), len(losses_P), correct_P, reward_chosen, reward_rejected)

    @abstractmethod
    def pair_losses(self, chosen: AnswerLogProbs, rejected: AnswerLogProbs) -> Tensor:
        """Return the (P,) losses of the pairs."""


@dataclass(frozen=True)
class DPOLoss(PairLoss):
    """Direct preference optimisation: ``-(1 - e) log s(beta h) - e log s(-beta h)``.

    DPO (arXiv:2305.18290, eq. 7) with e = 0; with e > 0 its conservative form cDPO (Mitchell, "A note on DPO with
    noisy preferences", 2023).

    Args:
        beta: How strongly the model is held to the reference.
        label_smoothing: e, the share of pairs whose labels are taken to be swapped, below 0.5.
        rpo_alpha: Weight of the chosen answers' likelihood per token, added as in RPO (arXiv:2404.19733).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    rpo_alpha: float = 0.0

    def __post_init__(self) -> None:
        _check(self.beta, self.label_smoothing, self.rpo_alpha)

    @property
    @override
    def nll_weight(self) -> float:
        return self.rpo_alpha

    @override
    def pair_losses(self, chosen: AnswerLogProbs, rejected: AnswerLogProbs) -> Tensor:
        return _smoothed(self.beta * (chosen.log_ratio - rejected.log_ratio), self.label_smoothing)


@dataclass(frozen=True)
class RobustDPOLoss(PairLoss):
    """Robust DPO: ``(-(1 - e) log s(beta h) + e log s(-beta h)) / (1 - 2 e)``, unbiased under swapped labels.

    arXiv:2403.00409.

    Args:
        beta: How strongly the model is held to the reference.
        flipped_labels: e, the share of pairs whose labels are swapped, below 0.5.
    """

    beta: float = 0.1
    flipped_labels: float = 0.1

    def __post_init__(self) -> None:
        _check(self.beta, flipped_labels=self.flipped_labels)

    @override
    def pair_losses(self, chosen: AnswerLogProbs, rejected: AnswerLogProbs) -> Tensor:
        logits, e = self.beta * (chosen.log_ratio - rejected.log_ratio), self.flipped_labels
        return (e * functional.logsigmoid(-logits) - (1 - e) * functional.logsigmoid(logits)) / (1 - 2 * e)


@dataclass(frozen=True)
class IPOLoss(PairLoss):
    """Identity preference optimisation: ``(r(y_w) / |y_w| - r(y_l) / |y_l| - 1 / (2 beta))^2``.

    arXiv:2310.12036, eq. 17, with the log-ratios per token, as its authors use it
    (https://github.com/huggingface/trl/pull/1265).

    Args:
        beta: tau of the paper: how strongly the model is held to the reference.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        _check(self.beta)

    @override
    def pair_losses(self, chosen: AnswerLogProbs, rejected: AnswerLogProbs) -> Tensor:
        return (chosen.mean_log_ratio - rejected.mean_log_ratio - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class HingeLoss(PairLoss):
    """Sequence likelihood calibration on log-ratios: ``max(0, 1 - beta h)``.

    SLiC (arXiv:2305.10425) in the normalised form of RSO (arXiv:2309.06657).

    Args:
        beta: Reciprocal of the margin.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        _check(self.beta)

    @override
    def pair_losses(self, chosen: AnswerLogProbs, rejected: AnswerLogProbs) -> Tensor:
        return torch.relu(1 - self.beta * (chosen.log_ratio - rejected.log_ratio))


@dataclass(frozen=True)
class ORPOLoss(PairLoss):
    """Odds ratio preference optimisation: ``NLL(y_w) - beta log s(log odds(y_w) - log odds(y_l))``; no reference.

    arXiv:2403.07691, eq. 4, 6 and 7, with ``odds(y) = p / (1 - p)`` and ``log p = log pi(y|x) / |y|``. The NLL is that
    of the chosen answers per token; prompts are not part of it.

    Args:
        beta: lambda of the paper: weight of the odds ratio.
        likelihood_weight: Weight of the chosen answers' likelihood; 1 in the paper.
    """

    needs_reference: ClassVar[bool] = False
    beta: float = 0.1
    likelihood_weight: float = 1.0

    def __post_init__(self) -> None:
        _check(self.beta, weight=self.likelihood_weight)

    @property
    @override
    def nll_weight(self) -> float:
        return self.likelihood_weight

    @override
    def pair_losses(self, chosen: AnswerLogProbs, rejected: AnswerLogProbs) -> Tensor:
        return -self.beta * functional.logsigmoid(_log_odds(chosen.mean) - _log_odds(rejected.mean))

    @override
    def reward(self, answers: AnswerLogProbs) -> Tensor:
        return self.beta * answers.mean


@dataclass(frozen=True)
class SimPOLoss(PairLoss):
    """Simple preference optimisation: ``-log s(beta (log pi(y_w|x) / |y_w| - log pi(y_l|x) / |y_l|) - gamma)``.

    arXiv:2405.14734, eq. 6; no reference.

    Args:
        beta: Scale of the rewards; much higher than the beta of the other losses, since rewards are per token.
        gamma: Margin by which the chosen answer's reward is to lead.
    """

    needs_reference: ClassVar[bool] = False
    beta: float = 2.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        _check(self.beta)

    @override
    def pair_losses(self, chosen: AnswerLogProbs, rejected: AnswerLogProbs) -> Tensor:
        return -functional.logsigmoid(self.beta * (chosen.mean - rejected.mean) - self.gamma)

    @override
    def reward(self, answers: AnswerLogProbs) -> Tensor:
        return self.beta * answers.mean


@dataclass(frozen=True)
class CPOLoss(PairLoss):
    """Contrastive preference optimisation: ``NLL(y_w) - log s(beta (log pi(y_w|x) - log pi(y_l|x)))``; no reference.

    arXiv:2401.08417, eq. 3, smoothed like cDPO. The NLL is that of the chosen answers per token.

    Args:
        beta: Scale of the rewards.
        label_smoothing: Share of pairs whose labels are taken to be swapped, below 0.5.
        likelihood_weight: Weight of the chosen answers' likelihood; 1 in the paper.
    """

    needs_reference: ClassVar[bool] = False
    beta: float = 0.1
    label_smoothing: float = 0.0
    likelihood_weight: float = 1.0

    def __post_init__(self) -> None:
        _check(self.beta, self.label_smoothing, self.likelihood_weight)

    @property
    @override
    def nll_weight(self) -> float:
        return self.likelihood_weight

    @override
    def pair_losses(self, chosen: AnswerLogProbs, rejected: AnswerLogProbs) -> Tensor:
        return _smoothed(self.beta * (chosen.policy - rejected.policy), self.label_smoothing)

    @override
    def reward(self, answers: AnswerLogProbs) -> Tensor:
        return self.beta * answers.policy


@dataclass(frozen=True)
class KTOLoss(PreferenceLoss):
    """Kahneman-Tversky optimisation, of single answers that are desirable or not.

    A desirable answer costs ``w_d (1 - s(beta (r(y) - z)))``, an undesirable one ``w_u (1 - s(beta (z - r(y))))``;
    z, the divergence of the model from the reference, is not negative and carries no gradient (arXiv:2402.01306,
    eq. 7 and 8).

    Args:
        beta: How fast the value saturates.
        desirable_weight: w_d. The paper advises ``w_d n_d / (w_u n_u)`` from 1 to 4/3 for n_d desirable and n_u
            undesirable answers.
        undesirable_weight: w_u.
    """

    needs_kl: ClassVar[bool] = True
    is_paired: ClassVar[bool] = False
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        _check(self.beta)
        if min(self.desirable_weight, self.undesirable_weight) < 0:
            raise ValueError(
                f"The weights are {self.desirable_weight} and {self.undesirable_weight}; write numbers from 0."
            )

    @override
    def __call__(self, chosen: AnswerLogProbs, rejected: AnswerLogProbs, kl: Tensor | None = None) -> PreferenceTerms:
        assert kl is not None, "this loss has needs_kl set"
        z = kl.detach().clamp(min=0.0)
        desirable_P = torch.sigmoid(self.beta * (z - chosen.log_ratio))  # 1 - s(t) = s(-t)
        undesirable_Q = torch.sigmoid(self.beta * (rejected.log_ratio - z))
        loss_sum = self.desirable_weight * desirable_P.sum() + self.undesirable_weight * undesirable_Q.sum()
        correct = torch.cat([chosen.log_ratio > z, rejected.log_ratio < z])
        rewards = self.reward(chosen).detach(), self.reward(rejected).detach()
        return PreferenceTerms(loss_sum, len(correct), correct, *rewards)


def _smoothed(logits_P: Tensor, label_smoothing: float) -> Tensor:
    """Binary cross-entropy of "the chosen answer won" against a label of ``1 - label_smoothing``."""
    losses_P = -functional.logsigmoid(logits_P) * (1 - label_smoothing)
    return losses_P - functional.logsigmoid(-logits_P) * label_smoothing if label_smoothing else losses_P


def _log_odds(mean_log_prob_P: Tensor) -> Tensor:
    """``log (p / (1 - p))`` of ``p = exp(mean_log_prob)``; gradients stay finite where p is rounded to 1."""
    log_p = mean_log_prob_P.clamp(max=_HIGHEST_MEAN_LOG_PROB)
    return log_p - torch.log(-torch.expm1(log_p))


def _check(beta: float, label_smoothing: float = 0.0, weight: float = 0.0, flipped_labels: float = 0.0) -> None:
    if not beta > 0:
        raise ValueError(f"beta is {beta}; write a number above 0.")
    for name, share in (("label_smoothing", label_smoothing), ("flipped_labels", flipped_labels)):
        if not 0 <= share < 0.5:
            raise ValueError(f"{name} is {share}; write a share from 0 to below 0.5.")
    if weight < 0:
        raise ValueError(f"The weight of the likelihood is {weight}; write a number from 0.")
