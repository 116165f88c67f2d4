import json

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, PeftModel
from tiny_models import FAMILIES, random_batch, save_tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lightning_qlora.model import (
    attach_adapters,
    load_adapter,
    load_base_model,
    merge_adapter,
    nf4,
    read_adapter_base,
    resolve_quantization,
    save_adapter,
    set_activation_checkpointing,
    untrained_token_ids,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"))


def lora(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


def scramble(model):
    """Give every trained tensor a value, as training would: fresh LoRA adapters change nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def logits(model, batch):
    model.eval()
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_family_is_stored_in_4_bits_and_trains_in_every_linear_layer(family, tied, tmp_path):
    model = load_base_model(save_tiny_model(tmp_path, family, tied=tied), quantization="nf4")
    assert not any(p.requires_grad for p in model.parameters())
    peft_model = attach_adapters(model, lora())
    packed = {n for n, p in peft_model.named_parameters() if p.dtype == torch.uint8}
    assert len(packed) >= 2 * 4
    assert all("self_attn" in n or "mlp" in n for n in packed)

    peft_model(input_ids=random_batch((12,))["input_ids"], use_cache=False).logits.sum().backward()
    lora_b = {n: p.grad for n, p in peft_model.named_parameters() if "lora_B" in n}
    assert len(lora_b) == len(packed)
    assert all(g is not None and g.abs().sum() > 0 for g in lora_b.values())


def test_double_quantisation_and_compute_dtype_are_what_was_asked(base):
    weight = load_base_model(base).model.layers[0].mlp.up_proj.weight
    assert weight.quant_state.nested
    assert weight.quant_state.quant_type == "nf4"
    assert weight.quant_state.dtype == torch.float32
    fp4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    state = load_base_model(base, quantization=fp4).model.layers[0].mlp.up_proj.weight.quant_state
    assert (state.quant_type, state.nested) == ("fp4", False)
    assert load_base_model(base, quantization=None).model.layers[0].mlp.up_proj.weight.dtype == torch.float32


def test_a_validation_before_training_does_not_repack_the_weights(base):
    model = attach_adapters(load_base_model(base), lora())
    batch = random_batch((8,))
    before = logits(model, batch)
    model.train()
    model(input_ids=batch["input_ids"], use_cache=False).logits.sum().backward()
    assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 16}},
        {"trainable_token_indices": [5, 7]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
    ],
    ids=["lora", "dora", "rslora", "rank_pattern", "tokens", "head", "embedding"],
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_adapter_gives_the_same_logits_through_plain_peft(tied, options, tmp_path):
    folder = save_tiny_model(tmp_path / "base", tied=tied)
    model = attach_adapters(load_base_model(folder), lora(**options))
    scramble(model)
    save_adapter(model, tmp_path / "adapter")
    batch = random_batch((10,))
    expected = logits(model, batch)

    plain = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4(), dtype=torch.float32)
    for module in plain.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16 bitsandbytes answers in bfloat16 unless told not to; that is not the adapter's.
            module.support_avx512bf16_for_cpu = False
    plain = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    assert (logits(plain, batch) - expected).abs().max() == 0
    ours = load_adapter(load_base_model(folder), tmp_path / "adapter")
    assert (logits(ours, batch) - expected).abs().max() == 0


@pytest.mark.parametrize("trained", ["embed_tokens", "lm_head"])
def test_tied_embeddings_stay_tied_when_trained_in_full(trained, tmp_path):
    model = attach_adapters(load_base_model(save_tiny_model(tmp_path, tied=True)), lora(modules_to_save=[trained]))
    scramble(model)
    base = model.get_base_model()
    assert torch.equal(base.get_input_embeddings().weight, base.get_output_embeddings().weight)


def test_saved_folders_hold_no_base_weight(base, tmp_path):
    model = attach_adapters(load_base_model(base), lora())
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base
    size = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < size + 20_000


def test_a_saved_adapter_names_its_base_as_it_was_given_not_a_folder_of_the_cache(base, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_qlora.model.resolve_pretrained", {"package:tiny": base}.get)
    save_adapter(attach_adapters(load_base_model("package:tiny"), lora()), tmp_path)
    for file in tmp_path.iterdir():
        assert str(base).encode() not in file.read_bytes()
    assert read_adapter_base(tmp_path) == ("package:tiny", None)


def test_activation_checkpointing_recomputes_and_changes_nothing(base):
    batch = random_batch((10,))
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = attach_adapters(load_base_model(base), lora())
        scramble(model)
        calls = []
        layer = model.get_base_model().model.layers[0]
        layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            set_activation_checkpointing(model.get_base_model(), "full")
        model(input_ids=batch["input_ids"], use_cache=False).logits.sum().backward()
        assert len(calls) == (2 if checkpointing else 1)
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_head_is_handed_contiguous_states_wherever_only_some_logits_are_kept(base):
    model = load_base_model(str(base), device=torch.device("cpu"))
    layouts = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, __: layouts.append(args[0].is_contiguous()))
    ids_BL = torch.arange(12).reshape(2, 6)
    full = model(input_ids=ids_BL).logits
    torch.testing.assert_close(model(input_ids=ids_BL, logits_to_keep=2).logits, full[:, -2:])
    model.generate(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL), max_new_tokens=2, do_sample=False)
    assert layouts
    assert all(layouts)


def test_untrained_control_tokens_are_found_and_trained(tmp_path):
    folder = save_tiny_model(tmp_path, tied=False)
    model = load_base_model(folder)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[10] = 0
        weight[11] = weight[12]
        weight[13] = weight.mean(0)
    assert untrained_token_ids(model, [9, 10, 11, 12, 13, 14]) == [10, 11, 12, 13]
    assert untrained_token_ids(model, [9, 14, 9999]) == [9999]
    peft_model = attach_adapters(model, lora(), token_ids_to_train=[10, 11])
    trained = [n for n, p in peft_model.named_parameters() if p.requires_grad and "token_adapter" in n]
    assert any("embed_tokens" in n for n in trained)
    assert any("lm_head" in n for n in trained)


def test_merging_into_a_quantised_base_is_refused(base, tmp_path):
    model = attach_adapters(load_base_model(base), lora())
    with pytest.raises(MisconfigurationException, match="quantization=None"):
        merge_adapter(model)
    scramble(model)
    save_adapter(model, tmp_path)
    plain = load_adapter(load_base_model(base, quantization=None), tmp_path)
    batch = random_batch((10,))
    expected = logits(plain, batch)
    torch.testing.assert_close(logits(merge_adapter(plain), batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", ["no/such/folder", "/no/such/folder", "package:no_such_package", "missing.gguf"])
def test_a_base_that_does_not_exist_is_named(bad, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="Write|Install"):
        load_base_model(bad)


def test_targets_that_match_nothing_list_those_that_exist(base):
    with pytest.raises(ValueError, match="down_proj.*q_proj"):
        attach_adapters(load_base_model(base), lora(target_modules=["no_such_layer"]))


def test_8_bit_without_a_gpu_is_refused(base):
    if torch.cuda.is_available():
        pytest.skip("8-bit works here")
    with pytest.raises(MisconfigurationException, match="nf4"):
        load_base_model(base, quantization="int8")


def test_unknown_quantisation_lists_the_choices():
    with pytest.raises(ValueError, match="'nf4', 'int8', null"):
        resolve_quantization("4bit")


def test_bits_that_were_not_chosen_are_not_guessed():
    with pytest.raises(ValueError, match="load_in_4bit"):
        resolve_quantization(BitsAndBytesConfig(bnb_4bit_quant_type="fp4"))


def test_a_folder_without_an_adapter_and_an_adapter_of_another_base_are_refused(base, tmp_path):
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        load_adapter(load_base_model(base), tmp_path)
    model = attach_adapters(load_base_model(base), lora(target_modules=["q_proj"], layers_to_transform=[0]))
    save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["layers_to_transform"] = None
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not fit"):
        load_adapter(load_base_model(base), tmp_path / "adapter")


def test_a_seed_gives_the_same_adapters_whatever_device_is_the_default(tmp_path):
    """Lightning makes the GPU the default one while it builds a model, and not under every strategy."""
    found = []
    for default in ("cpu", "meta"):
        base = load_base_model(save_tiny_model(tmp_path / default))
        with torch.device(default):
            torch.manual_seed(3)
            model = attach_adapters(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        found.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())
