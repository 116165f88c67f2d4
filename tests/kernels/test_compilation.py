"""Compiled decoder layers: the same gradients, and no further graph for other batches or more layers."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from tiny_models import random_batch, save_tiny_model
from tiny_varlen import register_on_cpu
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, MixtralConfig

from lightning_qlora.kernels import attention, varlen
from lightning_qlora.kernels.attention import (
    DOCUMENT_ATTENTION,
    packed_attention_arguments,
    use_document_attention,
    use_graph_attention,
)
from lightning_qlora.kernels.checkpointing import MixedPlan
from lightning_qlora.kernels.compilation import compile_decoder, compile_layers, compile_parts
from lightning_qlora.kernels.lora import fuse_lora
from lightning_qlora.model import attach_adapters, checkpointed_layers, load_base_model, set_activation_checkpointing

BATCHES = ((9, 5), (20, 3, 4), (31,), (7, 7, 2, 2))

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # dynamo asks every input for it
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def varlen_kernel(monkeypatch):
    """As on a GPU: torch's varlen operators do the attention, and are asked to."""
    register_on_cpu()
    monkeypatch.setattr(varlen, "_DTYPES", (torch.float32,))
    monkeypatch.setattr(attention, "is_trusted", lambda *kind: True)

    def on_gpu(input_ids, lengths):
        arguments = packed_attention_arguments(input_ids, lengths)
        arguments["documents"].starts = varlen.document_offsets(lengths, input_ids.device)
        return arguments

    return on_gpu


def build(folder, fused, num_layers=3, family="llama"):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    options = {"layer_types": ["sliding_attention", "full_attention"] * 2} if family == "gemma3_text" else {}
    save_tiny_model(folder, family, num_hidden_layers=len(options.get("layer_types", range(num_layers))), **options)
    model = attach_adapters(load_base_model(str(folder), dtype=torch.float32), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    use_document_attention(model.get_base_model())
    if fused:
        fuse_lora(model)
    return model


def hidden_states(model, lengths, arguments_of=packed_attention_arguments):
    batch = random_batch(lengths)
    arguments = arguments_of(batch["input_ids"], batch["document_lengths"])
    return (
        model.get_base_model()
        .get_decoder()(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **arguments)
        .last_hidden_state
    )


def gradients(model, lengths, arguments_of=packed_attention_arguments):
    states = hidden_states(model, lengths, arguments_of)
    (states * torch.linspace(-1, 1, states.numel()).reshape(states.shape).sin()).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"": states.detach(), **found}


def check(model, plan, num_graphs, arguments_of=packed_attention_arguments, backend="aot_eager"):
    """Compile, and compare every batch; graphs may be made for the first batch only."""
    base = model.get_base_model()
    base.set_attn_implementation(DOCUMENT_ATTENTION)
    expected = [gradients(model, lengths) for lengths in BATCHES]
    if arguments_of is not packed_attention_arguments:
        assert use_graph_attention(base, torch.float32)
    set_activation_checkpointing(base, plan)
    compile_layers(checkpointed_layers(base), plan, backend=backend)
    for lengths, reference in zip(BATCHES, expected, strict=True):
        found = gradients(model, lengths, arguments_of)
        assert counters["stats"]["unique_graphs"] == num_graphs
        assert found.keys() == reference.keys()
        for name, value in reference.items():
            assert (found[name] - value).norm() <= 1e-4 * value.norm(), name


def test_one_graph_a_layer_where_a_kernel_takes_all_documents(tmp_path, varlen_kernel):
    # Two: what goes into the first layer requires no gradient.
    check(build(tmp_path, fused=True), MixedPlan("full", 2, "none"), 2, varlen_kernel)
    assert not counters["graph_break"]


def test_elsewhere_graphs_end_before_attention_and_begin_behind_it(tmp_path):
    check(build(tmp_path, fused=True), MixedPlan("full", 2, "none"), 7, backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["none", "full", "offload", MixedPlan("offload", 2, "none")], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3", "mistral"])
@pytest.mark.parametrize("fused", [False, True])
def test_families_and_plans(tmp_path, family, plan, fused, varlen_kernel):
    model = build(tmp_path, fused, family=family)
    check(model, plan, 3 if family == "gemma3_text" else 2, varlen_kernel)  # its layers are of two kinds


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [True, False])
def test_inductor(tmp_path, kernel, varlen_kernel):
    model = build(tmp_path, fused=False)
    if kernel:
        check(model, "full", 2, varlen_kernel, "inductor")
    else:
        check(model, "full", 7, backend="inductor")


@pytest.mark.slow
def test_more_layers_make_no_more_graphs_and_evaluation_its_own(tmp_path, varlen_kernel):
    model = build(tmp_path, fused=True, num_layers=12)
    base = model.get_base_model()
    use_graph_attention(base, torch.float32)
    compile_layers(checkpointed_layers(base), "none", backend="aot_eager")
    gradients(model, (9, 5), varlen_kernel)
    assert counters["stats"]["unique_graphs"] == 2
    model.eval()
    with torch.no_grad():
        for lengths in BATCHES:
            hidden_states(model, lengths, varlen_kernel)
            assert counters["stats"]["unique_graphs"] == 3
        ids = torch.randint(3, 500, (2, 5))
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, use_cache=True)
    model.train()
    gradients(model, (30, 4), varlen_kernel)
    assert counters["stats"]["unique_graphs"] == 3


def test_layers_that_keep_operators_one_by_one_are_left_alone(tmp_path):
    layers = checkpointed_layers(build(tmp_path, False, num_layers=2).get_base_model())
    assert compile_layers(layers, "selective") == compile_parts(layers, "selective") == 0
    assert compile_layers(layers, MixedPlan("selective", 1, "none"), backend="aot_eager") == 1
    assert ["forward" in vars(layer) for layer in layers] == [False, True]


def test_attention_stays_outside_where_no_kernel_is_trusted(tmp_path):
    base = build(tmp_path, False, num_layers=1).get_base_model()
    assert not use_graph_attention(base, torch.float32)
    assert base.config._attn_implementation == DOCUMENT_ATTENTION


@pytest.mark.parametrize(
    ("config", "parts"), [(LlamaConfig, False), (MixtralConfig, True), (GptOssConfig, True)], ids=lambda x: str(x)[-16:]
)
def test_layers_that_decide_by_numbers_are_compiled_in_parts(config, parts, caplog):
    sizes = {"num_hidden_layers": 1, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(config(**sizes, num_attention_heads=2, num_key_value_heads=2))
    use_document_attention(model)
    layers = checkpointed_layers(model)
    with caplog.at_level("INFO"):
        compile_decoder(model, layers, "full", dtype=torch.float32, backend="aot_eager")
    assert ("forward" in vars(layers[0])) is not parts
    assert (layers[0].input_layernorm._compiled_call_impl is not None) is parts
    assert any("only norms and MLPs" in record.getMessage() for record in caplog.records) is parts


@pytest.mark.parametrize("plan", ["none", "full"])
def test_parts_alone(tmp_path, plan):
    model = build(tmp_path, True, num_layers=2)
    expected = [gradients(model, lengths) for lengths in BATCHES]
    layers = checkpointed_layers(model.get_base_model())
    set_activation_checkpointing(model.get_base_model(), plan)
    assert compile_parts(layers, plan, backend="aot_eager") == 6
    graphs = []
    for lengths, reference in zip(BATCHES, expected, strict=True):
        found = gradients(model, lengths)
        graphs.append(counters["stats"]["unique_graphs"])
        for name, value in reference.items():
            assert (found[name] - value).norm() <= 1e-4 * value.norm(), name
    assert graphs[0] > 0
    assert len(set(graphs)) == 1
    assert not counters["graph_break"]
