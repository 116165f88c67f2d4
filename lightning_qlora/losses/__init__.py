"""Losses return sums and counts; the module divides once per optimizer step."""

from lightning_qlora.losses.cross_entropy import TokenLoss, head_cross_entropy

__all__ = ["TokenLoss", "head_cross_entropy"]
