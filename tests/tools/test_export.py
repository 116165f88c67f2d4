"""GGUF files, read back by two other programs: transformers' own reader, and llama.cpp where it is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig
from tiny import SENTENCES, tiny_tokenizer
from tiny_adapters import write_adapter
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lightning_qlora.model import attach_adapters, load_adapter, load_base_model, save_adapter
from lightning_qlora.tools import export
from lightning_qlora.tools.exporting import gguf_file, read_vocabulary

STYLES = {
    "llama": "llama3",
    "mistral": "chatml",
    "qwen2": "chatml",
    "qwen3": "chatml",
    "gemma2": "chatml",
    "gemma3_text": "chatml",
}
IDS = list(range(3, 40))
NF4 = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def save_model(folder: Path, family="llama", **config) -> str:
    """A folder as merge writes it: weights, tokenizer, template, stop tokens, card."""
    tokenizer = tiny_tokenizer(STYLES[family])
    if family in ("gemma2", "gemma3_text"):
        config |= {"sliding_window": 64, "num_hidden_layers": 2 if family == "gemma2" else 6, "tied": True}
    if family == "mistral":
        config |= {"sliding_window": None}
    save_tiny_model(folder, family, tokenizer=tokenizer, **config)
    GenerationConfig(eos_token_id=[tokenizer.eos_token_id]).save_pretrained(folder)
    (folder / "README.md").write_text("# A card", encoding="utf-8")
    return str(folder)


@torch.no_grad()
def logits_of(model):
    return model.eval()(torch.tensor([IDS])).logits[0]


def llama_cpp():
    return pytest.importorskip("llama_cpp", reason="llama.cpp is not installed")


def llama_logits(file: Path, ids=IDS, **options):
    llama = llama_cpp().Llama(
        str(file), n_ctx=128, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False, **options
    )
    llama.eval(ids)
    return torch.tensor(llama.scores[: len(ids)].copy())


def fields(file: Path) -> dict:
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


@pytest.mark.parametrize("family", STYLES)
def test_llama_cpp_computes_what_the_model_computes(family, tmp_path):
    folder = save_model(tmp_path / "model", family)
    export(folder, str(tmp_path / "model.gguf"))
    expected = logits_of(AutoModelForCausalLM.from_pretrained(folder))
    found = llama_logits(tmp_path / "model.gguf")
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)  # llama.cpp's activations are partly float16
    assert (found.argmax(1) == expected.argmax(1)).all()


def test_a_head_of_its_own_and_stretched_positions_are_kept(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    folder = save_model(tmp_path / "model", "llama", tied=False, rope_parameters=rope, attention_bias=True)
    export(folder, str(tmp_path / "model.gguf"))
    names = {tensor.name for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert {"output.weight", "rope_freqs.weight", "blk.0.attn_q.bias"} <= names
    expected = logits_of(AutoModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(llama_logits(tmp_path / "model.gguf"), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # of qwen3 it overlooks the size of a head
def test_transformers_reads_the_file_back(family, tmp_path):
    folder = save_model(tmp_path / "model", family)
    export(folder, str(tmp_path / "model.gguf"))
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits_of(read), logits_of(AutoModelForCausalLM.from_pretrained(folder)))


@pytest.mark.parametrize(
    ("outtype", "kind", "error"), [("f16", "F16", 1e-3), ("bf16", "BF16", 5e-3), ("q8_0", "Q8_0", 1e-2)]
)
def test_matrices_are_stored_as_asked_and_vectors_in_full(outtype, kind, error, tmp_path):
    folder = save_model(tmp_path / "model")
    export(folder, str(tmp_path / "model.gguf"), outtype=outtype)
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == kind
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    expected = logits_of(AutoModelForCausalLM.from_pretrained(folder))
    assert 0 < (llama_logits(tmp_path / "model.gguf") - expected).abs().max() < 20 * error


def test_the_file_says_who_speaks_and_where_answers_end(tmp_path):
    folder = save_model(tmp_path / "model", "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stops = tokenizer.convert_tokens_to_ids(["<|eom_id|>", "<|eot_id|>", "<|end_of_text|>"])
    GenerationConfig(eos_token_id=stops).save_pretrained(folder)
    export(folder, str(tmp_path / "model.gguf"))
    found = fields(tmp_path / "model.gguf")
    assert found["general.architecture"] == "llama"
    assert found["general.description"] == "# A card"
    assert found["tokenizer.chat_template"] == tokenizer.chat_template
    assert found["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id == stops[1]
    assert {found["tokenizer.ggml.eot_token_id"], found["tokenizer.ggml.eom_token_id"]} == {stops[0], stops[2]}
    assert found["tokenizer.ggml.add_bos_token"] is False  # this tokenizer's template writes it
    assert len(found["tokenizer.ggml.tokens"]) == found["llama.vocab_size"] > len(tokenizer)


@pytest.mark.parametrize(("style", "kind"), [("chatml", "bytelevel"), ("qwen", "bytelevel"), ("gemma", "gemma")])
def test_llama_cpp_splits_text_as_the_tokenizer_does(style, kind, tmp_path):
    tokenizer = tiny_tokenizer(style, kind)
    save_tiny_model(tmp_path / "model", tokenizer=tokenizer)
    export(str(tmp_path / "model"), str(tmp_path / "model.gguf"))
    llama = llama_cpp().Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    control = tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id)
    texts = [*SENTENCES, "x  y\n\n z12345", f"Hi{control}\n there ", "naïve café über 東京", "I'LL we've 'tis", " a"]
    for text in texts:
        expected = tokenizer(text, add_special_tokens=False).input_ids
        assert llama.tokenize(text.encode(), add_bos=False, special=True) == expected, text


@pytest.mark.parametrize("kind", ["metaspace", "unigram", "prepend"])
def test_tokenizers_without_a_proven_equivalent_are_refused(kind):
    tokenizer = tiny_tokenizer("mistral", kind)
    with pytest.raises(ValueError, match="no proven equivalent"):
        read_vocabulary(tokenizer, len(tokenizer), [])


# The adapter alone


LORAS = {
    "plain": NF4,
    "patterns": {**NF4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}},
    "rslora": {**NF4, "use_rslora": True},
}


def save_lora(folder: Path, base: str, **lora) -> str:
    model = attach_adapters(load_base_model(base, quantization=None, dtype=torch.float32), LoraConfig(**lora))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            with torch.no_grad():
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    save_adapter(model, folder)
    return str(folder)


@pytest.mark.parametrize("kind", LORAS)
def test_the_adapter_beside_its_base_computes_what_peft_computes(kind, tmp_path):
    base = save_model(tmp_path / "base")
    adapter = save_lora(tmp_path / "adapter", base, **LORAS[kind])
    export(base, str(tmp_path / "base.gguf"))
    export(adapter, str(tmp_path / "lora.gguf"))
    found = fields(tmp_path / "lora.gguf")
    assert (found["general.type"], found["adapter.type"]) == ("adapter", "lora")
    assert found["adapter.lora.alpha"] == 8.0
    loaded = load_adapter(load_base_model(base, quantization=None, dtype=torch.float32), adapter)
    expected = logits_of(loaded)
    alone = llama_logits(tmp_path / "base.gguf")
    beside = llama_logits(tmp_path / "base.gguf", lora_path=str(tmp_path / "lora.gguf"))
    assert (alone - expected).abs().max() > 0.05
    torch.testing.assert_close(beside, expected, atol=3e-3, rtol=3e-3)


@pytest.mark.parametrize(
    ("lora", "named"),
    [
        ({**NF4, "use_dora": True}, "DoRA"),
        ({**NF4, "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({**NF4, "trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"r": 2, "target_modules": ["embed_tokens"]}, "a LoRA of the embedding"),
    ],
)
def test_an_adapter_that_is_more_than_a_lora_is_sent_to_merge(lora, named, tmp_path):
    base = save_model(tmp_path / "base")
    adapter = save_lora(tmp_path / "adapter", base, **lora)
    with pytest.raises(ValueError, match=f"{named}.*Merge it"):
        export(adapter, str(tmp_path / "lora.gguf"))
    assert not (tmp_path / "lora.gguf").exists()


def test_of_a_run_its_checkpoint_is_exported(tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "epoch=0-step=1"
    export(write_adapter(folder, save_model(tmp_path / "base"), manifest=True), str(tmp_path / "expected.gguf"))
    export(str(tmp_path / "run"), str(tmp_path / "found.gguf"))
    assert (tmp_path / "found.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()


# Refusals


def test_a_folder_that_holds_no_model_is_named(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="holds notes.txt.*Write the folder that.*a model that merge made"):
        export(str(tmp_path), str(tmp_path / "x.gguf"))


def test_other_models_are_refused_by_name(tmp_path):
    folder = save_tiny_model(tmp_path / "model", "phi3", tokenizer=tiny_tokenizer("phi"))
    with pytest.raises(ValueError, match=r"phi3 models are not written.*convert_hf_to_gguf"):
        export(folder, str(tmp_path / "model.gguf"))


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "model")
    (tmp_path / "there.gguf").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        export(folder, str(tmp_path / "there.gguf"))
    monkeypatch.setattr(gguf_file, "quantize", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        export(folder, str(tmp_path / "new.gguf"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "there.gguf"]
    assert (tmp_path / "there.gguf").read_text() == "mine"
