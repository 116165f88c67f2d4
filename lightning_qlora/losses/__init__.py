"""Losses return sums and counts; the module divides once per optimizer step."""

from lightning_qlora.losses.cross_entropy import TokenLoss, head_cross_entropy
from lightning_qlora.losses.log_probs import head_log_probs
from lightning_qlora.losses.preference import (
    AnswerLogProbs,
    CPOLoss,
    DPOLoss,
    HingeLoss,
    IPOLoss,
    KTOLoss,
    ORPOLoss,
    PairLoss,
    PreferenceLoss,
    PreferenceTerms,
    RobustDPOLoss,
    SimPOLoss,
)

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
    "TokenLoss",
    "head_cross_entropy",
    "head_log_probs",
]
