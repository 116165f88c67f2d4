"""Compiled norms and MLPs: the same gradients, and one graph for batches of any lengths."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from tiny_models import random_batch, save_tiny_model
from torch._dynamo.utils import counters

from lightning_qlora.kernels.attention import packed_attention_arguments, use_document_attention
from lightning_qlora.kernels.checkpointing import MixedPlan
from lightning_qlora.kernels.compilation import compile_parts
from lightning_qlora.kernels.lora import fuse_lora
from lightning_qlora.model import attach_adapters, checkpointed_layers, load_base_model, set_activation_checkpointing


def build(folder, fused):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = attach_adapters(load_base_model(folder, dtype=torch.float32), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    use_document_attention(model.get_base_model())
    if fused:
        fuse_lora(model)
    return model


def gradients(model, lengths):
    batch = random_batch(lengths)
    arguments = packed_attention_arguments(batch["input_ids"], batch["document_lengths"])
    hidden = model.get_base_model().get_decoder()(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **arguments
    )
    states = hidden.last_hidden_state
    (states * torch.linspace(-1, 1, states.numel()).reshape(states.shape).sin()).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo asks every input for it
@pytest.mark.parametrize("plan", ["none", "full"])
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_the_same_and_other_lengths_need_no_other_graph(tmp_path, plan, fused):
    model = build(save_tiny_model(tmp_path), fused)
    batches = [(9, 5), (20, 3, 4), (31,)]
    expected = [gradients(model, lengths) for lengths in batches]
    torch._dynamo.reset()
    counters.clear()
    layers = checkpointed_layers(model.get_base_model())
    set_activation_checkpointing(model.get_base_model(), plan)
    assert compile_parts(layers, plan, backend="aot_eager") == 6
    graphs = []
    for lengths, reference in zip(batches, expected, strict=True):
        found = gradients(model, lengths)
        graphs.append(counters["stats"]["unique_graphs"])
        assert found.keys() == reference.keys()
        for name, gradient in reference.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    assert graphs[0] > 0
    assert len(set(graphs)) == 1
    assert not counters["graph_break"]
    torch._dynamo.reset()


def test_layers_that_keep_operators_one_by_one_are_left_alone(tmp_path):
    layers = checkpointed_layers(build(save_tiny_model(tmp_path), False).get_base_model())
    assert compile_parts(layers, "selective") == 0
    assert compile_parts(layers, MixedPlan("selective", 1, "none"), backend="aot_eager") == 3
    assert layers[0].mlp._compiled_call_impl is None
    assert layers[1].mlp._compiled_call_impl is not None
