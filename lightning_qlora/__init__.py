"""QLoRA fine-tuning of causal language models as an ordinary PyTorch Lightning job."""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_qlora.callbacks import (
        AdapterCheckpoint,
        AnswerComparison,
        PerformanceMonitor,
        PredictionWriter,
        RunGuard,
        RunSummary,
    )
    from lightning_qlora.data import DataSource, PreferenceDataModule, SFTDataModule
    from lightning_qlora.losses import (
        CPOLoss,
        DPOLoss,
        HingeLoss,
        IPOLoss,
        KTOLoss,
        ORPOLoss,
        RobustDPOLoss,
        SimPOLoss,
    )
    from lightning_qlora.modules import CausalLMModule, PreferenceModule, SFTModule, WarmupCosine, WarmupLinear

__version__ = version("lightning_qlora")

__all__ = [
    "AdapterCheckpoint",
    "AnswerComparison",
    "CPOLoss",
    "CausalLMModule",
    "DPOLoss",
    "DataSource",
    "HingeLoss",
    "IPOLoss",
    "KTOLoss",
    "ORPOLoss",
    "PerformanceMonitor",
    "PredictionWriter",
    "PreferenceDataModule",
    "PreferenceModule",
    "RobustDPOLoss",
    "RunGuard",
    "RunSummary",
    "SFTDataModule",
    "SFTModule",
    "SimPOLoss",
    "WarmupCosine",
    "WarmupLinear",
    "__version__",
]

_ROOMS = {
    "callbacks": (
        "AdapterCheckpoint",
        "AnswerComparison",
        "PerformanceMonitor",
        "PredictionWriter",
        "RunGuard",
        "RunSummary",
    ),
    "data": ("DataSource", "PreferenceDataModule", "SFTDataModule"),
    "losses": (
        "CPOLoss",
        "DPOLoss",
        "HingeLoss",
        "IPOLoss",
        "KTOLoss",
        "ORPOLoss",
        "RobustDPOLoss",
        "SimPOLoss",
    ),
    "modules": ("CausalLMModule", "PreferenceModule", "SFTModule", "WarmupCosine", "WarmupLinear"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

# On CPUs with AVX512-BF16 bitsandbytes warns at import that an optional kernel from a hub is not installed. It serves
# inference in bfloat16, which is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda r: "gemm_4bit_forward" not in r.getMessage())


def __getattr__(name: str) -> Any:
    """Import a public name's room when it is first asked for, so that the light rooms can be used without torch."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
