"""vLLM loads what merge writes, and an adapter's folder beside its base, and answers as transformers and PEFT do."""

from __future__ import annotations

import pytest
import torch
from tiny_adapters import write_adapter
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM

from lightning_qlora.model import load_adapter, load_base_model
from lightning_qlora.tools import merge

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # vLLM takes a minute to start on a CPU
PROMPTS = [list(range(3, 23)), list(range(60, 40, -1)), [7, 8, 9]]
_GEMMA = {"tied": True, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64}
# Heads of 16, as the other tests have them, are too small for vLLM's attention.
CASES = {
    "llama": {},
    "llama-tied": {"tied": True},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "mistral": {"head_dim": 32, "sliding_window": None},
    "phi3": {},
    "gemma2": _GEMMA,
    "gemma3_text": {"num_hidden_layers": 6, **_GEMMA},
}


@torch.no_grad()
def greedy(model, num_tokens=16):
    model.eval()
    answers = []
    for ids in PROMPTS:
        tokens = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=num_tokens)
        answers.append(tokens[0, len(ids) :].tolist())
    return answers


@pytest.fixture
def trained(request, tokenizer, tmp_path):
    """A base and an adapter of one family, as training leaves them."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    family = request.param.partition("-")[0]
    base = save_tiny_model(tmp_path / "base", family, tokenizer=tokenizer, **heads, **CASES[request.param])
    adapter = write_adapter(tmp_path / "adapter", base, tokenizer, stop=[tokenizer.eos_token_id], manifest=True)
    return base, adapter


@pytest.mark.parametrize("trained", CASES, indirect=True)
def test_the_merged_model_answers_as_in_transformers(ask_vllm, trained, tmp_path):
    base, adapter = trained
    merge(adapter, str(tmp_path / "merged"), dtype="float32")
    expected = greedy(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    assert expected != greedy(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    assert ask_vllm(tmp_path / "merged", PROMPTS) == expected


@pytest.mark.parametrize("trained", ["llama", "qwen3"], indirect=True)
def test_the_adapter_beside_its_base_answers_as_in_training(ask_vllm, trained, tmp_path):
    _, adapter = trained
    merge(adapter, str(tmp_path / "dequantized"), dtype="float32", without_adapter=True)
    expected = greedy(load_adapter(load_base_model(str(tmp_path / "dequantized"), quantization=None), adapter).float())
    assert ask_vllm(tmp_path / "dequantized", PROMPTS, adapter=adapter) == expected
