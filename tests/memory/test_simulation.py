"""The count of a step without data against what torch's allocator counts in a real one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny_models import random_batch, save_tiny_model
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoConfig

from lightning_qlora.kernels.attention import packed_attention_arguments, use_document_attention
from lightning_qlora.kernels.lora import fuse_lora
from lightning_qlora.losses.cross_entropy import head_cross_entropy
from lightning_qlora.memory import SimulationError, build_skeleton, simulate_step
from lightning_qlora.memory.simulation import _head
from lightning_qlora.model import attach_adapters, load_base_model, set_activation_checkpointing

pytestmark = pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")  # of torch 2.11

WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4}

# family, documents, rank, plan, shape: tolerance is 5 % for each
CASES = [
    ("llama", (100, 156), 8, "none", {}),
    ("llama", (100, 156), 8, "full", {}),
    ("llama", (100, 156), 8, "selective", {}),
    ("llama", (512,), 64, "none", {"num_hidden_layers": 4}),
    ("llama", (300, 200, 12), 4, "full", {**WIDE, "num_hidden_layers": 4}),
    ("llama", (40,) * 12, 16, "none", {**WIDE, "vocab_size": 2048}),
    ("llama", (1500,), 8, "full", {"vocab_size": 1000}),
    ("qwen2", (200,), 32, "none", {"num_key_value_heads": 1}),
    ("qwen3", (100, 156), 8, "none", {"num_hidden_layers": 3}),
    ("qwen3", (64, 64, 64), 8, "selective", {}),
    ("gemma2", (100, 156), 8, "none", {}),
    ("gemma2", (100, 156), 8, "full", {}),
    ("gemma3_text", (100, 156), 8, "none", {}),
    ("mistral", (100, 156), 8, "full", {}),
    ("phi3", (100, 156), 8, "none", {}),
    ("phi3", (256,), 8, "full", {}),
]


def lora_config(rank):
    return LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")


def build_real_step(folder, lengths, rank, plan, fused=False):
    model = attach_adapters(load_base_model(folder, dtype=torch.float32), lora_config(rank))
    if fused:
        fuse_lora(model)
    base = model.get_base_model()
    assert use_document_attention(base)
    set_activation_checkpointing(base, plan)
    batch = random_batch(lengths)
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    inputs |= packed_attention_arguments(batch["input_ids"], batch["document_lengths"])

    def step():
        hidden_BLD = base.get_decoder()(**inputs).last_hidden_state
        hidden_ND = hidden_BLD.flatten(0, 1)[batch["target_positions"]]
        return head_cross_entropy(hidden_ND, _head(base), batch["targets"]).loss_sum

    step().backward()  # from now on gradients are there
    return step, batch["targets"].numel()


def measure(step):
    """The most during the forward pass, what is kept, the most during the backward pass, by torch's own allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        loss = step()
        with record_function("forward is over"):
            pass
        loss.backward()
    events = profiler.profiler.kineto_results.events()
    live = peak = forward = kept = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "forward is over":
            forward, kept, peak = peak, live, live
        elif event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return forward, kept, peak


@pytest.mark.parametrize(
    ("family", "lengths", "rank", "plan", "shape"),
    [*CASES[:12], *(pytest.param(*case, marks=pytest.mark.soak) for case in CASES[12:])],
)
def test_a_real_step_holds_what_was_counted(family, lengths, rank, plan, shape, tmp_path):
    folder = save_tiny_model(tmp_path, family, **shape)
    step, num_supervised = build_real_step(folder, lengths, rank, plan)
    forward, kept, backward = measure(step)
    skeleton = build_skeleton(AutoConfig.from_pretrained(folder), lora_config(rank), dtype=torch.float32)

    counted = simulate_step(skeleton, lengths, num_supervised, plan=plan, device="cpu")

    assert counted.kept == pytest.approx(kept, rel=0.05)
    assert max(counted.forward, counted.head) == pytest.approx(forward, rel=0.05)
    assert counted.backward == pytest.approx(backward, rel=0.05)


@pytest.mark.parametrize("plan", ["none", "selective", "full"])
def test_fused_adapters_hold_what_was_counted(plan, tmp_path):
    folder = save_tiny_model(tmp_path, **WIDE, num_hidden_layers=3)
    step, num_supervised = build_real_step(folder, (100, 156), 16, plan, fused=True)
    forward, kept, backward = measure(step)
    skeleton = build_skeleton(AutoConfig.from_pretrained(folder), lora_config(16), dtype=torch.float32)
    fuse_lora(skeleton)

    counted = simulate_step(skeleton, (100, 156), num_supervised, plan=plan, device="cpu")

    assert counted.kept == pytest.approx(kept, rel=0.05)
    assert max(counted.forward, counted.head) == pytest.approx(forward, rel=0.05)
    assert counted.backward == pytest.approx(backward, rel=0.05)


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("base"))
    return build_skeleton(AutoConfig.from_pretrained(folder), lora_config(8))


def test_plans_trade_memory_for_recomputation(skeleton):
    none, selective, full = (
        simulate_step(skeleton, (256,), 128, plan=plan, dtype=torch.bfloat16) for plan in ("none", "selective", "full")
    )
    assert none.kept > 1.3 * selective.kept > 1.5 * full.kept


def test_plans_leave_nothing_behind(skeleton):
    before = simulate_step(skeleton, (64,), 32, plan="none")
    simulate_step(skeleton, (64,), 32, plan="full")
    simulate_step(skeleton, (64,), 32, plan="full")
    assert simulate_step(skeleton, (64,), 32, plan="none") == before
    assert not torch.is_autocast_enabled("cuda")
    assert all(p.grad is None for p in skeleton.parameters())


def test_what_a_gpu_keeps_of_a_layer(tmp_path):
    """The bytes of a bfloat16 Llama layer by hand: what autograd saves, per token."""
    width, mlp, keys, rank, tokens = 64, 96, 32, 8, 512
    sizes = {}
    for layers in (1, 2):
        folder = save_tiny_model(tmp_path / str(layers), num_hidden_layers=layers)
        skeleton = build_skeleton(AutoConfig.from_pretrained(folder), lora_config(rank))
        sizes[layers] = simulate_step(skeleton, (tokens,), 100, device="cuda", dtype=torch.bfloat16).kept
        adapters = sum(p.numel() for p in skeleton.parameters() if p.requires_grad) // layers

    norms = 2 * (4 * width + 4)  # the input in float32 and one over its norm
    normed = 2 * (2 * width)
    attention = 2 * (width + 2 * keys) + 2 * width + 4 * 4  # queries, keys, values; output; log-sum-exp
    gated = 4 * 2 * mlp
    low_rank = 7 * 2 * rank
    expected = tokens * (norms + normed + attention + gated + low_rank) + 2 * adapters  # cast to bfloat16
    assert sizes[2] - sizes[1] == pytest.approx(expected, rel=0.002)


def test_a_model_whose_code_asks_for_numbers_is_named(skeleton, monkeypatch):
    decoder = skeleton.get_base_model().get_decoder()
    forward = decoder.forward

    def asking(*args, **kwargs):
        if kwargs["input_ids"].sum().item() > 0:
            raise AssertionError
        return forward(*args, **kwargs)

    monkeypatch.setattr(decoder, "forward", asking)
    with pytest.raises(SimulationError, match=r"LlamaForCausalLM.*without its weights"):
        simulate_step(skeleton, (16,), 8)
