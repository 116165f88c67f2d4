"""Random models of real architectures, small enough that a step takes milliseconds."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3")

_EXTRA: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4},
    "qwen3": {"head_dim": 16},
    "mistral": {"head_dim": 16, "sliding_window": 4},
    "phi3": {"pad_token_id": 0, "sliding_window": 4},
}


def tiny_config(family: str = "llama", *, vocab_size: int = 512, tied: bool = False, **overrides: Any) -> Any:
    arguments = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **_EXTRA.get(family, {}),
        **overrides,
    }
    return CONFIG_MAPPING[family](**arguments)


def save_tiny_model(
    folder: Path, family: str = "llama", *, tokenizer: PreTrainedTokenizerBase | None = None, **config: Any
) -> str:
    """Write a random model, and its tokenizer if given, as a folder that loads like any base."""
    if tokenizer is not None:
        config.setdefault("vocab_size", -(-len(tokenizer) // 64) * 64)
        config.setdefault("eos_token_id", tokenizer.eos_token_id)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **config), dtype=torch.float32)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def random_batch(
    lengths: tuple[int, ...], *, vocab_size: int = 500, seed: int = 0, packed: bool = True
) -> dict[str, Any]:
    """Documents of random tokens, about half of them supervised, packed or padded: the same documents either way."""
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(3, vocab_size, (n,), generator=generator) for n in lengths]
    masks = [torch.rand(n, generator=generator) < 0.5 for n in lengths]
    for mask in masks:
        mask[0] = False
    return pack_batch(documents, masks) if packed else pad_batch(documents, masks)


def pack_batch(documents: list[torch.Tensor], masks: list[torch.Tensor]) -> dict[str, Any]:
    ids, mask = torch.cat(documents), torch.cat(masks)
    positions = torch.cat([torch.arange(len(d)) for d in documents])
    lengths = torch.tensor([0, *[len(d) for d in documents]], dtype=torch.int32)
    target_positions = mask.nonzero().flatten() - 1
    return {
        "input_ids": ids[None],
        "position_ids": positions[None],
        "labels": torch.where(mask, ids, -100)[None],
        "attention_mask": None,
        "cu_seq_lens": lengths.cumsum(0, dtype=torch.int32),
        "document_lengths": tuple(len(d) for d in documents),
        "target_positions": target_positions,
        "targets": ids[target_positions + 1],
        "row_ids": tuple(range(len(documents))),
    }


def pad_batch(documents: list[torch.Tensor], masks: list[torch.Tensor]) -> dict[str, Any]:
    width = max(len(d) for d in documents)
    ids = torch.stack([torch.nn.functional.pad(d, (0, width - len(d))) for d in documents])
    mask = torch.stack([torch.nn.functional.pad(m, (0, width - len(m))) for m in masks])
    attention = torch.stack([(torch.arange(width) < len(d)).long() for d in documents])
    target_positions = mask.flatten().nonzero().flatten() - 1
    return {
        "input_ids": ids,
        "position_ids": torch.arange(width).expand(len(documents), -1),
        "labels": torch.where(mask, ids, -100),
        "attention_mask": attention,
        "cu_seq_lens": None,
        "document_lengths": tuple(len(d) for d in documents),
        "target_positions": target_positions,
        "targets": ids.flatten()[target_positions + 1],
        "row_ids": tuple(range(len(documents))),
    }


def digests(model: PreTrainedModel) -> dict[str, str]:
    """Of each 4-bit weight, whole, and of the constants that dequantise it; of the embedding and of the head."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            state = module.quant_state
            parts = (module.weight, state.absmax, state.state2.absmax, state.offset)
            found[name.removesuffix(".base_layer")] = _digest(*parts)
    both = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    return found | {name: _digest(module.weight) for name, module in both.items()}


def _digest(*tensors: torch.Tensor) -> str:
    wholes = [(t.full_tensor() if isinstance(t, DTensor) else t).detach() for t in tensors]
    return hashlib.sha256(b"".join(t.cpu().reshape(-1).view(torch.uint8).numpy().tobytes() for t in wholes)).hexdigest()
