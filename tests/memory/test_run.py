"""The plan that `auto` takes: the fastest that fits what is free."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from tiny import tiny_tokenizer
from tiny_models import save_tiny_model, tiny_config
from tiny_training import TinyChats, tiny_sft_module, tiny_trainer

from lightning_qlora.kernels.checkpointing import MixedPlan
from lightning_qlora.memory import MemoryModel, OptimizerMemory, build_skeleton, choose_plan, most_tokens, simulate_step
from lightning_qlora.memory import run as run_module
from lightning_qlora.memory.run import _left_in_group, free_memory

LAYERS = 6


@pytest.fixture(scope="module")
def memory():
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    skeleton = build_skeleton(tiny_config("llama", num_hidden_layers=LAYERS), lora, dtype=torch.float32)
    return MemoryModel(skeleton, OptimizerMemory(1000), device="cuda", autocast=None)


@pytest.mark.parametrize("pair", [("selective", "none"), ("full", "selective")])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_mixed_plans_are_estimated_as_a_simulation_of_every_layer_counts(memory, pair, count):
    plan = MixedPlan(pair[0], count, pair[1])
    counted = simulate_step(memory.model, (1024,), 1024, plan=plan, device="cuda")
    estimate = memory.estimate(1024, plan=plan)
    assert estimate.activations == pytest.approx(counted.kept, rel=0.02)
    held = memory.weights + memory.adapters + memory.optimizer.state
    assert estimate.peak - held == pytest.approx(max(counted.head, counted.backward), rel=0.05)


def test_the_fewest_layers_recompute_that_must(memory):
    peaks = {plan: memory.estimate(1024, plan=plan).peak for plan in ("none", "selective", "full", "offload")}
    assert sorted(peaks.values(), reverse=True) == list(peaks.values())
    for richer, leaner in (("none", "selective"), ("selective", "full"), ("full", "offload")):
        budget = (peaks[richer] + peaks[leaner]) // 2
        found = memory.fitting_plan(1024, budget, mixed=True)
        assert isinstance(found.plan, MixedPlan)
        assert (found.plan.lean, found.plan.rich) == (leaner, richer)
        assert found.peak <= budget
        if found.plan.num_lean > 1:
            assert memory.estimate(1024, plan=found.plan._replace(num_lean=found.plan.num_lean - 1)).peak > budget
        assert memory.fitting_plan(1024, budget).plan == leaner
    assert memory.fitting_plan(1024, peaks["none"], mixed=True).plan == "none"
    assert memory.fitting_plan(1024, peaks["offload"] - 1, mixed=True) is None


def test_offloaded_layers_count_on_the_host(memory):
    whole = memory.estimate(4096, plan="offload")
    part = memory.estimate(4096, plan=MixedPlan("offload", 4, "full"))
    full = memory.estimate(4096, plan="full")
    assert whole.host == 2 * part.host > 0
    assert full.activations - part.activations == part.host
    assert full.activations - whole.activations == whole.host


def test_limits_of_a_control_group(tmp_path):
    assert _left_in_group(tmp_path) == 2**62
    (tmp_path / "memory.current").write_text("300\n")
    for limit, left in (("1000", 700), ("200", 0), ("max", 2**62)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert _left_in_group(tmp_path) == left


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
