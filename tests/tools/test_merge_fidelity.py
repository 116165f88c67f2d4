"""Merging onto 4-bit weights: the very weights of the training, and how far each way of merging is from them."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from tiny_models import save_tiny_model, tiny_config
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config
from transformers.pytorch_utils import Conv1D

from lightning_qlora.model import attach_adapters, load_adapter, load_base_model, save_adapter
from lightning_qlora.tools import merge
from lightning_qlora.tools.merging.adapted_model import AdaptedModel
from lightning_qlora.tools.merging.base_weights import BaseWeights, local_base
from lightning_qlora.tools.merging.verification import compare_logits, in_float32, measure_agreement

FAMILIES = ("llama", "qwen3", "gemma2")
LINEAR = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def save_trained(folder, base, *, std=0.02, **lora):
    """An adapter whose updates are as small, beside the weights, as training makes them."""
    model = attach_adapters(load_base_model(base, quantization=None), LoraConfig(**(lora or LINEAR)))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std, generator=generator)
    save_adapter(model, folder)
    return str(folder)


def four_bit_weights(model):
    return {
        f"{name}.weight": dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }


def streamed(base, adapter, config, dtype):
    model = AdaptedModel(BaseWeights(local_base(base)), adapter, quantization=config, dtype=dtype, with_adapter=False)
    return {name: model.read(file, name) for file, name in model.names_to_write().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"bnb_4bit_use_double_quant": False}, {"bnb_4bit_quant_type": "fp4"}], ids=str)
def test_the_base_merged_onto_is_bit_for_bit_what_training_saw(options, dtype, tmp_path):
    base = save_tiny_model(tmp_path / "base", "llama")
    save_trained(tmp_path / "adapter", base)
    config = BitsAndBytesConfig(
        **{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **options}
    )
    trained = load_base_model(base, quantization=config, dtype=dtype)
    found = streamed(base, tmp_path / "adapter", config, dtype)
    expected = {**{name: p for name, p in trained.named_parameters()}, **four_bit_weights(trained)}
    assert len(four_bit_weights(trained)) == 14
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], weight), name


def test_transposed_layers_are_packed_as_training_packs_them(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=1, n_head=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert any(isinstance(module, Conv1D) for module in model.modules())
    model.save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    quantized = load_base_model(base, quantization="nf4", dtype=torch.float32)
    trained = attach_adapters(quantized, LoraConfig(r=2, target_modules=["c_attn", "c_proj", "c_fc"]))
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    save_adapter(trained, tmp_path / "adapter")
    merge(str(tmp_path / "adapter"), str(tmp_path / "merged"), dtype="float32", base_dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        found, expected = merged.eval()(ids).logits, in_float32(trained)(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_base_that_is_already_in_4_bits_is_unpacked(tmp_path):
    base = save_tiny_model(tmp_path / "plain", "llama", tokenizer=tiny_tokenizer())
    adapter = save_trained(tmp_path / "adapter", base)
    packed = load_base_model(base, quantization="nf4", dtype=torch.bfloat16)
    packed.save_pretrained(tmp_path / "packed")
    tiny_tokenizer().save_pretrained(adapter)
    with pytest.raises(ValueError, match="no original to merge onto"):
        merge(adapter, str(tmp_path / "no"), base=str(tmp_path / "packed"), onto="original")
    merge(adapter, str(tmp_path / "a"), base_dtype="bfloat16")
    merge(adapter, str(tmp_path / "b"), base=str(tmp_path / "packed"), base_dtype="bfloat16")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())


# V17: the same adapter merged three ways


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit:UserWarning")
def test_merged_onto_the_dequantised_base_it_stays_the_trained_model(family, tmp_path):
    base = save_tiny_model(tmp_path / "base", family, tokenizer=tiny_tokenizer())
    adapter = save_trained(tmp_path / "adapter", base)
    texts = torch.randint(3, 500, (4, 48), generator=torch.Generator().manual_seed(0)).tolist()

    def trained():
        return load_adapter(load_base_model(base, quantization="nf4", dtype=torch.bfloat16), adapter)

    def kl_of(load):
        return measure_agreement(lambda: in_float32(trained()), load, texts, tmp_path).mean_kl

    kl = {"re-quantised": kl_of(lambda: in_float32(trained().merge_and_unload()))}
    for onto in ("dequantized", "original"):
        merge(adapter, str(tmp_path / onto), onto=onto, base_dtype="bfloat16")
        kl[onto] = kl_of(
            lambda onto=onto: AutoModelForCausalLM.from_pretrained(tmp_path / onto, dtype=torch.float32).eval()
        )
    assert kl["dequantized"] <= 1e-4
    assert kl["re-quantised"] >= 100 * kl["dequantized"]
    assert kl["original"] >= 100 * kl["dequantized"]


def test_the_measure_is_that_of_the_textbook():
    trained = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]]))
    merged = torch.log(torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.3, 0.5]])) + 3.0  # a shift changes no probability
    found = compare_logits(trained, merged)
    expected = 0.5 * torch.log(torch.tensor(2.0)) - 0.25 * torch.log(torch.tensor(2.0))
    assert found.max_kl == pytest.approx(float(expected), rel=1e-6)
    assert found.mean_kl == pytest.approx(float(expected) / 2, rel=1e-6)
    assert (found.num_tokens, found.top1_agreement) == (2, 0.5)
    assert found.max_logit_difference == pytest.approx(3 + float(torch.log(torch.tensor(2.0))), rel=1e-6)


# Memory

PEAK = textwrap.dedent(
    """
    import sys, torch
    from lightning_qlora.tools import merge
    def peak():
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    torch.set_num_threads(1)
    for layers in ("4", "32"):
        merge(f"{sys.argv[1]}/adapter{layers}", f"{sys.argv[1]}/merged{layers}", max_shard_size="20MB")
        print("PEAK", peak())
    """
)


def save_layers(folder, layers):
    """A model of many equal layers, and an adapter of it, without ever building either."""
    config = tiny_config("llama", num_hidden_layers=layers, hidden_size=512, intermediate_size=1024, vocab_size=256)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder / f"base{layers}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    state = {name: torch.randn(p.shape).bfloat16() * 0.02 for name, p in model.named_parameters()}
    save_file(state, folder / f"base{layers}" / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer(vocab_size=240).save_pretrained(folder / f"base{layers}")
    lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], base_model_name_or_path=str(folder / f"base{layers}"))
    lora.save_pretrained(folder / f"adapter{layers}")
    pairs = {}
    for name, p in model.named_parameters():
        if ("q_proj" in name or "up_proj" in name) and name.endswith(".weight"):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            pairs |= {
                f"{stem}.lora_A.weight": torch.randn(2, p.shape[1]),
                f"{stem}.lora_B.weight": torch.randn(p.shape[0], 2),
            }
    save_file(pairs, folder / f"adapter{layers}" / "adapter_model.safetensors")
    return sum(tensor.nbytes for tensor in state.values())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    small, large = save_layers(tmp_path, 4), save_layers(tmp_path, 32)
    assert large - small > 100e6
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    peaks = [int(line.split()[1]) * 1024 for line in done.stdout.splitlines() if line.startswith("PEAK")]
    assert peaks[1] - peaks[0] < 20e6, f"{peaks} bytes for models of {small} and {large} bytes"
