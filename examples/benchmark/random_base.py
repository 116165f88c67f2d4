"""Bases with random NF4 weights, made layer by layer on the device that trains them; nothing is downloaded.

Speed and memory do not depend on the weights' values, but rounding does. In trained networks each layer changes the
residual stream a little; where every branch is as large as what it is added to, a deep network magnifies the rounding
of bfloat16 from layer to layer, whatever computes it. So the matrices that write into the stream are smaller than the
others by the square root of how many there are, as GPT-2's initialisation has them, and embeddings are as large as
normed states: otherwise even the small branches would soon be all of the stream.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from cases import SHAPES
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from lightning_qlora.memory import build_base_skeleton
from lightning_qlora.model import nf4

_STD = 0.02
_WRITERS = ("o_proj", "down_proj")


def random_base(shape: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return a frozen model of a shape with random 4-bit weights, as loading one would."""
    base: Any = build_base_skeleton(AutoConfig.for_model(**SHAPES[shape]), dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    writers = 2 * base.config.num_hidden_layers  # into the residual stream
    for name, module in list(base.named_modules()):
        std = _STD * writers**-0.5 if name.endswith(_WRITERS) else 1.0 if isinstance(module, nn.Embedding) else _STD
        _fill(module, std, device, dtype, generator)
    base.config.quantization_config = nf4(dtype)
    base.is_quantized = base.is_loaded_in_4bit = True
    return base  # type: ignore[no-any-return]


def _fill(module: nn.Module, std: float, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Give one module of a skeleton its own weights."""
    if isinstance(module, Linear4bit):
        shape = (module.out_features, module.in_features)
        weight = torch.empty(shape, dtype=dtype, device=device).normal_(0, std, generator=generator)
        module.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=module).to(device)
        module.quant_state = module.weight.quant_state
        return
    for name, parameter in module.named_parameters(recurse=False):
        value = torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
        if value.dim() > 1:
            value.normal_(0, std, generator=generator)
        setattr(module, name, nn.Parameter(value, requires_grad=False))
    if any(True for _ in module.buffers(recurse=False)):  # rotary frequencies, computed from the configuration
        fresh: Any = type(module)
        for name, buffer in fresh(module.config).named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
