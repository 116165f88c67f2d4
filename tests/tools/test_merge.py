"""What merge writes, against bitsandbytes' own weights and against PEFT's own merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny import tiny_tokenizer
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig

from lightning_qlora.model import attach_adapters, load_adapter, load_base_model, merge_adapter, save_adapter
from lightning_qlora.tools import merge

IDS = torch.arange(3, 43)[None]
LINEAR = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer("chatml")


def randomise(model, std=0.05, seed=1):
    """Give every trained tensor a value that its initialisation has not."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                scale = std * (parameter.std() if parameter.numel() > 1 and "lora_" not in name else 1.0)
                parameter += torch.randn(parameter.shape, generator=generator) * scale
    return model


def make_adapter(folder: Path, base: str, *, quantization=None, tokenizer=None, stop=(), dtype=None, **lora) -> str:
    model = load_base_model(base, quantization=quantization, dtype=dtype)
    save_adapter(randomise(attach_adapters(model, LoraConfig(**lora))), folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if stop:
        GenerationConfig(eos_token_id=list(stop)).save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def peft_merge(base: str, adapter: str):
    """PEFT's merge, in memory, of an unquantised base."""
    return merge_adapter(load_adapter(load_base_model(base, quantization=None, dtype=torch.float32), adapter))


# Onto the original weights: every kind of adapter against PEFT's own merge


KINDS = {
    "linear": LINEAR,
    "some-layers": {"r": 4, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "rank-patterns": {
        **LINEAR,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7},
        "alpha_pattern": {"v_proj": 3},
    },
    "rslora": {**LINEAR, "use_rslora": True},
    "dora": {**LINEAR, "use_dora": True},
    "lora-bias": {"r": 4, "target_modules": ["q_proj", "k_proj"], "lora_bias": True},
    "trained-biases": {**LINEAR, "bias": "all"},
    "lora-only-biases": {"r": 4, "target_modules": ["q_proj"], "bias": "lora_only"},
    "head-in-full": {**LINEAR, "modules_to_save": ["lm_head"]},
    "norm-in-full": {**LINEAR, "modules_to_save": ["norm"]},
    "both-in-full": {**LINEAR, "modules_to_save": ["lm_head", "embed_tokens"]},
    "tokens": {**LINEAR, "trainable_token_indices": [1, 5]},
    "tokens-of-both": {**LINEAR, "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2]}},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "head": {"r": 4, "target_modules": ["lm_head", "q_proj"]},
}


OF_EMBEDDINGS = ("head-in-full", "both-in-full", "tokens", "tokens-of-both", "embedding", "head")


@pytest.mark.parametrize(
    ("kind", "tied"), [*[(kind, False) for kind in KINDS], *[(kind, True) for kind in ("linear", *OF_EMBEDDINGS)]]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_kind_of_adapter_answers_like_the_trained_model(kind, tied, tmp_path):
    biased = {"attention_bias": True} if "bias" in kind else {}
    base = save_tiny_model(tmp_path / "base", "llama", tied=tied, tokenizer=tiny_tokenizer(), **biased)
    adapter = make_adapter(tmp_path / "adapter", base, **KINDS[kind])
    trained = load_adapter(load_base_model(base, quantization=None, dtype=torch.float32), adapter)
    merge(adapter, str(tmp_path / "merged"), quantization="none", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged) - logits(trained)).abs().max() < 1e-5
    if not (tied and kind in ("embedding", "head", "tokens-of-both")):  # PEFT's merge changes the shared matrix twice
        expected = peft_merge(base, adapter).state_dict()
        found = merged.state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-6)
