"""Fused LoRA beside PEFT's own code: the same numbers, and PEFT's code wherever it is not plain LoRA."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig
from tiny_lora import (
    Dequantised,
    FusedCalls,
    assert_as_near_to_float32,
    assert_equal_steps,
    build,
    check_operators,
    distance,
    gradients_of,
    scramble,
    step,
)
from tiny_models import random_batch, save_tiny_model
from transformers import BitsAndBytesConfig

from lightning_qlora.kernels.checkpointing import PLANS
from lightning_qlora.kernels.dequantization import constants_of
from lightning_qlora.kernels.lora import FusedLinear4bit, fuse_lora, fuse_lora_if_equal, is_fused
from lightning_qlora.model import attach_adapters, load_base_model, save_adapter, set_activation_checkpointing

LINEARS = {"phi3": 4}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True, "rank_pattern": {"k_proj": 7, "up_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
        ("llama", {"target_modules": ["q_proj", "v_proj", "up_proj"]}),
        ("qwen2", {}),  # biases
        ("gemma3_text", {}),
        ("phi3", {}),  # projections that are one already
    ],
)
def test_the_fused_step_is_pefts(tmp_path, family, options):
    model = build(tmp_path, family, **options)
    plain = step(model)
    switched = fuse_lora(model)
    fused = step(model)
    assert plain[2] == 0
    wanted = options.get("target_modules")
    linears = len(wanted) if isinstance(wanted, list) else LINEARS.get(family, 7)
    assert switched == 2 * linears
    assert fused[2] == 2 * {7: 4, 4: 4, 3: 3}[linears]  # q, k, v together, and gate, up
    assert_equal_steps(fused, plain, 1e-5)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_way_of_storing_four_bits(tmp_path, nested, kind):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = build(tmp_path, quantization=quantization)
    plain = step(model)
    fuse_lora(model)
    fused = step(model)
    assert fused[2] == 8
    assert_equal_steps(fused, plain, 1e-5)


def test_mixed_precision_is_as_near_to_float32_as_pefts(tmp_path):
    assert_as_near_to_float32(tmp_path, 1.1)


@pytest.mark.parametrize(
    "options",
    [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj"]}],
    ids=lambda options: next(iter(options)),
)
def test_what_is_no_plain_lora_runs_pefts_code(tmp_path, options):
    model = build(tmp_path, "qwen2", **options)
    torch.manual_seed(5)
    plain = step(model)
    fuse_lora(model)
    torch.manual_seed(5)
    fused = step(model)
    assert fused[2] == 0
    assert_equal_steps(fused, plain, 0.0)


def test_unquantised_layers_are_left_alone(tmp_path):
    assert fuse_lora(build(tmp_path, quantization=None)) == 0


def test_adapters_in_another_dtype_than_the_products_run_pefts_code(tmp_path):
    model = build(tmp_path, dtype=torch.bfloat16)
    fuse_lora(model)
    assert step(model)[2] == 0  # no autocast: PEFT computes the adapters in float32
    assert step(model, torch.bfloat16)[2] == 8


def test_disabled_other_merged_and_inactive_adapters_are_respected(tmp_path):
    model = build(tmp_path)
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    scramble(model)
    fused = copy.deepcopy(model)
    fuse_lora(fused)
    ids = random_batch((8,))["input_ids"]

    def both(context):
        outputs = []
        for each in (model, fused):
            with FusedCalls() as calls, context(each):
                outputs.append(each(input_ids=ids, use_cache=False).logits.detach())
        assert distance(*outputs) <= 1e-5
        return outputs[1], calls.count

    active, count = both(lambda each: nullcontext())
    assert count == 8
    disabled, count = both(lambda each: each.disable_adapter())
    assert count == 0
    assert distance(disabled, active) > 1e-3
    for each in (model, fused):
        each.set_adapter("other")
    other, count = both(lambda each: nullcontext())
    assert count == 4  # q alone, since k and v have no such adapter, and down
    assert distance(other, active) > 1e-3
    for each in (model, fused):
        each.set_adapter("default")
    again, _ = both(lambda each: nullcontext())
    assert torch.equal(again, active)
    with torch.no_grad():
        assert both(lambda each: nullcontext())[1] == 0


def test_evaluation_runs_pefts_code_and_copies_are_independent(tmp_path):
    model = build(tmp_path)
    fuse_lora(model)
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    ids = random_batch((8,))["input_ids"]
    with model.disable_adapter():
        bare = model(input_ids=ids, use_cache=False).logits
    assert distance(twin(input_ids=ids, use_cache=False).logits, bare) <= 1e-6
    model.eval()
    with FusedCalls() as calls:
        model(input_ids=ids, use_cache=False)
    assert calls.count == 0


@pytest.mark.parametrize("plan", ["selective", "full", "offload"])
def test_plans_of_checkpointing_change_no_bit(tmp_path, plan):
    model = build(tmp_path)
    fuse_lora(model)
    expected = step(model)
    set_activation_checkpointing(model.get_base_model(), plan)
    found = step(model)
    # Gate and up are one call of a layer; what ends it, the last product, is made once.
    assert found[2] == (10 if plan == "selective" else 14)
    assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items())


@pytest.mark.parametrize("plan", ["full", "offload"])
@pytest.mark.parametrize(
    ("family", "linears", "recomputed"),
    [("llama", 7, 6), ("qwen3", 7, 6), ("phi3", 4, 3), ("gemma3_text", 7, 7)],  # Gemma's last norm reads the output
)
def test_recomputation_ends_before_the_last_product(tmp_path, family, linears, recomputed, plan):
    model = build(tmp_path, family, num_hidden_layers=3)
    fuse_lora(model)
    expected, forward, backward = gradients_of(model)
    assert (forward, backward) == (3 * linears, 0)
    set_activation_checkpointing(model.get_base_model(), plan)
    found, forward, backward = gradients_of(model)
    assert (forward, backward) == (3 * linears, 3 * recomputed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("plan", PLANS)
def test_a_graph_that_is_retained_gives_its_gradients_twice(tmp_path, plan):
    model = build(tmp_path, dtype=torch.bfloat16)
    fuse_lora(model)
    once, *_ = gradients_of(model, torch.bfloat16)
    set_activation_checkpointing(model.get_base_model(), plan)
    twice, *_ = gradients_of(model, torch.bfloat16, passes=2)
    assert once.keys() == twice.keys()
    assert all(torch.equal(twice[name], 2 * gradient) for name, gradient in once.items())


def test_an_input_that_needs_no_gradient_gets_no_product(tmp_path):
    model = build(tmp_path)
    fuse_lora(model)
    mlp = model.get_base_model().model.layers[0].mlp
    x = torch.randn(5, 64)
    counts = {}
    for needed in (False, True):
        x = x.detach().requires_grad_(needed)
        output = mlp.gate_proj(x).sum() + mlp.up_proj(x).sum()
        with Dequantised() as dequantised:
            output.backward()
        counts[needed] = dequantised.count
        assert (x.grad is not None) == needed
    assert counts == {False: 0, True: 2}


def test_what_is_saved_stays_as_it_was(tmp_path):
    model = build(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_adapter(model, tmp_path / "plain")
    fuse_lora(model)
    assert is_fused(model)
    assert model.state_dict().keys() == before.keys()
    save_adapter(model, tmp_path / "fused")
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "fused" / file.name).read_bytes() == file.read_bytes()


def test_an_output_that_nobody_uses_and_the_same_input_twice(tmp_path):
    model = build(tmp_path)
    fuse_lora(model)
    attention = model.get_base_model().model.layers[0].self_attn
    assert isinstance(attention.q_proj, FusedLinear4bit)
    x = torch.randn(2, 3, 64, requires_grad=True)
    attention.q_proj(x)  # k and v are computed, and never asked for
    first, second = attention.q_proj(x), attention.q_proj(x)
    assert torch.equal(first, second)
    key = attention.k_proj(x)
    (first.sum() + key.sum()).backward()
    gradient, x.grad = x.grad, None
    model.zero_grad()
    plain = super(FusedLinear4bit, attention.q_proj).forward(x).sum()
    (plain + super(FusedLinear4bit, attention.k_proj).forward(x).sum()).backward()
    assert distance(gradient, x.grad) <= 1e-5


def test_the_operator_keeps_torchs_rules(tmp_path):
    model = build(tmp_path)
    fuse_lora(model)
    member = model.get_base_model().model.layers[0].mlp.down_proj
    state = member.base_layer.weight.quant_state
    a, b = member.lora_A["default"].weight, member.lora_B["default"].weight
    x = torch.randn(5, a.shape[1], requires_grad=True)
    weights, constants = [member.base_layer.weight.data], constants_of(state)
    check_operators(x, weights, constants, [a], [b], [2.0], inside=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_results_are_asked_for_before_it_is_used(tmp_path, dtype, caplog):
    model = build(tmp_path, dtype=dtype)
    state = torch.get_rng_state()
    with torch.device("meta"):  # Lightning makes the accelerator the default device while a model is built
        assert fuse_lora_if_equal(model)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert step(model, None if dtype is torch.float32 else dtype)[2] == 8


@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_results_that_differ_are_refused_and_said(tmp_path, wrong, monkeypatch, caplog):
    from lightning_qlora.kernels import lora

    model = build(tmp_path)
    plain = step(model)
    right = lora._products
    monkeypatch.setattr(lora, "_products", lambda x, members: [wrong * output for output in right(x, members)])
    with caplog.at_level("INFO"):
        assert not fuse_lora_if_equal(model)
    assert not is_fused(model)
    assert any("PEFT's own code is used" in record.getMessage() for record in caplog.records)
    assert_equal_steps(step(model), plain, 0.0)


@pytest.mark.gpu
def test_the_fused_step_on_the_gpu(tmp_path):
    folder = save_tiny_model(tmp_path / "base", hidden_size=512, intermediate_size=1024)
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        base = load_base_model(folder, device=torch.device("cuda"))
        model = attach_adapters(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
        scramble(model)
        if fused:
            fuse_lora(model)
        ids = torch.randint(3, 500, (1, 400), generator=torch.Generator().manual_seed(3)).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0].float(), ids[0]).backward()
        found.append((logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    one, two = (torch.cat([g.flatten() for g in gradients.values()]) for _, gradients in found)
    assert torch.cosine_similarity(one, two, 0) >= 0.999
    assert distance(found[1][0], found[0][0]) <= 2e-2
