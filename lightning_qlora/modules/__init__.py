"""LightningModules: what a training step computes."""

from lightning_qlora.modules.base import CausalLMModule
from lightning_qlora.modules.lr_schedulers import WarmupCosine, WarmupLinear
from lightning_qlora.modules.preference import PreferenceModule
from lightning_qlora.modules.sft import SFTModule

__all__ = ["CausalLMModule", "PreferenceModule", "SFTModule", "WarmupCosine", "WarmupLinear"]
