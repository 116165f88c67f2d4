"""The plan that `auto` takes: the fastest that fits what is free."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import LoraConfig
from tiny import tiny_tokenizer
from tiny_models import save_tiny_model, tiny_config
from tiny_training import TinyChats, tiny_sft_module, tiny_trainer

from lightning_qlora.accounting import step_flops
from lightning_qlora.kernels.checkpointing import MixedPlan
from lightning_qlora.memory import (
    MemoryModel,
    OptimizerMemory,
    build_skeleton,
    choose_plan,
    link,
    most_tokens,
    simulate_step,
)
from lightning_qlora.memory import run as run_module
from lightning_qlora.memory.run import _left_in_group, free_memory, host_has_room

LAYERS = 6
TOKENS = 16384  # so that a layer's input is more than what is not worth moving


@pytest.fixture(scope="module")
def memory():
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    skeleton = build_skeleton(tiny_config("llama", num_hidden_layers=LAYERS), lora, dtype=torch.float32)
    return MemoryModel(skeleton, OptimizerMemory(1000), device="cuda", autocast=None)


@pytest.mark.parametrize(
    "pair",
    [("selective", "none"), ("full", "selective"), ("selective_offload", "none"), ("full", "selective_offload")],
)
@pytest.mark.parametrize("count", [1, 3, 5])
def test_mixed_plans_are_estimated_as_a_simulation_of_every_layer_counts(memory, pair, count):
    plan = MixedPlan(pair[0], count, pair[1])
    counted = simulate_step(memory.model, (TOKENS,), TOKENS, plan=plan, device="cuda")
    estimate = memory.estimate(TOKENS, plan=plan)
    # Up to one layer's input is counted twice: the first layer's, which a simulation lets require a gradient.
    assert 0.98 * counted.kept <= estimate.activations <= 1.02 * counted.kept + TOKENS * 64 * 4
    assert estimate.host == pytest.approx(counted.host, rel=0.02)
    held = memory.weights + memory.adapters + memory.optimizer.state + estimate.workspaces
    above = 0.1 if plan.lean == "full" and plan.rich == "selective_offload" else 0.05
    assert -0.05 < (estimate.peak - held) / max(counted.head, counted.backward) - 1 < above


@pytest.mark.parametrize(
    "plans", [("none", "selective", "full", "offload"), ("none", "selective_offload", "offload")], ids=len
)
def test_the_fewest_layers_recompute_that_must(memory, plans):
    peaks = {plan: memory.estimate(TOKENS, plan=plan).peak for plan in plans}
    assert sorted(peaks.values(), reverse=True) == list(peaks.values())
    for richer, leaner in itertools.pairwise(plans):
        budget = (peaks[richer] + peaks[leaner]) // 2
        found = memory.fitting_plan(TOKENS, budget, plans=plans, mixed=True)
        assert isinstance(found.plan, MixedPlan)
        assert (found.plan.lean, found.plan.rich) == (leaner, richer)
        assert found.peak <= budget
        if found.plan.num_lean > 1:
            assert memory.estimate(TOKENS, plan=found.plan._replace(num_lean=found.plan.num_lean - 1)).peak > budget
        assert memory.fitting_plan(TOKENS, budget, plans=plans).plan == leaner
    assert memory.fitting_plan(TOKENS, peaks["none"], plans=plans, mixed=True).plan == "none"
    assert memory.fitting_plan(TOKENS, peaks["offload"] - 1, plans=plans, mixed=True) is None


def test_what_waits_on_the_host_has_a_budget_too(memory):
    plans = ("none", "selective_offload", "full", "offload")
    lean = memory.estimate(TOKENS, plan="selective_offload")
    assert memory.fitting_plan(TOKENS, lean.peak, plans=plans, host_budget=lean.host).plan == "selective_offload"
    inputs = memory.estimate(TOKENS, plan="offload")
    assert 0 < inputs.host < lean.host
    assert memory.fitting_plan(TOKENS, inputs.peak, plans=plans, host_budget=inputs.host).plan == "offload"
    assert memory.fitting_plan(TOKENS, inputs.peak, plans=plans, host_budget=0) is None
    assert memory.fitting_plan(TOKENS, memory.estimate(TOKENS, plan="full").peak, plans=plans, host_budget=0)


def test_offloaded_layers_count_on_the_host(memory):
    inputs = LAYERS * TOKENS * 64 * 4  # in float32
    whole = memory.estimate(TOKENS, plan="offload")
    part = memory.estimate(TOKENS, plan=MixedPlan("offload", 3, "full"))
    full = memory.estimate(TOKENS, plan="full")
    assert whole.host == 2 * part.host == pytest.approx(inputs, rel=0.01)
    # One is still there, and that of the first layer, which a simulation lets require a gradient.
    assert full.activations - part.activations == pytest.approx(inputs * 1 / 6, rel=0.02)
    assert full.activations - whole.activations == pytest.approx(inputs * 4 / 6, rel=0.02)


def test_the_link_is_asked_for_all_that_a_step_moves(memory, monkeypatch):
    """At 1 GB/s and 1 GFLOP/s, and with a quarter more time than products take."""
    moved, asked = memory.estimate(TOKENS, plan="selective_offload").host, []

    class Strategy:
        root_device = torch.device("cuda")

        def reduce_boolean_decision(self, decision, all=True):
            asked.append(all)
            return decision

    class Run:
        strategy = Strategy()

    flops = TOKENS * step_flops(memory.model).per_token / 2
    monkeypatch.setattr(link, "_product_rate", lambda device: flops)
    for seconds, keeps_up in ((0.5, True), (1.2, True), (1.3, False)):
        monkeypatch.setattr(link, "_copy_rate", lambda device, seconds=seconds: moved / seconds)
        assert run_module._link_keeps_up(Run(), memory, TOKENS) is keeps_up
    assert asked == [True] * 3


@pytest.mark.parametrize("slow_link", [False, True])
def test_on_gpus_all_ranks_share_both_budgets_and_the_link_is_measured_where_it_matters(memory, monkeypatch, slow_link):
    class Run:
        world_size, num_devices = 4, 2
        datamodule = Data(tokens_per_batch=TOKENS)
        strategy = Data(root_device=torch.device("cuda"))

    free, measured = {"cuda": 0, "cpu": 2**40}, []
    monkeypatch.setattr(run_module, "memory_of_run", lambda *_, **__: memory)
    monkeypatch.setattr(run_module, "free_memory", lambda device: free[device.type])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(run_module, "_smallest", lambda trainer, nbytes: nbytes // 2)  # another rank has half as much
    monkeypatch.setattr(run_module, "_link_keeps_up", lambda *_: measured.append(1) or not slow_link)

    def choose(plan, host=2**40):
        needed = memory.estimate(TOKENS, plan=plan).peak + run_module._OTHER_WORKSPACES
        free["cuda"], free["cpu"] = 2 * int((needed + 2**20) / 0.95), host
        return choose_plan(Run(), None, []).plan

    host = run_module._budgets(Run(), memory)[1]
    assert host == int(0.6 * 2**40) // 4  # of two ranks a host, and of the least
    assert choose("none") == "none"
    assert not measured
    assert ("selective_offload" in str(choose("selective_offload"))) != slow_link
    assert measured
    assert "offload" not in str(choose("full", host=0))


def test_limits_of_a_control_group(tmp_path):
    assert _left_in_group(tmp_path) == 2**62
    (tmp_path / "memory.current").write_text("300\n")
    for limit, left in (("1000", 700), ("200", 0), ("max", 2**62)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert _left_in_group(tmp_path) == left


@pytest.mark.parametrize(("num_devices", "has_room"), [(1, True), (2, False)])
def test_a_host_has_room_for_what_all_its_gpus_hold(monkeypatch, num_devices, has_room):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 6 * 2**30)
    monkeypatch.setattr(run_module, "free_memory", lambda device: {"cpu": 12 * 2**30}[device.type])
    assert host_has_room(torch.device("cuda", 0), num_devices) == has_room
    assert host_has_room(torch.device("cpu"), num_devices)


def test_a_gpus_free_memory_keeps_to_the_share_of_the_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (900, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 150)
    for share, free in ((1.0, 850), (0.4, 250)):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device, share=share: share)
        assert free_memory(torch.device("cuda", 0)) == free


class Data:
    def __init__(self, **attributes):
        vars(self).update(attributes)


@pytest.mark.parametrize(
    ("attributes", "tokens"),
    [
        ({"tokens_per_batch": 4096, "max_length": 2048}, 4096),
        ({"tokens_per_batch": None, "max_length": 2048, "packing": True}, 2048),
        ({"tokens_per_batch": None, "max_length": 2048, "packing": True, "documents_per_row": 2}, 4096),
        ({"tokens_per_batch": None, "max_length": 100, "packing": False, "batch_size": 8}, 800),
        ({}, None),
    ],
)
def test_the_largest_batch_of_a_data_module(attributes, tokens):
    assert most_tokens(Data(**attributes)) == tokens
    assert most_tokens(None) is None


class SizedChats(TinyChats):
    max_length = 2048
    tokens_per_batch = 2048


def fit(folder, tokenizer, root, chats=SizedChats, **options):
    module = tiny_sft_module(folder, activation_checkpointing="auto")
    trainer = tiny_trainer(root, max_steps=2, **options)
    trainer.fit(module, chats(tokenizer))
    return module, trainer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer("chatml")


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"), tokenizer=tokenizer, num_hidden_layers=4)


def test_auto_takes_the_fastest_plan_holds_it_and_records_it(folder, tokenizer, tmp_path, caplog):
    with caplog.at_level("INFO"):
        module, trainer = fit(folder, tokenizer, tmp_path)
    assert module.layer_plan == "none"
    said = [r.getMessage() for r in caplog.records if "auto chose" in r.getMessage()]
    assert len(said) == 1
    assert "auto chose none (2,048 tokens a batch take about" in said[0]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["lightning_qlora"]["activation_checkpointing"] == "none"
    assert checkpoint["hyper_parameters"]["activation_checkpointing"] == "auto"


def test_auto_recomputes_in_as_many_layers_as_the_memory_asks(folder, tokenizer, tmp_path, monkeypatch):
    plenty, _ = fit(folder, tokenizer, tmp_path)
    memory = run_module.memory_of_run(plenty.trainer, plenty.model, plenty.trainer.optimizers)
    assert not memory.recorded
    assert run_module.memory_of_run(plenty.trainer, plenty.model, plenty.trainer.optimizers, recorded=True).recorded
    peaks = {plan: memory.estimate(2048, plan=plan).peak for plan in ("none", "selective", "full")}
    held = memory.weights + memory.adapters
    losses = {}
    for name, peak in (("none", peaks["none"]), ("mixed", (peaks["none"] + peaks["selective"]) // 2), ("full", 0)):
        monkeypatch.setattr(run_module, "free_memory", lambda device, peak=peak: int((peak - held) / 0.95) + 1)
        module, _ = fit(folder, tokenizer, tmp_path)
        plan = module.layer_plan
        assert plan == name or (name == "mixed" and isinstance(plan, MixedPlan))
        flags = [layer.gradient_checkpointing for layer in module.model.get_base_model().model.layers]
        assert sum(flags) == {"none": 0, "full": 4}.get(name, getattr(plan, "num_lean", 0))
        losses[name] = module.trainer.callback_metrics["train_loss"]
    assert losses["none"] == losses["mixed"] == losses["full"]


def test_auto_says_when_nothing_fits_and_when_it_cannot_know(folder, tokenizer, tmp_path, monkeypatch):
    module, trainer = fit(folder, tokenizer, tmp_path, chats=TinyChats)
    assert module.layer_plan == "full"
    unknown = choose_plan(trainer, module.model, trainer.optimizers)
    assert "not known of this data module" in unknown.reason
    trainer.datamodule.max_length = 2048
    monkeypatch.setattr(run_module, "free_memory", lambda device: 0)
    choice = choose_plan(trainer, module.model, trainer.optimizers)
    assert choice.plan == "full"
    assert "more than there is" in choice.reason
