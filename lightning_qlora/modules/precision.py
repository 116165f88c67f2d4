"""Which of Lightning's precisions QLoRA can train in, and what clipping means in them."""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, MixedPrecision, Precision
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_qlora.model import compute_dtype

__all__ = ["check_precision", "clip_gradients", "refuse_bitsandbytes_precision"]


def refuse_bitsandbytes_precision(*plugins: object) -> None:
    """Raise if Lightning's own quantisation is among the plugins."""
    if any(isinstance(plugin, BitsandbytesPrecision) for plugin in plugins):
        raise MisconfigurationException(
            "BitsandbytesPrecision quantises lora_A, lora_B and the head too and leaves nothing to train. Remove the "
            "plugin: the module's quantization option quantises the base. Write --trainer.precision=bf16-mixed."
        )


def check_precision(trainer: L.Trainer) -> None:
    """Refuse the precisions that break QLoRA before anything is loaded."""
    refuse_bitsandbytes_precision(trainer.precision_plugin)
    if str(trainer.precision).endswith("-true") and trainer.precision not in ("32-true", "64-true"):
        raise MisconfigurationException(
            f"precision {trainer.precision!r} would round the adapters to 16 bits, which loses about half of their "
            "updates. Write bf16-mixed (or 16-mixed on GPUs without bfloat16; 32-true on a CPU): the base stays 4-bit."
        )
    device = trainer.strategy.root_device
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(trainer.precision))
    if mixed is not None and device.type == "cpu" and compute_dtype(device) is not mixed:
        rank_zero_warn(f"precision {trainer.precision!r} on this CPU can be many times slower than 32-true.")


def clip_gradients(module: L.LightningModule, optimizer: Optimizer, value: float | None, algorithm: str | None) -> None:
    """Clip as ``LightningModule.clip_gradients`` does, and with a fused optimizer too where it undoes no loss scale.

    Args:
        module: In training.
        optimizer: Whose gradients.
        value: The bound; ``None`` or 0 for none.
        algorithm: ``norm`` or ``value``; ``None`` for ``norm``.
    """
    precision = module.trainer.precision_plugin
    if isinstance(precision, MixedPrecision) and precision.scaler is None:
        Precision.clip_gradients(precision, optimizer, value or 0.0, GradClipAlgorithmType(algorithm or "norm"))
        return
    undoes_loss_scale = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
    if value and isinstance(precision, MixedPrecision) and undoes_loss_scale:
        raise MisconfigurationException(
            "16-mixed precision, gradient_clip_val and a fused optimizer do not go together. Write "
            "--model.optimizer.fused=false, or --trainer.precision=bf16-mixed where the GPU has bfloat16."
        )
    module.clip_gradients(optimizer, value, algorithm)
