"""Norms, gated activations and rotations by one kernel each: the same as each family's own code, in less memory."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from tiny_lora import build, distance, step
from tiny_models import save_tiny_model, tiny_config
from transformers import AutoModelForCausalLM

from lightning_qlora.kernels import elementwise
from lightning_qlora.kernels.elementwise import (
    fuse_elementwise,
    gated_activation,
    has_fused_parts,
    rms_norm,
    rotary_embedding,
    source_of,
)
from lightning_qlora.kernels.lora import fuse_lora
from lightning_qlora.memory import build_skeleton, simulate_step
from lightning_qlora.model import attach_adapters, load_base_model, set_activation_checkpointing

KINDS = [("norm", False), ("norm", True), ("activation", False), ("activation", True), ("rotation", False)]


@pytest.fixture
def interpreted(interpret, monkeypatch):
    """The kernels, interpreted, and taken for those of a GPU."""
    module = interpret("elementwise_triton")
    module._add = module.tl.standard._sum_combine  # which the interpreter knows as a whole, and is fast with
    monkeypatch.setattr(elementwise, "triton_kernels", module)
    monkeypatch.setattr(elementwise, "on_gpu", lambda tensor: True)
    elementwise._is_trusted.cache_clear()
    yield module
    elementwise._is_trusted.cache_clear()


def kind(name, option, dtype=torch.float32, device="cpu"):
    return elementwise._Kind(name, torch.device(device), dtype, option)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "option"), KINDS)
def test_kernels_compute_their_arithmetic_forward_and_backward(interpreted, name, option, dtype):
    assert elementwise._compare(kind(name, option, dtype)) is None


@pytest.mark.parametrize("width", [1, 8, 96, 4096, 5000])
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_norms_of_any_shape(interpreted, rows, width):
    x, weight = torch.randn(rows, width, dtype=torch.float32), torch.randn(width)
    torch.testing.assert_close(
        rms_norm(x, weight, 1e-6), torch.nn.functional.rms_norm(x, (width,), weight, 1e-6), rtol=1e-5, atol=1e-6
    )


def test_rotations_of_any_layout(interpreted):
    query, key = torch.randn(2, 3, 5, 8)[:, :, ::2], torch.randn(2, 3, 1, 8).transpose(1, 2).expand(2, 1, 3, 8)
    cos, sin = torch.randn(2, 1, 3, 8)
    found, expected = (each(query, key, cos, sin) for each in (rotary_embedding, elementwise._plain_rotation))
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two)
        assert one.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "cohere"])
def test_a_family_computes_what_it_did(interpreted, family, tmp_path):
    model = build(tmp_path, family, quantization=None)
    logits, gradients, _ = step(model)
    counts = fuse_elementwise(model)
    assert has_fused_parts(model) == bool(sum(counts.values())) is True
    again, found, _ = step(model)
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-5)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert distance(found[name], gradient) <= 1e-4, name


def test_common_families_are_fused_whole():
    expected = {
        "llama": (5, 2, 2), "qwen2": (5, 2, 2), "qwen3": (9, 2, 2), "mistral": (5, 2, 2), "gemma2": (9, 2, 2),
        "gemma3_text": (13, 2, 2), "phi3": (5, 0, 2), "cohere": (0, 2, 0),
    }  # fmt: skip
    for family, counts in expected.items():
        model = AutoModelForCausalLM.from_config(tiny_config(family)).requires_grad_(False)
        assert tuple(fuse_elementwise(model).values()) == counts, family


def test_a_family_that_computes_something_else_is_left_alone():
    model = AutoModelForCausalLM.from_config(tiny_config("llama")).requires_grad_(False)
    layer = model.model.layers[0]

    class ScaledNorm(type(layer.input_layernorm)):
        def forward(self, x):
            return super().forward(x) * 1.01

    class ScaledMLP(type(layer.mlp)):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 1.01)

    layer.input_layernorm.__class__, layer.mlp.__class__ = ScaledNorm, ScaledMLP
    assert tuple(fuse_elementwise(model).values()) == (4, 1, 2)


def test_trained_norms_and_compiled_code_run_their_own(interpreted, tmp_path):
    model = build(tmp_path, quantization=None)
    _, gradients, _ = step(model)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_()
    _, trained, _ = step(model)
    fuse_elementwise(model)
    _, found, _ = step(model)
    assert len(trained) == len(gradients) + 5
    for name, gradient in trained.items():
        assert distance(found[name], gradient) <= 1e-4, name
    compiled = torch.compile(model.get_base_model().model.layers[0].mlp, backend="eager", fullgraph=True)
    x = torch.randn(1, 3, 64)
    torch.testing.assert_close(compiled(x), model.get_base_model().model.layers[0].mlp(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "plan"),
    [("llama", "none"), ("llama", "selective"), ("llama", "full"), ("llama", "offload"), ("qwen3", "full")],
)
def test_with_fused_lora_under_every_plan(interpreted, plan, family, tmp_path):
    model = build(tmp_path, family)
    plain = step(model)
    fuse_lora(model)
    fuse_elementwise(model)
    set_activation_checkpointing(model.get_base_model(), plan)
    for _ in range(2):
        logits, gradients, _ = step(model)
        torch.testing.assert_close(logits, plain[0], rtol=1e-4, atol=1e-5)
        for name, gradient in plain[1].items():
            assert distance(gradients[name], gradient) <= 1e-4, name


def test_what_a_norm_and_an_activation_return_need_not_be_held(interpreted):
    x = torch.randn(5, 8, requires_grad=True)
    weight = torch.randn(8)
    for y in (rms_norm(x, weight, 1e-5, True), gated_activation(x, 2 * x, True)):
        assert torch.equal(source_of(y).form(), y)
    assert source_of(x) is None
    assert source_of(rms_norm(x.detach(), weight, 1e-5)) is None


def test_a_second_backward_pass_through_an_activation_is_refused(interpreted):
    gate = torch.randn(5, 8, requires_grad=True)
    y = gated_activation(gate * 1, gate * 2)
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_kernel_that_errs_is_refused_and_said(interpreted, monkeypatch, tmp_path, caplog):
    model = build(tmp_path, quantization=None)
    plain = step(model)
    right = interpreted.normalise_backward
    monkeypatch.setattr(
        interpreted, "normalise_backward", lambda *arguments: (right(*arguments), arguments[4].mul_(1.1))
    )
    fuse_elementwise(model)
    with caplog.at_level("INFO"):
        found = step(model)
    assert any("norms is not used on cpu" in record.getMessage() for record in caplog.records)
    assert not any("activations is not used" in record.getMessage() for record in caplog.records)
    for name, gradient in plain[1].items():
        assert distance(found[1][name], gradient) <= 1e-4


def test_without_triton_nothing_changes(monkeypatch, tmp_path):
    monkeypatch.setattr(elementwise, "triton_kernels", None)
    monkeypatch.setattr(elementwise, "on_gpu", lambda tensor: True)
    elementwise._is_trusted.cache_clear()
    model = build(tmp_path, quantization=None)
    plain = step(model)
    fuse_elementwise(model)
    found = step(model)
    elementwise._is_trusted.cache_clear()
    assert torch.equal(found[0], plain[0])


def test_a_step_without_recomputation_holds_far_less(monkeypatch):
    monkeypatch.setattr(elementwise, "triton_kernels", elementwise.triton_kernels or torch)  # called with no numbers
    elementwise._is_trusted.cache_clear()
    config = tiny_config("llama", hidden_size=128, intermediate_size=448)
    found = {}
    for fused in (False, True):
        skeleton = build_skeleton(config, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        fuse_lora(skeleton)
        if fused:
            fuse_elementwise(skeleton)
        for plan in ("none", "full"):
            found[plan, fused] = simulate_step(skeleton, (256, 256), 300, plan=plan, dtype=torch.bfloat16)
    elementwise._is_trusted.cache_clear()
    assert found["none", True].kept < 0.65 * found["none", False].kept
    assert found["full", True].backward < 0.9 * found["full", False].backward
    # What is held of a layer: its input, queries, keys and values, attention's output and the sum behind it, the gate
    # and what it lets through; and few numbers a token besides.
    held = 512 * 2 * (128 + 256 + 128 + 128 + 2 * 448)
    assert held <= found["none", True].kept / 2 <= 1.35 * held


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_kernels_compile_for_a_gpu_that_is_not_here(dtype, tmp_path, monkeypatch):
    """What the interpreter lets pass the compiler may not."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from lightning_qlora.kernels import elementwise_triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {
        kernels._normalise: {"CENTRED": False, "ROWS": 1, "BLOCK": 4096},
        kernels._normalise_backward: {"CENTRED": True, "ROWS": 32, "BLOCK": 128},
        kernels._activate: {"TANH": True, "BLOCK": 1024},
        kernels._activate_backward: {"TANH": True, "BLOCK": 1024},
        kernels._rotate: {"BACKWARD": True, "HEADS": 32, "HALF": 64},
    }
    pointers = {"x", "y", "weight", "gradient", "of_x", "gate", "up", "of_gate", "of_up", "cos", "sin"}
    for kernel, chosen in constants.items():
        signature = {
            name: "constexpr" if name in chosen else f"*{dtype}" if name in pointers else "i32"
            for name in kernel.arg_names
        } | {name: each for name, each in (("inverse", "*fp32"), ("eps", "fp32")) if name in kernel.arg_names}
        source = triton.compiler.ASTSource(kernel, signature, constexprs=chosen)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "option"), KINDS)
def test_the_kernels_on_the_gpu(name, option, dtype):
    assert elementwise._compare(kind(name, option, dtype, "cuda")) is None


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("plan", ["none", "full", "offload"])
def test_a_fused_step_on_the_gpu(plan, tmp_path):
    folder = save_tiny_model(tmp_path / "base", hidden_size=512, intermediate_size=1024)
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    ids = torch.randint(3, 500, (1, 3000), generator=torch.Generator().manual_seed(3)).cuda()
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = attach_adapters(load_base_model(folder, device=torch.device("cuda")), lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.1)
        if fused:
            fuse_lora(model)
            assert tuple(fuse_elementwise(model).values()) == (5, 2, 2)
        set_activation_checkpointing(model.get_base_model(), plan)
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0].float(), ids[0]).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.cosine_similarity(found[0], found[1], 0) >= 0.999
