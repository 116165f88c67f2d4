"""Which strategies compute the step of one device, and what to write instead of the others."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_qlora.strategies.sharding import ShardsModel

__all__ = ["check_is_sharded", "check_strategy", "default_strategy"]

_INSTEAD = (
    "Write --trainer.strategy=ddp where one device holds the base, and --trainer.strategy=fsdp_qlora where none does."
)


def check_strategy(strategy: Strategy) -> None:
    """Refuse a strategy under which training would be wrong, or is not known to be right.

    Raises:
        MisconfigurationException: With the reason and what to write instead.
    """
    if isinstance(strategy, FSDPStrategy):
        raise MisconfigurationException(
            "FSDPStrategy (FSDP1) flattens all weights of a layer into one tensor of one floating dtype; packed 4-bit "
            f"weights are integers, norms have 16 bits, and adapters 32. {_INSTEAD}"
        )
    if isinstance(strategy, DeepSpeedStrategy):
        raise MisconfigurationException(_why_not_deepspeed(strategy))
    if isinstance(strategy, ModelParallelStrategy):
        if strategy._tensor_parallel_size != 1:
            raise MisconfigurationException(
                f"ModelParallelStrategy has tensor_parallel_size={strategy._tensor_parallel_size!r}. Tensor "
                "parallelism cuts matrices by rows and columns, and packed 4-bit weights have neither. Write "
                "tensor_parallel_size: 1, or --trainer.strategy=fsdp_qlora."
            )
        if getattr(strategy.precision_plugin, "scaler", None) is not None:
            raise MisconfigurationException(
                "precision 16-mixed scales the loss, and Lightning does not do that with sharded gradients. Write "
                "--trainer.precision=bf16-mixed, or 32-true where the hardware has no bfloat16."
            )
        return
    if not isinstance(strategy, DDPStrategy | SingleDeviceStrategy):
        raise MisconfigurationException(
            f"{type(strategy).__name__} has not been shown to take the step of one device with a 4-bit base. {_INSTEAD}"
        )


def _why_not_deepspeed(strategy: DeepSpeedStrategy) -> str:
    config = strategy.config if isinstance(strategy.config, dict) else {}
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage == 3:
        return (
            "DeepSpeedStrategy with ZeRO stage 3 parts parameters without the constants of their 4-bit quantisation. "
            "Write --trainer.strategy=fsdp_qlora, which parts 4-bit weights."
        )
    return (
        f"DeepSpeedStrategy (ZeRO stage {stage}) takes each gradient, as soon as it is computed, into an engine of its "
        "own that clips and applies it. None is left to be divided by the tokens of the whole optimizer step before it "
        "is clipped: a step would follow the sum of losses, not their mean. Stages 1 and 2 would save the optimizer "
        "state of adapters only, which is small. Write --trainer.strategy=ddp."
    )


def check_is_sharded(strategy: Strategy, trained: Iterable[Tensor]) -> None:
    """Make sure that a strategy which leaves the cutting to the module has been given parts.

    Lightning's ModelParallelStrategy reduces no gradients by itself: whole models would drift apart, rank by rank.
    """
    if not isinstance(strategy, ModelParallelStrategy) or isinstance(strategy, ShardsModel):
        return
    if not all(isinstance(parameter, DTensor) for parameter in trained):
        raise MisconfigurationException(
            "ModelParallelStrategy leaves sharding to the module, and this one's trained tensors are whole: each rank "
            "would train by itself. Write --trainer.strategy=fsdp_qlora, which shards them."
        )


def default_strategy(
    strategy: str | Strategy, *, accelerator: object, devices: int | str | list[int], num_nodes: int
) -> str | Strategy:
    """Return what a plain name is to mean: QLoRADDPStrategy for ``ddp``, and for ``auto`` on several devices.

    Args:
        strategy: As given to the Trainer; anything but these two names is the user's own choice.
        accelerator: As given to the Trainer.
        devices: As given to the Trainer.
        num_nodes: Hosts.
    """
    if strategy == "ddp":
        return "ddp_qlora"
    if strategy != "auto" or not isinstance(accelerator, str):
        return strategy
    on_gpu = torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda")
    if not on_gpu and accelerator not in ("auto", "cpu"):
        return strategy
    return "ddp_qlora" if num_nodes * _count(on_gpu, devices) > 1 else strategy


def _count(on_gpu: bool, devices: int | str | list[int]) -> int:
    """Return how many devices of this host Lightning will take."""
    if devices == "auto":
        return CUDAAccelerator.auto_device_count() if on_gpu else 1
    if on_gpu:
        return len(CUDAAccelerator.parse_devices(devices) or ())
    return CPUAccelerator.parse_devices(devices) if isinstance(devices, int | str) else len(devices)
