"""What modules that measure have in common: when metrics begin anew, and that a resumed epoch is measured whole."""

from __future__ import annotations

from typing import Any

import lightning as L
from typing_extensions import override

from lightning_qlora.modules.base import CHECKPOINT_KEY
from lightning_qlora.modules.metrics import StageMetrics

__all__ = ["Measured"]


class Measured(L.LightningModule):
    """Hooks for a module's metrics; it stands before :class:`CausalLMModule` among the bases of a class.

    Attributes:
        metrics: The metrics, which the class makes.
    """

    metrics: StageMetrics

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        self.metrics.start_training(self.trainer)

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        self.metrics.start("val")

    @override
    def on_test_start(self) -> None:
        self.metrics.start("test")

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[CHECKPOINT_KEY]["train_sums"] = self.metrics.sums_to_save(self.trainer)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.metrics.load_sums(checkpoint[CHECKPOINT_KEY].get("train_sums"))
