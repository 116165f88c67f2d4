"""QLoRA fine-tuning of causal language models as an ordinary PyTorch Lightning job."""

import logging
from importlib.metadata import version

# On CPUs with AVX512-BF16 bitsandbytes warns at import that an optional kernel from a hub is not installed. It serves
# inference in bfloat16, which is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda r: "gemm_4bit_forward" not in r.getMessage())

from lightning_qlora.callbacks import (  # noqa: E402
    AdapterCheckpoint,
    AnswerComparison,
    PerformanceMonitor,
    PredictionWriter,
    RunGuard,
    RunSummary,
)
from lightning_qlora.data import DataSource, SFTDataModule  # noqa: E402
from lightning_qlora.modules import CausalLMModule, SFTModule, WarmupCosine, WarmupLinear  # noqa: E402

__version__ = version("lightning_qlora")

__all__ = [
    "AdapterCheckpoint",
    "AnswerComparison",
    "CausalLMModule",
    "DataSource",
    "PerformanceMonitor",
    "PredictionWriter",
    "RunGuard",
    "RunSummary",
    "SFTDataModule",
    "SFTModule",
    "WarmupCosine",
    "WarmupLinear",
    "__version__",
]
