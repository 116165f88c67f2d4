"""The two ways of adding adapters, after the base products and inside them: the same step, and the cheaper is taken."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from tiny_lora import (
    RULES,
    assert_as_near_to_float32,
    assert_equal_steps,
    build,
    check_operators,
    distance,
    gradients_of,
    scramble,
    step,
)
from tiny_models import save_tiny_model, tiny_config
from torch import nn
from transformers import BitsAndBytesConfig

from lightning_qlora.kernels import dequantization, lora, lora_products
from lightning_qlora.kernels.dequantization import constants_of
from lightning_qlora.kernels.lora import fuse_lora, fuse_lora_if_equal, is_fused
from lightning_qlora.kernels.lora_products import Ways, cheaper_ways, choose_ways, pack_adapters
from lightning_qlora.memory import build_skeleton, simulate_step
from lightning_qlora.memory.tracking import MemoryTracker
from lightning_qlora.model import attach_adapters, load_base_model, set_activation_checkpointing

BOTH = [Ways(True, False), Ways(False, True), Ways(True, True)]


@pytest.fixture(params=BOTH, ids=lambda ways: "-".join(name for name, inside in ways._asdict().items() if inside))
def inside(request, monkeypatch):
    """Adapters inside the products, as on a GPU; here bitsandbytes dequantises and the result is copied."""
    chosen = []

    def choose(x, ranks, widths, *rest):
        chosen.append(len(widths))
        return request.param

    monkeypatch.setattr(lora, "choose_ways", choose)
    yield request.param
    assert chosen


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True, "rank_pattern": {"k_proj": 7, "up_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
        ("llama", {"target_modules": ["q_proj", "v_proj", "up_proj"]}),
        ("qwen2", {}),  # biases
        ("phi3", {}),
    ],
)
def test_the_step_is_pefts(tmp_path, inside, family, options):
    model = build(tmp_path, family, **options)
    plain = step(model)
    fuse_lora(model)
    found = step(model)
    assert found[2] > 0
    assert_equal_steps(found, plain, 1e-5)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_functions_take_the_step_of_the_operators(tmp_path, inside, autocast):
    model = build(tmp_path, dtype=autocast or torch.float32, rank_pattern={"k_proj": 7})
    fuse_lora(model)
    operators, functions = (step(model, autocast, looked_at) for looked_at in (True, False))
    assert (operators[2], functions[2]) == (8, 0)
    assert_equal_steps(functions, operators, 0.0)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_way_of_storing_four_bits(tmp_path, inside, nested, kind):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = build(tmp_path, quantization=quantization)
    plain = step(model)
    fuse_lora(model)
    assert_equal_steps(step(model), plain, 1e-5)


def test_mixed_precision_is_as_near_to_float32_as_pefts(tmp_path, inside):
    assert_as_near_to_float32(tmp_path, 1.25)


@pytest.mark.parametrize("plan", ["selective", "full"])
def test_plans_change_no_bit_and_recomputation_ends_early(tmp_path, inside, plan):
    model = build(tmp_path)
    fuse_lora(model)
    expected, *_ = gradients_of(model)
    set_activation_checkpointing(model.get_base_model(), plan)
    found, forward, backward = gradients_of(model)
    assert (forward, backward) == (14, 4 if plan == "selective" else 12)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_compiled_parts_take_the_same_way(tmp_path, inside):
    model = build(tmp_path)
    fuse_lora(model)
    mlp = model.get_base_model().model.layers[0].mlp
    found = []
    for compiled in (False, True):
        if compiled:
            mlp.compile(backend="aot_eager", dynamic=True, fullgraph=True)
        x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        mlp(x).sin().sum().backward()
        found.append([x.grad, *(p.grad for p in mlp.parameters() if p.grad is not None)])
        mlp.zero_grad()
    torch._dynamo.reset()
    assert len(found[0]) == len(found[1]) == 7
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_the_operators_keep_torchs_rules(tmp_path):
    model = build(tmp_path)
    attention = model.get_base_model().model.layers[0].self_attn
    members = [attention.q_proj, attention.k_proj]
    weights = [member.base_layer.weight.data for member in members]
    constants = [each for member in members for each in constants_of(member.base_layer.weight.quant_state)]
    a, b = (
        [each["default"].weight for each in pair] for pair in zip(*((m.lora_A, m.lora_B) for m in members), strict=True)
    )
    x = torch.randn(5, 64, requires_grad=True)
    check_operators(x, weights, constants, a, b, [2.0, 3.0], inside=True)
    heights = [each.shape[0] for each in b]
    for below in ([], [each.detach() for each in a]):
        stacked = (weights, constants, below, heights, 64, 64, "nf4", torch.float32)
        torch.library.opcheck(lora_products._stack_4bit, stacked, test_utils=RULES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_adapters_are_all_a_and_a_block_of_each_b(dtype):
    """So that one product with all B is each one's, and its transpose brings each output's gradient to its own."""
    torch.manual_seed(0)
    a, b = [torch.randn(r, 6) for r in (2, 3, 1)], [torch.randn(o, r) for o, r in ((4, 2), (5, 3), (2, 1))]
    for number in (1, 3):
        scales = [2.0, -0.5, 3.0][:number]
        a_RI, b_OR = pack_adapters(a[:number], b[:number], scales, dtype)
        assert torch.equal(a_RI, torch.cat(a[:number]).to(dtype))
        scaled = [(each * scale).to(dtype) for each, scale in zip(b[:number], scales, strict=True)]
        assert torch.equal(b_OR, torch.block_diag(*scaled))


# The choice


def test_the_way_that_moves_fewer_bytes_is_taken():
    assert cheaper_ways(4096, [4096, 1024, 1024]) == Ways(True, True)
    assert cheaper_ways(4096, [4096]) == Ways(False, False)
    assert cheaper_ways(4096, [14336, 14336]) == Ways(True, False)
    assert cheaper_ways(14336, [4096]) == Ways(False, True)


class OnGPU(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(
    ("width", "ranks", "trusted", "expected"),
    [
        (64, [8, 8, 8], True, Ways(True, True)),
        (64, [8, 8, 8], False, Ways(False, False)),
        (64, [4, 4, 4], True, Ways(False, False)),  # rows would not begin where products are fast
        (64, [4, 4, 8], True, Ways(True, True)),
        (68, [8, 8, 8], True, Ways(False, False)),
    ],
)
def test_adapters_stay_outside_where_rows_are_not_aligned_or_would_be_copied(
    monkeypatch, width, ranks, trusted, expected
):
    monkeypatch.setattr(lora_products, "has_kernel", lambda *kind: trusted)
    x = torch.zeros(5, width)
    constants = [torch.zeros(4)] * 3
    assert choose_ways(x.as_subclass(OnGPU), ranks, [64, 32, 32], constants, 64, "nf4") == expected
    assert choose_ways(x, ranks, [64, 32, 32], constants, 64, "nf4") == Ways(False, False)


@pytest.mark.parametrize("which", ["q_proj", "k_proj", "v_proj"])
def test_the_self_check_covers_every_member_of_a_group(tmp_path, monkeypatch, which, caplog):
    model = build(tmp_path)
    right, index = lora._products, ["q_proj", "k_proj", "v_proj"].index(which)

    def wrong(x, members):
        outputs = right(x, members)
        if len(members) == 3:
            outputs[index] = outputs[index] * 1.1
        return outputs

    assert fuse_lora_if_equal(model)
    lora._unfuse_lora(model)
    monkeypatch.setattr(lora, "_products", wrong)
    with caplog.at_level("INFO"):
        assert not fuse_lora_if_equal(model)
    assert not is_fused(model)
    assert "PEFT's own code is used" in caplog.text


# Memory


@pytest.mark.parametrize("inside", [True, False])
def test_what_the_products_hold_is_counted(inside):
    num_tokens, width, heights, rank = 40, 256, (128, 64), 8
    with torch.device("meta"):
        x, low = torch.empty(num_tokens, width), torch.empty(num_tokens, rank * len(heights))
        shapes = [torch.empty(()).expand(num_tokens, height) for height in heights]
        weights = [torch.empty(height * width // 2, 1, dtype=torch.uint8) for height in heights]
        constants = [torch.empty(height * width // 64) for height in heights]
        b = torch.empty(sum(heights), rank * len(heights))
    with MemoryTracker([x, low, *shapes, *weights, *constants, b]) as tracker:
        outputs = torch.ops.lightning_qlora.lora_products(
            x, low, shapes, weights, constants, [], b, list(heights), 64, "nf4", inside
        )
    kept = sum(output.numel() for output in outputs)
    longest = width + rank * len(heights) if inside else width
    copied = num_tokens * longest if inside else 0
    assert tracker.live == 4 * kept
    assert tracker.take_peak() == 4 * (kept + copied + max(heights) * longest + max(heights) * width // 64)


def test_a_simulated_gpu_takes_the_way_a_gpu_does(tmp_path, monkeypatch):
    config = tiny_config("llama", hidden_size=128, intermediate_size=384)
    skeleton = build_skeleton(config, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    fuse_lora(skeleton)
    chosen: list[Ways] = []
    choose = lora.choose_ways
    monkeypatch.setattr(lora, "choose_ways", lambda *arguments: chosen.append(choose(*arguments)) or chosen[-1])
    found = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # then it has what this machine has
    for device in ("cpu", "cuda"):
        for kernel in (None, nn.Identity()):
            dequantization._is_trusted.cache_clear()
            monkeypatch.setattr(dequantization, "triton_dequantize", kernel)
            chosen.clear()
            found[device, kernel is not None] = simulate_step(
                skeleton, (512,), 100, device=device, dtype=torch.bfloat16
            )
            inside = {Ways(True, True), Ways(False, False), Ways(True, False), Ways(False, True)}  # one a group
            assert set(chosen) == (inside if device == "cuda" and kernel is not None else {Ways(False, False)})
    assert found["cpu", True] == found["cpu", False]
    assert found["cuda", True].kept == found["cuda", False].kept


@pytest.mark.gpu
def test_both_ways_on_the_gpu(tmp_path, monkeypatch):
    folder = save_tiny_model(tmp_path / "base", hidden_size=512, intermediate_size=1024)
    ids = torch.randint(3, 500, (1, 3000), generator=torch.Generator().manual_seed(3)).cuda()
    choose, found = lora.choose_ways, []
    for pick in (lambda *arguments: Ways(False, False), lambda *arguments: Ways(True, True), choose):
        monkeypatch.setattr(lora, "choose_ways", pick)
        torch.manual_seed(0)
        base = load_base_model(folder, device=torch.device("cuda"))
        model = attach_adapters(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
        scramble(model)
        fuse_lora(model)
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0].float(), ids[0]).backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((logits.detach(), gradients))
    for logits, gradients in found[1:]:
        assert distance(logits, found[0][0]) <= 2e-2
        assert torch.cosine_similarity(gradients, found[0][1], 0) >= 0.999
