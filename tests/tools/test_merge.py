"""What merge writes, against bitsandbytes' own weights and against PEFT's own merge."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lightning_qlora.checkpoints.identity import IdentityMismatchError, identify
from lightning_qlora.checkpoints.publishing import MANIFEST_NAME
from lightning_qlora.checkpoints.publishing.manifest import dump_manifest, hash_stream
from lightning_qlora.model import attach_adapters, load_adapter, load_base_model, merge_adapter, save_adapter
from lightning_qlora.tools import merge

IDS = torch.arange(3, 43)[None]
LINEAR = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}


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


def test_a_resized_vocabulary_comes_with_the_adapter(tmp_path):
    base = save_tiny_model(tmp_path / "base", "llama", tied=True, tokenizer=tiny_tokenizer())
    model = load_base_model(base, quantization=None, dtype=torch.float32)
    rows = model.get_input_embeddings().num_embeddings + 64
    model.resize_token_embeddings(rows, mean_resizing=False)
    trained = randomise(attach_adapters(model, LoraConfig(**LINEAR)))
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    merge(str(tmp_path / "adapter"), str(tmp_path / "merged"), quantization="none", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == rows
    torch.testing.assert_close(logits(merged), logits(trained), atol=1e-5, rtol=1e-4)


# The folder


def test_the_folder_is_complete_for_whoever_serves_it(tokenizer, tmp_path):
    base = save_tiny_model(tmp_path / "base", tokenizer=tokenizer)
    stop = (tokenizer.eos_token_id, 7)
    tokenizer.chat_template = "{{ 'trained' }}" + tokenizer.chat_template
    adapter = make_adapter(tmp_path / "adapter", base, tokenizer=tokenizer, stop=stop, **LINEAR)
    merge(adapter, str(tmp_path / "merged"), max_shard_size="100KB")
    folder = tmp_path / "merged"
    config = json.loads((folder / "config.json").read_text())
    # What vLLM reads before it loads anything: the class, the dtype, the sizes; a quantization_config would mislead it.
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 2
    for file in files:
        with safe_open(folder / file, framework="pt") as shard:
            assert {index["weight_map"][name] for name in shard.keys()} == {file}  # noqa: SIM118
            assert shard.metadata() == {"format": "pt"}
            assert all(shard.get_tensor(name).dtype == torch.bfloat16 for name in shard.keys())  # noqa: SIM118
        assert (folder / file).stat().st_mode & 0o444 == 0o444
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
    assert GenerationConfig.from_pretrained(folder).eos_token_id == list(stop)
    report = json.loads((folder / "merge_report.json").read_text())
    assert (report["onto"], report["quantization"], report["merged_modules"]) == ("dequantized", "4-bit NF4", 14)
    card = (folder / "README.md").read_text()
    assert "rank 4, alpha 16" in card
    assert "Not compared" in card
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def write_manifest(folder: Path, **metadata) -> None:
    records = {path.name: hash_stream(io.BytesIO(path.read_bytes())) for path in folder.iterdir()}
    (folder / MANIFEST_NAME).write_bytes(dump_manifest(1, records, metadata))


def test_the_card_says_what_the_manifest_says(tokenizer, tmp_path):
    base = save_tiny_model(tmp_path / "base", tokenizer=tokenizer)
    adapter = make_adapter(tmp_path / "adapter", base, tokenizer=tokenizer, **LINEAR)
    counts = {"rows": 1234, "refused": 5, "tokens": 67890, "supervised_tokens": 4321, "sources": ["tickets.jsonl"]}
    write_manifest(
        tmp_path / "adapter",
        step=77,
        metrics={"val_loss": 0.125},
        config={"module": {"model_name": base, "lr": 0.0015, "dtype": "float32"}},
        data={"train": counts},
        identity=identify(load_base_model(base, quantization=None), tokenizer),
    )
    merge(adapter, str(tmp_path / "merged"))
    card = (tmp_path / "merged" / "README.md").read_text()
    for fact in ("1,234", "67,890", "tickets.jsonl", "| val_loss | 0.125 |", "lr: `0.0015`", "optimizer step 77"):
        assert fact in card
    assert json.loads((tmp_path / "merged" / "merge_report.json").read_text())["quantization"] == "unquantised"


def test_verify_measures_and_writes_down_what_it_found(tokenizer, tmp_path):
    base = save_tiny_model(tmp_path / "base", tokenizer=tokenizer)
    adapter = make_adapter(tmp_path / "adapter", base, quantization="nf4", tokenizer=tokenizer, **LINEAR)
    data = tmp_path / "data.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "Yes."}]} for i in "abc"
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    merge(adapter, str(tmp_path / "merged"), verify=True, verify_on=str(data))
    found = json.loads((tmp_path / "merged" / "merge_report.json").read_text())["verification"]
    assert (found["num_texts"], found["texts"], found["compute_dtype"]) == (3, str(data), "float32")
    assert 0 < found["mean_kl"] <= found["max_kl"] < 1e-2
    assert f"{found['mean_kl']:.2e}" in (tmp_path / "merged" / "README.md").read_text()
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "a?", "reference": "Yes."}\n{"prompt": "b?"}\n')
    merge(adapter, str(tmp_path / "asked"), verify=True, verify_on=[str(questions)], verify_tokens=30)
    found = json.loads((tmp_path / "asked" / "merge_report.json").read_text())["verification"]
    assert found["num_tokens"] <= 30


def test_a_merge_that_is_too_far_off_fails_and_leaves_nothing(tokenizer, tmp_path):
    base = save_tiny_model(tmp_path / "base", tokenizer=tokenizer)
    adapter = make_adapter(tmp_path / "adapter", base, quantization="nf4", tokenizer=tokenizer, **LINEAR)
    with pytest.raises(ValueError, match=r"not the trained one: mean KL .*--tolerance="):
        merge(adapter, str(tmp_path / "merged"), verify=True, tolerance=1e-12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    merge(adapter, str(tmp_path / "original"), verify=True, onto="original")  # measured, and no limit of its own
    assert json.loads((tmp_path / "original" / "merge_report.json").read_text())["verification"]["mean_kl"] > 1e-6


def test_another_base_is_refused(tokenizer, tmp_path):
    base = save_tiny_model(tmp_path / "base", tokenizer=tokenizer)
    adapter = make_adapter(tmp_path / "adapter", base, tokenizer=tokenizer, **LINEAR)
    write_manifest(tmp_path / "adapter", identity=identify(load_base_model(base, quantization="nf4"), tokenizer))
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight += 0.5
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(IdentityMismatchError, match="base"):
        merge(adapter, str(tmp_path / "merged"), base=str(tmp_path / "other"))
    assert not (tmp_path / "merged").exists()
    merge(adapter, str(tmp_path / "merged"), base=str(tmp_path / "other"), allow_mismatch=["base"])


# Refusals


def change(adapter: Path, **options) -> str:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **options}))
    return str(adapter)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "IA3"}, "is a IA3 adapter"),
        ({"layer_replication": [[0, 1]]}, "uses layer_replication"),
        ({"alora_invocation_tokens": [3]}, "uses alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "initialised by pissa.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "initialised by olora"),
        ({"target_modules": ["q_proj"]}, "does not fit the base"),
        ({"r": 3}, "does not fit the base"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(options, message, tokenizer, tmp_path):
    base = save_tiny_model(tmp_path / "base", tokenizer=tokenizer)
    make_adapter(tmp_path / "adapter", base, tokenizer=tokenizer, **LINEAR)
    with pytest.raises(ValueError, match=message):
        merge(change(tmp_path / "adapter", **options), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_folders_that_are_not_what_they_should_be_are_refused(tokenizer, tmp_path):
    base = save_tiny_model(tmp_path / "base", tokenizer=tokenizer)
    adapter = make_adapter(tmp_path / "adapter", base, tokenizer=tokenizer, **LINEAR)
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        merge(adapter, base)
    with pytest.raises(ValueError, match="is no adapter folder"):
        merge(base, str(tmp_path / "merged"))
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq"}})
    )
    with pytest.raises(ValueError, match="quantised by gptq"):
        merge(adapter, str(tmp_path / "merged"))


def test_weights_that_are_not_finite_are_not_written(tokenizer, tmp_path):
    base = save_tiny_model(tmp_path / "base", tokenizer=tokenizer)
    adapter = make_adapter(tmp_path / "adapter", base, tokenizer=tokenizer, **LINEAR)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(tensor for name, tensor in tensors.items() if "lora_B" in name)[0, 0] = torch.nan
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)
    with pytest.raises(ValueError, match="NaNs detected"):
        merge(adapter, str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()
