"""Plans of what layers keep: the same gradients bit by bit, and no more work than they promise."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from tiny_models import random_batch, save_tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_qlora.kernels.attention import packed_attention_arguments, use_document_attention
from lightning_qlora.kernels.checkpointing import HostOffload, MixedPlan, plan_of_layers
from lightning_qlora.model import (
    attach_adapters,
    checkpointed_layers,
    load_base_model,
    set_activation_checkpointing,
)

LAYERS = 4
PLANS = ["none", "selective", "full", "offload", MixedPlan("full", 2, "selective"), MixedPlan("offload", 1, "none")]


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


def test_selective_repeats_no_product_with_quantised_weights(model):
    counts = {}
    for plan in ("none", "selective", "full"):
        set_activation_checkpointing(model.get_base_model(), plan)
        with Products() as products:
            loss = loss_of(model)
            forward = products.count
            loss.backward()
        counts[plan] = (forward, products.count - forward)
        model.zero_grad()
    linears = 7 * LAYERS
    assert counts["none"] == counts["selective"] == (linears, 0)
    assert counts["full"] == (linears, linears)


def test_mixed_plans_name_each_layer():
    assert plan_of_layers(MixedPlan("full", 1, "none"), 3) == ["full", "none", "none"]
    assert plan_of_layers("offload", 2) == ["offload"] * 2
    assert str(MixedPlan("full", 1, "none")) == "full in the first 1 layers, none in the others"


# Offload: its bookkeeping on the CPU, where the inputs are copied all the same


class Watched(HostOffload):
    """Moves everything and notes how many inputs are on the device."""

    def __init__(self):
        super().__init__(everywhere=True)
        self.moved = []
        self.most = 0

    def _pack(self, tensor):
        packed = super()._pack(tensor)
        if packed is not tensor:
            self.moved.append(packed)
        self.most = max(self.most, self.on_device())
        return packed

    def _unpack(self, packed):
        tensor = super()._unpack(packed)
        self.most = max(self.most, self.on_device() + 1)
        return tensor

    def on_device(self):
        return sum(each.on_device is not None for each in self.moved)


def expected_gradients(model, seed=0):
    set_activation_checkpointing(model.get_base_model(), "none")
    model.eval()  # no dropout
    loss_of(model, seed).backward()
    return gradients(model)


def put_offload(model, offload):
    set_activation_checkpointing(model.get_base_model(), "full")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    for layer in checkpointed_layers(model.get_base_model()):
        layer._gradient_checkpointing_func = offload


def test_at_most_two_inputs_stay_on_the_device(model):
    expected, offload = expected_gradients(model), Watched()
    put_offload(model, offload)
    loss = loss_of(model)
    assert len(offload.moved) == LAYERS
    assert [each.on_device is not None for each in offload.moved] == [False, False, True, True]
    loss.backward()
    assert same(expected, gradients(model))
    assert offload.most <= 3  # two that have not left, or one in use and one on its way, besides what is being packed
    assert offload.on_device() == 0


def test_forward_passes_without_backward_and_several_before_one_backward(model):
    one, two = expected_gradients(model, 1), expected_gradients(model, 2)
    offload = Watched()
    put_offload(model, offload)
    loss_of(model, 5)  # nobody asks for its gradients
    with torch.no_grad():
        loss_of(model, 6)
    first, second = loss_of(model, 1), loss_of(model, 2)
    first.backward()
    assert same(one, gradients(model))
    second.backward()
    assert same(two, gradients(model))


def test_inputs_are_fetched_one_layer_ahead(model):
    offload = Watched()
    put_offload(model, offload)
    loss = loss_of(model)
    seen = []
    unpack = offload._unpack

    def watch(packed):
        tensor = unpack(packed)
        if tensor is not packed:
            seen.append([each.on_device is not None for each in offload.moved])
        return tensor

    offload._unpack = watch
    loss_of(model).backward()  # hooks are taken when layers run
    moved = [states[-LAYERS:] for states in seen]
    assert moved == [[i == LAYERS - 2 - step for i in range(LAYERS)] for step in range(LAYERS)]
    del loss


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
    for plan in ("full", "offload"):
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
    assert peaks[1] < peaks[0] - 6 * ids.numel() * 512 * 2
