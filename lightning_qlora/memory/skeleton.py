"""A model without its weights: every shape, dtype and class of the real one, on torch's meta device."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import HfQuantizer

from lightning_qlora.kernels.elementwise import fuse_elementwise, has_fused_parts
from lightning_qlora.kernels.lora import fuse_lora, is_fused
from lightning_qlora.model import Quantization, attach_adapters, resolve_quantization

__all__ = ["build_base_skeleton", "build_skeleton", "skeleton_of"]

META = torch.device("meta")

_CODE_SIZE = 16  # values of a 4-bit data type
_NESTED_BLOCK = 256  # first-level constants that share a second-level one
_DYNAMIC_CODE_SIZE = 256  # values of the 8-bit data type that the constants are rounded to


def build_skeleton(
    config: PretrainedConfig,
    lora: PeftConfig,
    *,
    quantization: Quantization = "nf4",
    dtype: torch.dtype = torch.bfloat16,
    trust_remote_code: bool = False,
) -> PeftModel:
    """Build what :func:`lightning_qlora.model.load_base_model` and ``attach_adapters`` would, without any data.

    Nothing is read but the configuration, and nothing is allocated: parameters know their shape, dtype and, where
    they are quantised, the constants that bitsandbytes would store with them.

    Args:
        config: Of the base.
        lora: PEFT's adapter configuration. An initialisation that reads the weights is replaced by the plain one,
            which has the same shapes.
        quantization: How the linear layers are stored.
        dtype: Of everything that is not quantised, and of the products.
        trust_remote_code: Whether the configuration's own Python code may run.
    """
    base = build_base_skeleton(config, quantization=quantization, dtype=dtype, trust_remote_code=trust_remote_code)
    lora = copy.deepcopy(lora)
    if isinstance(lora, LoraConfig):
        lora.init_lora_weights = False
        lora.loftq_config = {}
    with META, warnings.catch_warnings():
        # PEFT has said it when the model itself was built.
        warnings.filterwarnings("ignore", message=".*did not match any targeted module")
        return attach_adapters(base, lora)


def build_base_skeleton(
    config: PretrainedConfig,
    *,
    quantization: Quantization = "nf4",
    dtype: torch.dtype = torch.bfloat16,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Build the frozen base alone, as in :func:`build_skeleton`."""
    config = copy.deepcopy(config)
    options = resolve_quantization(quantization, dtype)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with META:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        if options is not None:
            _quantise(model, options, dtype)
    model.requires_grad_(False)
    return model  # type: ignore[no-any-return]


def skeleton_of(model: PeftModel) -> PeftModel:
    """Build the skeleton of a model that is loaded."""
    base: Any = model.get_base_model()
    config = copy.deepcopy(base.config)
    quantization = getattr(config, "quantization_config", None)
    if not isinstance(quantization, BitsAndBytesConfig):
        quantization = None
    skeleton = build_skeleton(config, model.active_peft_config, quantization=quantization, dtype=base.dtype)
    if is_fused(model):
        fuse_lora(skeleton)
    if has_fused_parts(model):
        fuse_elementwise(skeleton)
    return skeleton


def _quantise(model: Any, options: BitsAndBytesConfig, dtype: torch.dtype) -> None:
    """Put bitsandbytes' layers where transformers would, holding what they would hold after loading."""
    skipped = HfQuantizer.get_modules_to_not_convert(model, options.llm_int8_skip_modules, model._keep_in_fp32_modules)
    options = copy.copy(options)
    options.bnb_4bit_compute_dtype = dtype
    replace_with_bnb_linear(model, skipped, options)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None and _is_quantised(module):
            module.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)
        if isinstance(module, Linear4bit):
            module.weight = _four_bit_weight(module, options, dtype)
            module.quant_state = module.weight.quant_state
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, Linear8bitLt):
            module.weight = _eight_bit_weight(module)
    model.config.quantization_config = options
    model.is_quantized = True
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = options.load_in_4bit, options.load_in_8bit


def _is_quantised(module: nn.Module) -> bool:
    return isinstance(module, Linear4bit | Linear8bitLt)


def _four_bit_weight(module: Linear4bit, options: BitsAndBytesConfig, dtype: torch.dtype) -> Params4bit:
    """Lay a weight out as bitsandbytes stores it: two values a byte, one constant a block, perhaps quantised too."""
    weight: Any = module.weight
    shape, blocksize, storage = weight.shape, weight.blocksize, options.bnb_4bit_quant_storage
    numel = shape.numel()
    blocks = -(numel // -blocksize)
    nested = options.bnb_4bit_use_double_quant
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32),
        shape=shape,
        code=torch.empty(_CODE_SIZE, dtype=torch.float32),
        blocksize=blocksize,
        quant_type=options.bnb_4bit_quant_type,
        dtype=dtype,
        offset=torch.empty((), dtype=torch.float32) if nested else None,
        state2=QuantState(
            absmax=torch.empty(-(blocks // -_NESTED_BLOCK), dtype=torch.float32),
            code=torch.empty(_DYNAMIC_CODE_SIZE, dtype=torch.float32),
            blocksize=_NESTED_BLOCK,
            dtype=torch.float32,
        )
        if nested
        else None,
    )
    packed = torch.empty(((numel + 1) // (2 * storage.itemsize), 1), dtype=storage)
    return Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=blocksize,
        compress_statistics=nested,
        quant_type=options.bnb_4bit_quant_type,
        quant_storage=storage,
        module=module,
        bnb_quantized=True,
    )


def _eight_bit_weight(module: Linear8bitLt) -> Int8Params:
    """LLM.int8(): a byte a value and a scale a row."""
    shape = module.weight.shape
    scales = torch.empty(shape[0], dtype=torch.float32)
    return Int8Params(torch.empty(shape, dtype=torch.int8), requires_grad=False, SCB=scales)
