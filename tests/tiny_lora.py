"""Tiny models with LoRA that is not zero, a step of theirs, and what it called."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from peft import LoraConfig
from tiny_models import random_batch, save_tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_qlora.kernels import lora_products
from lightning_qlora.kernels.lora import fuse_lora
from lightning_qlora.model import attach_adapters, load_base_model

RULES = ("test_schema", "test_autograd_registration", "test_faketensor")
"""What is asked of an operator."""


def build(folder, family="llama", dtype=torch.float32, quantization="nf4", num_hidden_layers=2, seed=1, **options):
    path = folder / family
    if not path.exists():
        save_tiny_model(path, family, num_hidden_layers=num_hidden_layers)
    torch.manual_seed(0)
    defaults = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    base = load_base_model(str(path), dtype=dtype, quantization=quantization)
    model = attach_adapters(base, LoraConfig(**{**defaults, **options}))
    scramble(model, seed)
    return model


def scramble(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


class FusedCalls(TorchDispatchMode):
    """Counts the calls of the fused operator."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func) == "lightning_qlora.lora_products.default"
        return func(*args, **(kwargs or {}))


def step(model, autocast=None, looked_at=True):
    """Logits and gradients of one batch, and the calls of the fused operator; unless looked at, there are none."""
    batch = random_batch((9, 14))
    context = nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    calls = FusedCalls()
    with calls if looked_at else nullcontext():
        with context:
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0].float(), batch["input_ids"][0]).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits.detach().float(), gradients, calls.count


def distance(one, two):
    one, two = one.detach().double(), two.detach().double()
    return float((one - two).norm() / two.norm())


def assert_as_near_to_float32(folder, most, **options):
    """Assert that in bfloat16 fused gradients are about as far from float32's as PEFT's: what is rounding is random."""
    distances = []
    for seed in range(8):
        exact = step(build(folder, seed=seed, **options))
        model = build(folder, dtype=torch.bfloat16, seed=seed, **options)
        plain = step(model, torch.bfloat16)
        fuse_lora(model)
        fused = step(model, torch.bfloat16)
        assert fused[2] == 8
        assert all(g.dtype is torch.float32 for g in fused[1].values())
        whole, expected, exact = (torch.cat([g.flatten() for g in s[1].values()]) for s in (fused, plain, exact))
        assert torch.cosine_similarity(whole, expected, 0) >= 0.999
        distances.append((distance(whole, exact), distance(expected, exact)))
    ours, pefts = map(sum, zip(*distances, strict=True))
    assert ours <= most * pefts


def assert_equal_steps(one, two, tolerance):
    assert distance(one[0], two[0]) <= tolerance
    assert one[1].keys() == two[1].keys()
    for name, gradient in two[1].items():
        assert one[1][name].dtype == gradient.dtype
        assert gradient.abs().sum() > 0
        assert distance(one[1][name], gradient) <= tolerance, name


class Products(TorchDispatchMode):
    """Counts products with base weights."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) == "lightning_qlora.lora_products.default":
            self.count += len(args[3])
        self.count += str(func).startswith("bitsandbytes.gemm_4bit")
        return func(*args, **(kwargs or {}))


def gradients_of(model, autocast=None, passes=1):
    """The gradients of some passes of one graph, and the products with base weights before and after it is built."""
    ids = random_batch((9, 14))["input_ids"]
    with Products() as products:
        with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
            hidden = model.get_base_model().get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        forward = products.count
        loss = (hidden.float() * torch.linspace(-1, 1, hidden.numel()).reshape(hidden.shape).sin()).sum()
        for index in range(passes):
            loss.backward(retain_graph=index + 1 < passes)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found, forward, products.count - forward


class Dequantised(TorchDispatchMode):
    """Counts base weights that are dequantised."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func).startswith("lightning_qlora.stack_4bit")
        return func(*args, **(kwargs or {}))


def check_operators(x, weights, constants, a, b, scales, *, inside):
    """Ask torch whether the operators of a group of NF4 weights keep its rules."""
    stored = 64, "nf4", inside
    torch.library.opcheck(lora_products._pack_adapters, (a, b, scales, torch.float32), test_utils=RULES)
    packed = lora_products._pack_adapters(*([p.detach() for p in each] for each in (a, b)), scales, torch.float32)
    arguments = (x, weights, constants, a, b, *packed, scales, *stored, "", [], [])
    torch.library.opcheck(lora_products._lora_low, arguments, test_utils=RULES)
    low, *shapes = lora_products._lora_low(*arguments)
    arguments = (x, low, shapes, weights, constants, [], packed[1], [each.shape[0] for each in b], *stored)
    torch.library.opcheck(lora_products._lora_products, arguments, test_utils=RULES)
