"""What llama.cpp needs to know of each model family: its name there, its sizes, and how its tensors lie."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType, get_tensor_name_map
from torch import Tensor
from transformers import PretrainedConfig

__all__ = ["Architecture", "TensorTarget"]

_ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "gemma2": MODEL_ARCH.GEMMA2,
    "gemma3_text": MODEL_ARCH.GEMMA3,
}
_ACTIVATIONS = {"silu", "swish", "gelu_pytorch_tanh"}
_GEMMA = (MODEL_ARCH.GEMMA2, MODEL_ARCH.GEMMA3)
# Of every how many layers llama.cpp lets the last one see the whole context.
_FULL_ATTENTION_EVERY = {MODEL_ARCH.GEMMA2: 2, MODEL_ARCH.GEMMA3: 6}


class TensorTarget(NamedTuple):
    """Where a tensor of the model goes.

    Attributes:
        name: In the GGUF file.
        num_heads: Into how many heads its rows are regrouped; ``None`` to leave them as they are.
        offset: What is added to each value.
    """

    name: str
    num_heads: int | None = None
    offset: float = 0.0

    def apply(self, tensor: Tensor) -> Tensor:
        """Bring a tensor (or the rows of a LoRA's B) into llama.cpp's order."""
        if self.num_heads is not None:
            # transformers rotates the first half of a head against the second, llama.cpp each value against the next.
            halves = tensor.reshape(self.num_heads, 2, tensor.shape[0] // self.num_heads // 2, *tensor.shape[1:])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        return tensor + self.offset if self.offset else tensor


class Architecture:
    """A model's place in llama.cpp.

    Args:
        config: The model's configuration.

    Raises:
        ValueError: If llama.cpp computes something else than this configuration asks for.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        if config.model_type not in _ARCHITECTURES:
            raise ValueError(
                f"{config.model_type} models are not written as GGUF here; {', '.join(_ARCHITECTURES)} are. The merged "
                "folder is what llama.cpp's own convert_hf_to_gguf.py takes."
            )
        self.config: Any = config
        self.kind = _ARCHITECTURES[config.model_type]
        self.name: str = MODEL_ARCH_NAMES[self.kind]
        self._names = get_tensor_name_map(self.kind, config.num_hidden_layers)
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._rope = _rope_parameters(config)
        self._check()

    def _check(self) -> None:
        config = self.config
        activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
        if activation not in _ACTIVATIONS or (self.kind in _GEMMA) != (activation == "gelu_pytorch_tanh"):
            raise ValueError(f"llama.cpp's {self.name} models do not compute the activation {activation!r}.")
        if self._rope["rope_type"] not in ("default", "llama3", "linear"):
            raise ValueError(
                f"rope_type is {self._rope['rope_type']!r}; default, linear and llama3 are written here. llama.cpp's "
                "own convert_hf_to_gguf.py takes the merged folder."
            )
        if self.kind not in _GEMMA:
            return
        if config.query_pre_attn_scalar != self.head_dim:
            raise ValueError(
                f"query_pre_attn_scalar is {config.query_pre_attn_scalar} and the heads have {self.head_dim} values: "
                "llama.cpp scales by the latter in models of this size."
            )
        every = _FULL_ATTENTION_EVERY[self.kind]
        expected = [
            "full_attention" if (layer + 1) % every == 0 else "sliding_attention"
            for layer in range(config.num_hidden_layers)
        ]
        if list(config.layer_types) != expected:
            raise ValueError(f"llama.cpp's {self.name} models see the whole context in every {every}th layer only.")

    def write_sizes(self, writer: GGUFWriter) -> None:
        """Write the model's sizes and constants."""
        config = self.config
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_rope_freq_base(self._rope["rope_theta"])
        if self._rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(self._rope["factor"])
        if self.kind in _GEMMA:
            writer.add_sliding_window(config.sliding_window)
            if config.attn_logit_softcapping:
                writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            if config.final_logit_softcapping:
                writer.add_final_logit_softcapping(config.final_logit_softcapping)

    def target(self, name: str) -> TensorTarget | None:
        """Say where a tensor goes; ``None`` for one that llama.cpp computes by itself.

        Raises:
            ValueError: If llama.cpp's model has no such tensor.
        """
        if name.endswith((".rotary_emb.inv_freq", ".embed_scale")):
            return None
        if self.kind in _GEMMA and name == "lm_head.weight":
            raise ValueError(f"llama.cpp's {self.name} models have no head of their own, and this one is not tied.")
        found = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"llama.cpp's {self.name} models have no tensor for {name!r}.")
        heads = None
        if self.kind == MODEL_ARCH.LLAMA and re.search(r"\.[qk]_proj\.(weight|bias)$", name):
            heads = self.config.num_attention_heads if ".q_proj." in name else self.config.num_key_value_heads
        return TensorTarget(found, heads, 1.0 if self.kind in _GEMMA and name.endswith("norm.weight") else 0.0)

    def rope_factors(self) -> Tensor | None:
        """By what each pair's frequency is divided, (head_dim / 2,); ``None`` where all are taken as they are.

        Llama 3.1 stretches low frequencies and keeps high ones (transformers' ``rope_type: llama3``).
        """
        if self._rope["rope_type"] != "llama3":
            return None
        rope = self._rope
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        wavelengths = 2 * math.pi * rope["rope_theta"] ** exponents
        context, factor = rope["original_max_position_embeddings"], rope["factor"]
        low, high = context / rope["low_freq_factor"], context / rope["high_freq_factor"]
        kept = (context / wavelengths - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        between = 1 / ((1 - kept) / factor + kept)
        factors = torch.where(wavelengths < high, 1.0, torch.where(wavelengths > low, float(factor), between))
        return factors.float()


def _rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    if "full_attention" in parameters:  # one set for each kind of layer; llama.cpp has constants for the sliding one
        sliding, parameters = parameters.get("sliding_attention") or {}, dict(parameters["full_attention"])
        if sliding.get("rope_theta", 10_000.0) != 10_000.0:
            raise ValueError(f"llama.cpp takes 10000 for rope_theta of sliding layers; found {sliding['rope_theta']}.")
    return {"rope_type": "default", "rope_theta": 10_000.0, **parameters}
