"""Tiny models with LoRA that is not zero, a step of theirs, and what it called."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from peft import LoraConfig
from tiny_models import random_batch, save_tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_qlora.model import attach_adapters, load_base_model


def build(folder, family="llama", dtype=torch.float32, quantization="nf4", num_hidden_layers=2, **options):
    path = folder / family
    if not path.exists():
        save_tiny_model(path, family, num_hidden_layers=num_hidden_layers)
    torch.manual_seed(0)
    defaults = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    base = load_base_model(str(path), dtype=dtype, quantization=quantization)
    model = attach_adapters(base, LoraConfig(**{**defaults, **options}))
    scramble(model)
    return model


def scramble(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


class FusedCalls(TorchDispatchMode):
    """Counts the calls of the fused operator."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func) == "lightning_qlora.lora_products.default"
        return func(*args, **(kwargs or {}))


def step(model, autocast=None):
    batch = random_batch((9, 14))
    context = nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    with FusedCalls() as calls:
        with context:
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0].float(), batch["input_ids"][0]).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits.detach().float(), gradients, calls.count


def distance(one, two):
    one, two = one.detach().double(), two.detach().double()
    return float((one - two).norm() / two.norm())


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
