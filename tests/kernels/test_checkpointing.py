"""Plans of what layers keep: the same gradients bit by bit, and no more work than they promise."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from tiny_models import random_batch, save_tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_qlora.kernels.attention import packed_attention_arguments, use_document_attention
from lightning_qlora.kernels.checkpointing import MixedPlan, _recompute, plan_of_layers, set_checkpointing
from lightning_qlora.model import (
    attach_adapters,
    checkpointed_layers,
    load_base_model,
    set_activation_checkpointing,
)

LAYERS = 4
PLANS = [
    *("none", "selective", "selective_offload", "full", "offload"),
    *(MixedPlan("full", 2, "selective"), MixedPlan("offload", 1, "none"), MixedPlan("selective_offload", 3, "none")),
]


@pytest.fixture(params=["llama", "gemma3_text"])
def model(request, tmp_path):
    folder = save_tiny_model(tmp_path, request.param, num_hidden_layers=LAYERS)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM")
    model = attach_adapters(load_base_model(folder, dtype=torch.float32), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert use_document_attention(model.get_base_model())
    return model


class Products(TorchDispatchMode):
    """Counts the products with 4-bit weights."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func).startswith("bitsandbytes.gemm_4bit")
        return func(*args, **(kwargs or {}))


def loss_of(model, seed=0):
    batch = random_batch((9, 5), seed=seed)
    arguments = packed_attention_arguments(batch["input_ids"], batch["document_lengths"])
    logits = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **arguments
    ).logits
    return torch.nn.functional.cross_entropy(logits[0], batch["input_ids"][0])


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_every_plan_computes_the_same_gradients_bit_by_bit_with_dropout_too(model):
    found = []
    for plan in PLANS:
        set_activation_checkpointing(model.get_base_model(), plan)
        torch.manual_seed(1)
        loss_of(model).backward()
        found.append(gradients(model))
    assert len(found[0]) > 10 * LAYERS
    assert all(g.abs().sum() > 0 for g in found[0].values())
    assert all(same(found[0], other) for other in found[1:])


def test_selective_repeats_the_products_of_the_mlp_alone(model):
    counts = {}
    for plan in ("none", "selective", "selective_offload", "full"):
        set_activation_checkpointing(model.get_base_model(), plan)
        with Products() as products:
            loss = loss_of(model)
            forward = products.count
            loss.backward()
        counts[plan] = (forward, products.count - forward)
        model.zero_grad()
    linears = 7 * LAYERS
    assert counts["none"] == (linears, 0)
    assert counts["selective"] == counts["selective_offload"] == (linears, 3 * LAYERS)
    assert counts["full"] == (linears, linears)


def test_a_layer_whose_mlp_is_not_known_is_recomputed_whole(model):
    layers = checkpointed_layers(model.get_base_model())
    for layer in layers:
        layer.add_module("another_name", layer.mlp)
        del layer._modules["mlp"]
    assert set_checkpointing(layers, "selective").moved_bytes == 0
    assert all(layer._gradient_checkpointing_func.args[0] is _recompute for layer in layers)


def test_the_mlp_is_itself_again_after_a_step_and_after_an_error(model):
    set_activation_checkpointing(model.get_base_model(), "selective")
    parts = [layer.mlp for layer in checkpointed_layers(model.get_base_model())]
    before = [vars(part).get("forward") for part in parts]
    loss_of(model).backward()
    assert [vars(part).get("forward") for part in parts] == before
    handle = parts[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(model)
    handle.remove()
    assert [vars(part).get("forward") for part in parts] == before


def test_mixed_plans_name_each_layer():
    assert plan_of_layers(MixedPlan("full", 1, "none"), 3) == ["full", "none", "none"]
    assert plan_of_layers("offload", 2) == ["offload"] * 2
    assert str(MixedPlan("full", 1, "none")) == "full in the first 1 layers, none in the others"


@pytest.mark.gpu
def test_offload_on_the_gpu_computes_what_full_does_in_less_memory(tmp_path):
    folder = save_tiny_model(
        tmp_path, "llama", num_hidden_layers=12, hidden_size=512, intermediate_size=512, max_position_embeddings=16384
    )
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = attach_adapters(load_base_model(folder, device=torch.device("cuda")), lora)
    use_document_attention(model.get_base_model())
    found, peaks = [], []
    ids = torch.randint(3, 500, (1, 16000), device="cuda")
    for plan in ("full", "offload", "selective", "selective_offload"):
        set_activation_checkpointing(model.get_base_model(), plan)
        for _ in range(3):
            torch.cuda.reset_peak_memory_stats()
            hidden = model.get_base_model().get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            hidden.float().square().sum().backward()
            found.append(gradients(model))
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated())
    for name, expected in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[name], expected, rtol=2e-2, atol=1e-2 * expected.abs().max().item())
    inputs = ids.numel() * 512 * 2
    assert peaks[1] < peaks[0] - 6 * inputs
    assert peaks[3] < peaks[2] - 6 * 3 * inputs
    assert peaks[3] < peaks[0]
