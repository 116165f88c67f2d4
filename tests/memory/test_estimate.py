from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from tiny_models import tiny_config

from lightning_qlora.accounting import stored_bytes
from lightning_qlora.kernels.checkpointing import MixedPlan
from lightning_qlora.memory import (
    PLANS,
    MemoryModel,
    OptimizerMemory,
    build_optimizer,
    build_skeleton,
    optimizer_memory,
)


def lora_config(**options):
    return LoraConfig(**{"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


def memory_model(family="llama", *, layers=6, **options):
    skeleton = build_skeleton(tiny_config(family, num_hidden_layers=layers), lora_config(), dtype=torch.float32)
    optimizer = optimizer_memory(build_optimizer(lambda params: torch.optim.AdamW(params, fused=True), skeleton))
    return MemoryModel(skeleton, optimizer, **{"autocast": None, **options})


def all_at_once(model, tokens, plan, supervised):
    """The estimate from a simulation of every layer."""
    model._kinds = [[index] for kind in model._kinds for index in kind]
    model._steps.clear()
    return model.estimate(tokens, plan=plan, num_supervised=supervised)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
@pytest.mark.parametrize("plan", ["none", "full"])
def test_layers_that_are_alike_are_simulated_once(family, plan):
    model = memory_model(family, accumulates=True)

    few = model.estimate(200, plan=plan, num_supervised=90)

    assert len(model._kinds) == (2 if family == "gemma3_text" else 1)
    assert few == all_at_once(model, 200, plan, 90)


def test_many_documents_are_extrapolated_from_few():
    model = memory_model(layers=2)

    many = model.estimate(9 * 512, plan="none", document_length=512)
    whole = MemoryModel(model.model, model.optimizer, autocast=None)
    whole._step = lambda tokens, length, supervised, plan: whole._simulate(tokens, length, supervised, plan)
    assert many == whole.estimate(9 * 512, plan="none", document_length=512)


def test_items_of_the_whole_model():
    model = memory_model()
    trained = sum(p.numel() for p in model.model.parameters() if p.requires_grad)

    estimate = model.estimate(128)

    assert estimate.weights == sum(s.nbytes for s in model.storages if not s.trainable) + sum(
        b.nbytes for b in model.model.buffers()
    )
    assert (estimate.adapters, estimate.gradients) == (4 * trained, 4 * trained)
    assert estimate.optimizer == pytest.approx(8 * trained, rel=0.01)
    assert estimate.workspaces == 64 * 2**20
    held = estimate.weights + estimate.adapters + estimate.optimizer + estimate.workspaces
    assert estimate.peak > held + estimate.activations
    assert estimate.moment == "head"
    assert estimate.peak == held + estimate.activations + estimate.logits


def test_gradients_that_are_accumulated_are_there_at_the_head():
    once, added = memory_model().estimate(128), memory_model(accumulates=True).estimate(128)
    assert added.peak - once.peak == added.gradients


def test_graphs_hold_gradients_and_hidden_states_of_their_own():
    plain, recorded = memory_model().estimate(128), memory_model(recorded=True).estimate(128)
    of_graphs = 64 * 2**20 + plain.gradients + 2 * 128 * tiny_config().hidden_size * 4
    assert recorded.workspaces - plain.workspaces == recorded.peak - plain.peak == of_graphs


def test_what_is_sharded_holds_no_graphs():
    fsdp = {"sharding": "fsdp", "world_size": 2}
    assert memory_model(recorded=True, **fsdp).estimate(128) == memory_model(**fsdp).estimate(128)


@pytest.mark.parametrize("plan", ["offload", "selective_offload", MixedPlan("selective_offload", 2, "none")])
def test_plans_that_are_never_recorded_hold_no_graphs(plan):
    assert memory_model(recorded=True).estimate(128, plan=plan) == memory_model().estimate(128, plan=plan)


def test_a_cpu_has_no_workspaces():
    assert memory_model(device="cpu").estimate(128).workspaces == 0


def test_the_peak_of_a_tiny_batch_is_the_optimizers():
    model = memory_model()
    model.optimizer = OptimizerMemory(0, scratch=10**9)
    estimate = model.estimate(8)
    assert (estimate.moment, estimate.peak) == (
        "optimizer",
        estimate.weights + estimate.adapters + estimate.gradients + estimate.workspaces + 10**9,
    )


@pytest.mark.parametrize("plan", ["offload", "selective_offload"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_offloading_layers_that_are_alike_are_simulated_twice(family, plan):
    model = memory_model(family, layers=8)
    few = model.estimate(16384, plan=plan)
    whole = all_at_once(model, 16384, plan, 16384)
    assert few.host == whole.host > 0
    assert few.peak == pytest.approx(whole.peak, rel=0.01)


def test_ranks():
    alone, ddp = memory_model(), memory_model(sharding="ddp", world_size=4)
    assert ddp.estimate(64).peak - alone.estimate(64).peak == alone.gradients
    assert replace(ddp.estimate(64), gradients=0, peak=0) == replace(alone.estimate(64), gradients=0, peak=0)

    alone, fsdp = memory_model(layers=24), memory_model(layers=24, sharding="fsdp", world_size=4)
    assert fsdp.gradients == alone.gradients // 4
    assert fsdp.optimizer.state == -(alone.optimizer.state // -4)
    assert alone.weights / 4 < fsdp.weights < alone.weights
    assert fsdp.estimate(64).activations == alone.estimate(64).activations
    assert fsdp.loading < alone.loading


MATRIX = 4 * 64 * 10_000  # bytes of an embedding or a head


@pytest.mark.parametrize(
    ("tied", "lora", "kept", "alone"),
    [
        (False, {}, 0, {"embedding", "head"}),
        (False, {"trainable_token_indices": {"embed_tokens": [3]}}, MATRIX, {"head"}),
        (False, {"target_modules": ["q_proj", "lm_head"]}, MATRIX + 4 * 8 * (64 + 10_000), {"embedding"}),
        (False, {"modules_to_save": ["lm_head"]}, 2 * MATRIX, {"embedding"}),
        (True, {}, MATRIX, set()),
    ],
    ids=["frozen", "trained embedding", "adapted head", "trained head", "tied"],
)
def test_sharding_holds_a_part_and_what_is_gathered_whole(tied, lora, kept, alone):
    """By hand: parts stay while their whole is there. A step begins with all but the head twice, if that is by itself;
    the layers run with two of them and what is kept; the loss adds the head.
    """
    config = tiny_config(num_hidden_layers=24, vocab_size=10_000, hidden_size=64, tie_word_embeddings=tied)
    skeleton = build_skeleton(config, lora_config(**lora), dtype=torch.float32)
    model = MemoryModel(skeleton, OptimizerMemory(0), autocast=None, sharding="fsdp", world_size=2)
    single = MemoryModel(skeleton, OptimizerMemory(0), autocast=None)
    layer = sum(p.nbytes for p in skeleton.get_base_model().model.layers[0].parameters())
    constants = sum(stored_bytes(p) - p.nbytes for p in skeleton.parameters())  # which every rank has
    parts = (single.weights + constants) / 2
    head, embedding = MATRIX * ("head" in alone), MATRIX * ("embedding" in alone)
    assert model.weights == pytest.approx(parts + kept + 2 * layer, rel=0.001)
    assert model.head == pytest.approx(head, rel=0.001)
    assert model.weights + model.gathering == pytest.approx(parts + 2 * (kept + embedding), rel=0.001)
    estimate = model.estimate(8)
    logits = estimate.activations + estimate.logits
    at_start, at_loss = 2 * (kept + embedding), kept + 2 * layer + head + logits
    assert estimate.moment == ("head" if at_loss > at_start else "forward")
    peak = parts + model.adapters + estimate.workspaces + max(at_start, at_loss)
    assert estimate.peak == pytest.approx(peak, rel=0.001)
    assert model.loading >= parts + model.adapters + 2 * (kept + embedding)


def test_the_fastest_plan_that_fits():
    model = memory_model(accumulates=True)
    peaks = {plan: model.estimate(1024, plan=plan).peak for plan in PLANS}
    assert list(peaks.values()) == sorted(peaks.values(), reverse=True)

    for plan, peak in peaks.items():
        found = model.fitting_plan(1024, peak)
        assert found is not None
        assert peaks[found.plan] == peak or found.plan == plan
    assert model.fitting_plan(1024, peaks["offload"] - 1) is None


def test_the_figures_of_an_8b_model_on_one_gpu():
    """The held part by hand, from the shapes of Llama 3 8B."""
    config = tiny_config(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    skeleton = build_skeleton(config, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    model = MemoryModel(skeleton, OptimizerMemory(0))

    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert {s.kind: s.numel for s in model.storages} == {
        "nf4": linear,
        "bfloat16": 2 * 128256 * 4096 + 65 * 4096,
        "float32": 41_943_040,
    }
    nf4 = next(s.nbytes for s in model.storages if s.kind == "nf4")
    assert nf4 == linear // 2 + linear // 64 + 4 * (linear // 64 // 256) + 224 * (4 * (16 + 256) + 4)
    estimate = model.estimate(8192, plan="full", document_length=2048)
    assert estimate.activations / 8192 / 32 == pytest.approx(8192, rel=0.2)  # a layer's input in bfloat16


def test_the_head_of_a_large_vocabulary_stays_within_its_budget():
    config = tiny_config(vocab_size=128_256, num_hidden_layers=1)
    memory = MemoryModel(build_skeleton(config, LoraConfig(r=4, target_modules="all-linear")), OptimizerMemory(0, 0, 0))
    few, many = (memory.estimate(num_tokens, plan="full").logits for num_tokens in (1024, 4096))
    assert 0.5 * 320 * 2**20 < few <= many < 1.1 * 320 * 2**20
