from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelSummary
from tiny import tiny_tokenizer
from tiny_models import save_tiny_model
from tiny_training import TinyChats, tiny_sft_module, tiny_trainer

from lightning_qlora.callbacks import RunSummary, run_summary
from lightning_qlora.data.report import PreparationReport, SourceReport


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer("chatml")


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"), tokenizer=tokenizer)


class ReportedChats(TinyChats):
    """Chats with an account of how they were prepared."""

    @property
    def reports(self):
        train = PreparationReport("f" * 8, max_length=2048, overlong="drop_row")
        train.sources = [
            SourceReport(
                "a", 1000, 990, {"empty-answer": 3, "too-long": 7}, [], {"fits": 990, "too-long": 7}, 5000, 1250
            )
        ]
        train.describe_lengths(np.array([10, 20, 30]))
        train.packing = {"batches": 12.0, "efficiency": 0.975, "tokens_per_batch": 410.0}
        validation = PreparationReport("f" * 8, max_length=2048, overlong="drop_row")
        validation.sources = [SourceReport("b", 5, 5)]
        return {"train": train, "validation": validation}


def summary(capsys):
    lines = capsys.readouterr().out.splitlines()
    return {line[:14].strip(): line[14:] for line in lines}


def test_says_what_will_be_trained_on_what(folder, tokenizer, tmp_path, capsys):
    module = tiny_sft_module(folder, revision="main", activation_checkpointing="full")
    trainer = tiny_trainer(
        tmp_path, callbacks=[RunSummary()], enable_model_summary=True, max_epochs=5, accumulate_grad_batches=2
    )

    trainer.fit(module, ReportedChats(tokenizer))

    said = summary(capsys)
    numel = sum(p.numel() for p in torch.nn.ModuleList([load_plain(folder)]).parameters())
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert said["Base"] == f"{folder} (LlamaForCausalLM, revision main)"
    assert said["Parameters"].startswith(f"{numel + trainable:,} in ")
    assert f"nf4 {sum(p.numel() for p in linear_weights(folder)):,} in " in said["Parameters"]
    assert said["Trainable"].startswith(f"{trainable:,} of {numel + trainable:,} (")
    assert said["Quantisation"] == "4-bit NF4, constants quantised too, computed in float32"
    assert said["Adapters"].endswith(" on down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj")
    assert said["Rows"] == "990 kept of 1,000 read (refused: 7 too-long, 3 empty-answer)"
    assert said["Validation"] == "5 kept of 5 read (none refused)"
    assert "p50 20" in said["Lengths"]
    assert said["Limit"] == "2,048 tokens: 7 rows above (7 too-long)"
    assert said["Tokens"] == "5,000, 1,250 supervised (25.0 %)"
    assert said["Batches"] == "12 of about 410 tokens, 97.5 % full"
    assert said["Memory"].startswith("about ")
    assert said["Memory"].endswith("activation checkpointing: full")
    assert said["Memory"].count("MiB") == 8
    assert said["Steps"] == "10 optimizer steps of 2 micro-batches, 3 micro-batches an epoch"


@pytest.mark.parametrize("free", [5.0, 3.0])
def test_host_memory_that_is_not_there_is_told_before_the_system_ends_the_process(monkeypatch, recwarn, free):
    monkeypatch.setattr(run_summary, "free_memory", lambda device: int(free * 2**30))
    said = run_summary._describe_host(4 * 2**30)
    assert said == f"; 4.00 GiB of activations wait in this host's memory, of {free:.2f} GiB free"
    told = [str(warning.message) for warning in recwarn]
    assert len(told) == (free < 4)
    assert all("4.00 GiB in this host's memory, of which 3.00 GiB are free" in each for each in told)


def test_on_a_cpu_nothing_waits_elsewhere(folder, tokenizer, tmp_path, capsys):
    module = tiny_sft_module(folder, activation_checkpointing="offload")
    tiny_trainer(tmp_path, callbacks=[RunSummary()], max_epochs=1).fit(module, ReportedChats(tokenizer))
    assert summary(capsys)["Memory"].endswith("activation checkpointing: offload")


def load_plain(folder):
    from lightning_qlora.model import load_base_model

    return load_base_model(folder, quantization=None)


def linear_weights(folder):
    return [p for name, p in load_plain(folder).named_parameters() if "proj" in name]


def test_takes_the_place_of_lightnings_summary(folder, tokenizer, tmp_path):
    trainer = tiny_trainer(tmp_path, callbacks=[RunSummary()], enable_model_summary=True)

    assert [type(c) for c in trainer.callbacks if isinstance(c, ModelSummary)] == [RunSummary]


def test_other_adapters_and_bases(folder, tokenizer, tmp_path, capsys):
    module = tiny_sft_module(folder, quantization=None)
    module.lora.use_dora = True
    module.lora.init_lora_weights = "gaussian"
    module.lora.target_modules = {"q_proj"}
    module.lora.modules_to_save = ["lm_head"]

    tiny_trainer(tmp_path, callbacks=[RunSummary()], max_epochs=1).fit(module, TinyChats(tokenizer))

    said = summary(capsys)
    assert said["Quantisation"] == "none"
    assert said["Adapters"] == (
        "DoRA r=8 alpha=16 dropout=0 on q_proj; initialised by gaussian; trained in full: lm_head"
    )
    assert "Rows" not in said
    assert "Memory" not in said


def test_a_resumed_run_keeps_its_place_and_says_so(folder, tokenizer, tmp_path, capsys):
    first = tiny_trainer(tmp_path, max_epochs=1)
    first.fit(tiny_sft_module(folder), TinyChats(tokenizer))
    first.save_checkpoint(tmp_path / "epoch.ckpt")
    capsys.readouterr()

    second = tiny_trainer(tmp_path, callbacks=[RunSummary()], max_epochs=3)
    second.fit(tiny_sft_module(folder), TinyChats(tokenizer), ckpt_path=tmp_path / "epoch.ckpt")

    steps = "9 optimizer steps of 1 micro-batches, 3 micro-batches an epoch, going on after step 3"
    assert summary(capsys)["Steps"] == steps


def test_does_not_build_the_loaders(folder, tokenizer, tmp_path):
    """Lightning would build them with the state of a fresh run (Lightning-AI/pytorch-lightning#20550)."""
    asked = []

    class Watched(TinyChats):
        def train_dataloader(self):
            asked.append("loader")
            return super().train_dataloader()

    class Summary(RunSummary):
        def on_fit_start(self, trainer, pl_module):
            super().on_fit_start(trainer, pl_module)
            asked.append("fit start")

    tiny_trainer(tmp_path, callbacks=[Summary()], max_epochs=1).fit(tiny_sft_module(folder), Watched(tokenizer))

    assert asked == ["fit start", "loader"]


def test_steps_are_those_of_an_accumulation_that_changes(folder, tokenizer, tmp_path, capsys):
    callbacks = [RunSummary(), GradientAccumulationScheduler({0: 3, 1: 2})]
    tiny_trainer(tmp_path, callbacks=callbacks, max_epochs=3).fit(tiny_sft_module(folder), TinyChats(tokenizer))
    assert "5 optimizer steps of 3 then 2 micro-batches, 3 micro-batches an epoch" in capsys.readouterr().out
