import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from tiny_adapters import write_adapter
from tiny_models import save_tiny_model

from lightning_qlora.checkpoints.identity import (
    IdentityMismatchError,
    check_adapter,
    differences,
    identify,
    identify_base,
    identify_tokenizer,
    package_versions,
    refuse_differences,
)
from lightning_qlora.checkpoints.publishing import DamagedCheckpointError, LocalStore
from lightning_qlora.model import attach_adapters, load_adapter, load_base_model


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer("chatml")


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory, tokenizer):
    return save_tiny_model(tmp_path_factory.mktemp("base"), tokenizer=tokenizer)


def adapted(folder, *, quantization="nf4", dtype=None, **lora):
    base = load_base_model(folder, quantization=quantization, dtype=dtype)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    return attach_adapters(base, LoraConfig(**options))


@pytest.fixture(scope="module")
def model(base_folder):
    return adapted(base_folder)


def found_fields(one, other):
    return [item.field for item in differences(one, other)]


def test_an_identity_is_plain_json(model, tokenizer):
    identity = identify(model, tokenizer, "data-1")
    assert json.loads(json.dumps(identity)) == identity
    assert identity["adapter"]["r"] == 4
    assert identity["adapter"]["target_modules"] == sorted(identity["adapter"]["target_modules"])
    assert identity["quantization"]["bnb_4bit_quant_type"] == "nf4"
    assert identity["base"]["num_hidden_layers"] == 2
    assert identity["data"] == "data-1"


def test_loading_again_gives_the_same_identity(model, base_folder, tokenizer):
    again = adapted(base_folder)
    torch.nn.init.normal_(next(p for n, p in again.named_parameters() if "lora_B" in n))  # training does not change it
    assert identify(again, tokenizer) == identify(model, tokenizer)


def test_the_base_is_the_same_with_and_without_adapters(model, base_folder):
    plain = identify_base(load_base_model(base_folder))
    for options in ({"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 5]}, {"bias": "none"}):
        assert identify_base(adapted(base_folder, **options)) == plain
    assert identify_base(model) == plain


def test_the_base_is_the_same_for_inference(model, base_folder, tmp_path):
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(load_base_model(base_folder), tmp_path)
    assert identify(loaded) == identify(model)


def test_a_tied_base_is_itself(tmp_path):
    folder = save_tiny_model(tmp_path, tied=True)
    plain = identify_base(load_base_model(folder))
    assert identify_base(adapted(folder, modules_to_save=["lm_head"])) == plain


def test_another_dtype_is_the_same_base(base_folder):
    half, full = (identify_base(load_base_model(base_folder, dtype=d)) for d in (torch.bfloat16, torch.float32))
    assert half["base"]["tensors"] == full["base"]["tensors"]


def test_a_moved_base_is_the_same_base(model, base_folder, tmp_path):
    shutil.copytree(base_folder, tmp_path / "moved")
    moved = identify(adapted(str(tmp_path / "moved")))
    assert moved["base"]["name"] != identify(model)["base"]["name"]
    assert differences(identify(model), moved) == []


def test_without_digests_the_name_counts():
    one = {"base": {"name": "a/b", "revision": "1", "tensors": None}}
    other = {"base": {"name": "a/b", "revision": "2", "tensors": "f" * 64}}
    assert found_fields(one, other) == ["base.revision"]


def test_another_device_may_round_otherwise():
    def base(**options):
        return {"base": {"tensors": "1", "quantized_tensors": "2", "quantizer": "0.50 on cpu", **options}}

    assert found_fields(base(), base(quantized_tensors="3")) == ["base.quantized_tensors"]
    assert found_fields(base(), base(quantized_tensors="3", quantizer="0.50 on cuda")) == []
    assert found_fields(base(), base(tensors="3", quantizer="0.50 on cuda")) == ["base.tensors"]


@pytest.mark.parametrize("element", ["first", "middle", "last", "scale"])
def test_one_bit_of_the_base_tells(base_folder, element):
    before, after = load_base_model(base_folder), load_base_model(base_folder)
    weight = after.model.layers[1].mlp.down_proj.weight
    data = weight.quant_state.absmax if element == "scale" else weight.data
    index = {"first": 0, "middle": data.numel() // 2, "last": -1, "scale": 3}[element]
    data.view(-1)[index] ^= 1
    assert found_fields(identify_base(before), identify_base(after)) == ["base.quantized_tensors"]


def test_swapped_tensors_and_swapped_words_tell(base_folder):
    before, after = load_base_model(base_folder, quantization=None), load_base_model(base_folder, quantization=None)
    q, o = (getattr(after.model.layers[0].self_attn, name).weight for name in ("q_proj", "o_proj"))
    q.data, o.data = o.data, q.data
    assert found_fields(identify_base(before), identify_base(after)) == ["base.tensors"]
    q.data, o.data = o.data, q.data
    assert found_fields(identify_base(before), identify_base(after)) == []
    q.data = q.data.flip(0)
    assert found_fields(identify_base(before), identify_base(after)) == ["base.tensors"]


# Tokenizer and template


@pytest.mark.parametrize("style", ["chatml", "llama3", "gemma", "qwen", "mistral", "phi"])
def test_a_tokenizer_survives_saving(style, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = tiny_tokenizer(style)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded(["a", "bcd efg"], padding=True, truncation=True, max_length=3)  # leaves settings behind
    assert identify_tokenizer(loaded) == identify_tokenizer(tokenizer)


def test_another_vocabulary_and_another_template_tell(tokenizer):
    mine = identify_tokenizer(tokenizer)
    assert found_fields(mine, identify_tokenizer(tiny_tokenizer("chatml", vocab_size=300))) == ["tokenizer"]
    other = tiny_tokenizer("chatml", chat_template="{{ messages[0].content }}")
    assert found_fields(mine, identify_tokenizer(other)) == ["chat_template"]


def test_package_versions():
    versions = package_versions()
    assert versions["torch"] == torch.__version__.partition("+")[0] or versions["torch"] == torch.__version__
    assert {"python", "peft", "transformers", "bitsandbytes", "lightning"} < set(versions)


# An adapter loads only where it belongs, or by an explicit override


@pytest.fixture(scope="module")
def adapter_folder(model, tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")

    def write(staging):
        model.save_pretrained(staging, save_embedding_layers=False)
        tokenizer.save_pretrained(staging)

    return LocalStore(root).publish("good", write, {"identity": identify(model, tokenizer, "data-1")}).path


@pytest.fixture
def copy(adapter_folder, tmp_path):
    return shutil.copytree(adapter_folder, tmp_path / "copy")


def test_an_adapter_belongs_to_its_base(adapter_folder, base_folder, model, tokenizer):
    assert (
        check_adapter(adapter_folder, load_base_model(base_folder), tokenizer).metadata["identity"]["data"] == "data-1"
    )
    assert check_adapter(adapter_folder, model).path == adapter_folder


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_an_adapter_that_moves_the_base_belongs_to_it(base_folder, tokenizer, tmp_path, quantization):
    """OLoRA takes a part out of the base when it is made, and again when it is loaded."""
    lora = {"init_lora_weights": "olora", "quantization": quantization}
    folder = write_adapter(tmp_path / "olora", base_folder, tokenizer, manifest=True, **lora)
    base = load_base_model(base_folder, quantization=quantization)
    assert check_adapter(folder, base, tokenizer).path == folder
    model = load_adapter(base, folder)
    assert check_adapter(folder, model, tokenizer).path == folder

    other = other_weights(tmp_path, tokenizer, "self_attn.q_proj", quantization)
    other.config._name_or_path = base_folder
    check_adapter(folder, other, tokenizer)  # nothing is known yet
    moved = load_adapter(other, folder)
    with pytest.raises(IdentityMismatchError, match=r"base\.(quantized_)?tensors: published with"):
        check_adapter(folder, moved, tokenizer)


def test_a_folder_of_others_proves_nothing(model, tmp_path):
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert check_adapter(tmp_path, model) is None


def other_weights(tmp_path, tokenizer, where="embed_tokens", quantization="nf4"):
    base = load_base_model(save_tiny_model(tmp_path / "b", tokenizer=tokenizer), quantization=None)
    next(p for name, p in base.named_parameters() if where in name).data[5, 7] += 0.5
    base.save_pretrained(tmp_path / "c")
    return load_base_model(str(tmp_path / "c"), quantization=quantization)


def edited_file(name, old, new):
    def edit(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return edit


def flipped(folder):
    data = bytearray((folder / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(data)


def not_a_number(folder):
    state = load_file(folder / "adapter_model.safetensors")
    next(iter(state.values())).view(-1)[0] = float("nan")
    save_file(state, folder / "adapter_model.safetensors")


def fewer_tensors(folder):
    state = load_file(folder / "adapter_model.safetensors")
    state.pop(sorted(state)[0])
    save_file(state, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("harm", "file"),
    [
        (edited_file("adapter_config.json", '"lora_alpha": 8', '"lora_alpha": 9'), "adapter_config.json"),
        (edited_file("chat_template.jinja", "assistant", "Assistant"), "chat_template.jinja"),
        (edited_file("manifest.json", '"num_hidden_layers": 2', '"num_hidden_layers": 3'), "manifest.json"),
        (flipped, "adapter_model.safetensors"),
        (not_a_number, "adapter_model.safetensors"),
        (fewer_tensors, "adapter_model.safetensors"),
    ],
    ids=["alpha", "template", "manifest", "flipped", "nan", "fewer"],
)
def test_damaged_adapters_are_refused(copy, model, harm, file):
    harm(copy)
    with pytest.raises(DamagedCheckpointError, match=file):
        check_adapter(copy, model)


@pytest.mark.parametrize(
    ("base", "field"),
    [
        (other_weights, "base.tensors"),
        (
            lambda path, tokenizer: load_base_model(save_tiny_model(path, tokenizer=tokenizer, num_hidden_layers=1)),
            "base.num_hidden_layers: published with 2, found 1",
        ),
        (
            lambda path, tokenizer: load_base_model(save_tiny_model(path, "qwen2", tokenizer=tokenizer)),
            "base.model_type",
        ),
        (
            lambda path, tokenizer: load_base_model(save_tiny_model(path, tokenizer=tokenizer), quantization=None),
            "quantization",
        ),
    ],
    ids=["other weights", "a layer fewer", "other family", "not quantised"],
)
def test_foreign_bases_are_refused(adapter_folder, tokenizer, tmp_path, base, field):
    other = base(tmp_path, tokenizer)
    with pytest.raises(IdentityMismatchError, match=field):
        check_adapter(adapter_folder, other, tokenizer)
    part = field.partition(".")[0].partition(":")[0]
    assert check_adapter(adapter_folder, other, tokenizer, allow=(part, "base")).path == adapter_folder


def test_a_foreign_tokenizer_is_refused(adapter_folder, model):
    with pytest.raises(IdentityMismatchError, match=r"tokenizer: published with.*\n.*allow_mismatch: \[tokenizer\]"):
        check_adapter(adapter_folder, model, tiny_tokenizer("chatml", vocab_size=300))


def test_an_override_names_a_field():
    with pytest.raises(ValueError, match=r"names everything; allowed are base, quantization"):
        refuse_differences("x", {}, {}, allow=("everything",))
