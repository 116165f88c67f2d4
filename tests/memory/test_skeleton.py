from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from tiny_models import FAMILIES, save_tiny_model
from transformers import AutoConfig, BitsAndBytesConfig

from lightning_qlora.accounting import count_storage, step_flops
from lightning_qlora.memory import build_skeleton, skeleton_of
from lightning_qlora.model import attach_adapters, load_base_model

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
QUANTIZATIONS = {
    "nf4": "nf4",
    "none": None,
    "fp4, constants plain": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "stored as bfloat16": BitsAndBytesConfig(**NF4, bnb_4bit_quant_storage="bfloat16"),
    "head skipped by name": BitsAndBytesConfig(**NF4, llm_int8_skip_modules=["lm_head", "q_proj"]),
}


def compare(folder, lora, quantization="nf4", dtype=torch.float32):
    real = attach_adapters(load_base_model(folder, quantization=quantization, dtype=dtype), lora)
    config = AutoConfig.from_pretrained(folder)
    for skeleton in (build_skeleton(config, lora, quantization=quantization, dtype=dtype), skeleton_of(real)):
        assert count_storage(skeleton) == count_storage(real)
        assert sum(b.nbytes for b in skeleton.buffers()) == sum(b.nbytes for b in real.buffers())
        assert [(n, p.dtype) for n, p in skeleton.named_parameters()] == [
            (n, p.dtype) for n, p in real.named_parameters()
        ]
        assert {p.device.type for p in skeleton.parameters()} == {"meta"}
        assert step_flops(skeleton) == step_flops(real)


def lora_config(**options):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module")  # PEFT's own
@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "mixtral", "granite", "stablelm"])
def test_bytes_are_those_of_the_loaded_model(family, tmp_path):
    compare(save_tiny_model(tmp_path, family), lora_config())


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_bytes_of_each_quantisation(name, tmp_path):
    compare(save_tiny_model(tmp_path), lora_config(), QUANTIZATIONS[name])


@pytest.mark.parametrize(
    "shape",
    [
        {"hidden_size": 80, "intermediate_size": 56, "head_dim": 20},
        {"hidden_size": 64, "intermediate_size": 1100, "vocab_size": 333},  # blocks that end in the middle
        {"num_hidden_layers": 3, "tied": True},
        {"attention_bias": True, "mlp_bias": True},
    ],
)
def test_bytes_of_odd_shapes(shape, tmp_path):
    compare(save_tiny_model(tmp_path, **shape), lora_config(), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"rank_pattern": {"q_proj": 9}, "target_modules": ["q_proj", "v_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 2, 3]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_bytes_of_other_adapters(options, tmp_path):
    quantization = None if "pissa" in options.values() else "nf4"  # PEFT wants to see the weights
    compare(save_tiny_model(tmp_path), lora_config(**options), quantization)


def test_the_quantisation_library_is_as_it_was(tmp_path):
    """bitsandbytes keeps tables for all layers; one made on the meta device would break the next real model."""
    folder = save_tiny_model(tmp_path)
    build_skeleton(AutoConfig.from_pretrained(folder), lora_config())

    model = load_base_model(folder)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.state2.code.device.type == "cpu"
    assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()
