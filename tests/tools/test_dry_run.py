from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_models import random_batch
from tiny_training import TinyChats, tiny_sft_module, tiny_trainer
from torch.utils.data import DataLoader

from lightning_qlora.callbacks import AdapterCheckpoint
from lightning_qlora.cli import main
from lightning_qlora.data import SFTDataModule
from lightning_qlora.tools.dry_run import dry_run
from lightning_qlora.tools.rehearsal.checks import Places, check_gradients, check_memory
from lightning_qlora.tools.rehearsal.longest_batch import find_longest_batch
from lightning_qlora.tools.rehearsal.step import Rehearsal, rehearse


@pytest.fixture
def rows(tmp_path):
    """Rows of very different lengths, the longest in the middle."""
    lengths = [3, 5, 4, 30, 6, 2, 9, 4] * 3
    lengths[13] = 60
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is {n}?", "completion": "fox " * n}) + "\n" for n in lengths))
    return path


def data_module(rows, tokenizer, tmp_path, **options):
    defaults = {"max_length": 256, "cache_dir": str(tmp_path / "cache"), "seed": 3}
    return SFTDataModule(str(rows), tokenizer=tokenizer, **{**defaults, **options})


@pytest.fixture
def run(base, rows, tmp_path, monkeypatch, capsys):
    """Run the command line and return its exit code, its output and what lies in the folder."""
    monkeypatch.setenv("LIGHTNING_QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    config = {
        "model": {"model_name": base},
        "data": {"train": "train.jsonl", "validation": "train.jsonl", "max_length": 128},
        "trainer": {"accelerator": "cpu", "max_epochs": 2, "default_root_dir": "run", "accumulate_grad_batches": 2},
    }
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))

    def call(*arguments):
        try:
            code = main([arguments[0], "--config=x.yaml", *arguments[1:]])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_fit_dry_run_checks_everything_and_writes_nothing(run, tmp_path):
    before = {path.name for path in tmp_path.iterdir()}

    code, output, errors = run("fit", "--dry_run")

    assert code == 0, output + errors
    assert {path.name for path in tmp_path.iterdir()} - before <= {"cache"}
    lines = {line[8:].split("  ")[0].strip(): line for line in output.splitlines()}
    assert [name for name, line in lines.items() if line.startswith("FAILED")] == []
    assert lines["gradients"].startswith("ok")
    assert "<|im_end|>" in lines["stop tokens"]
    assert "run/checkpoints" in lines["writable (checkpoints)"]
    assert "3 checkpoints of" in lines["disk space"]
    assert "of all " in lines["longest batch"]


def test_the_configuration_that_fit_saved_is_taken_too(run, tmp_path):
    assert run("fit", "--trainer.max_steps=1", "--trainer.log_every_n_steps=1")[0] == 0
    (saved,) = (tmp_path / "run").rglob("config.yaml")
    shutil.copy(saved, tmp_path / "x.yaml")
    code, output, errors = run("dry_run", "--json")
    assert code == 0, errors
    assert all(check["passed"] is not False for check in json.loads(output)["checks"])


def test_a_failed_check_ends_with_an_error(run, tmp_path):
    (tmp_path / "file").write_text("no folder")
    code, output, errors = run("fit", "--dry_run", "--trainer.callbacks+=ModelCheckpoint", "--model.lr=1e-3")
    assert code == 0, errors
    code, output, errors = run("fit", "--dry_run", "--trainer.default_root_dir=/proc/nothing")
    assert code == 1
    assert "FAILED  writable (default_root_dir)" in output
    assert "The run is not ready" in errors
    assert "/proc" in errors


@pytest.mark.parametrize("packing", [True, False])
def test_the_batch_is_really_the_longest_of_the_plan(rows, tokenizer, tmp_path, packing):
    data = data_module(rows, tokenizer, tmp_path, packing=packing, batch_size=3)
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    every = [loader.dataset[i]["input_ids"].numel() for i in range(len(loader.dataset))]

    found = find_longest_batch(loader)

    assert len(every) > 3
    assert found.num_positions == found.batch["input_ids"].numel() == max(every)
    assert found.among == f"all {len(every)}"


def test_of_another_loader_the_first_batches_are_looked_at():
    batches = [random_batch((5, 3 + i)) for i in range(100)]
    found = find_longest_batch(DataLoader(batches, batch_size=None))
    assert (found.num_positions, found.longest_document, found.among) == (5 + 66, 66, "the first 64")
    assert found.num_supervised == batches[63]["targets"].numel()
    few = find_longest_batch(DataLoader(batches[:4], batch_size=None))
    assert (few.num_positions, few.among) == (11, "all 4")
    with pytest.raises(ValueError, match="make no batch"):
        find_longest_batch(DataLoader([], batch_size=None))


def test_any_module_and_data_module_of_lightnings(base, tokenizer, tmp_path, capsys):
    trainer = tiny_trainer(tmp_path / "run", max_epochs=7, accumulate_grad_batches=2)

    dry_run(tiny_sft_module(base), TinyChats(tokenizer), trainer)

    assert "14 optimizer steps of 2 micro-batches" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_second_step_tells_what_every_further_one_takes(base, tokenizer, tmp_path):
    module = tiny_sft_module(base)
    step, losses, ready = module.training_step, [], []

    def record(batch, batch_idx):
        ready.append(len(module.optimizers().state))
        time.sleep(1.0 * (len(ready) == 1))  # what a process does once
        output = step(batch, batch_idx)
        losses.append(output.detach().item())
        return output

    module.training_step = record
    found = rehearse(module, TinyChats(tokenizer), tiny_trainer(tmp_path))
    assert ready[0] == 0 < ready[1]  # the second has the optimizer's state beside it
    assert found.loss == losses[0] != losses[1]
    assert found.seconds < 1.0
    # Gradients are looked at before anything was learnt: those of lora_A are still zero.
    assert found.num_trained == 2 * len(found.all_zero)
    assert all("lora_A" in name for name in found.all_zero)


def test_a_lora_b_that_receives_no_gradient_is_named(base, tokenizer, tmp_path, capsys):
    module = tiny_sft_module(base)
    built = module.on_model_built

    def detach_one():
        built()
        layer = module.model.get_base_model().model.layers[1].mlp.up_proj
        layer.lora_B["default"].register_forward_hook(lambda _, __, output: output.detach())

    module.on_model_built = detach_one
    with pytest.raises(ValueError, match=r"2 received none \(model.*layers\.1\.mlp\.up_proj\.lora_B"):
        dry_run(module, TinyChats(tokenizer), tiny_trainer(tmp_path))
    assert "FAILED  gradients" in capsys.readouterr().out


def test_verdicts_on_gradients():
    good = Rehearsal(loss=1.0, num_trained=4, all_zero=["x.lora_A.default.weight"])
    assert [check.passed for check in check_gradients(good)] == [True, True]
    dead = Rehearsal(loss=1.0, num_trained=4, all_zero=["x.lora_B.default.weight"])
    assert "1 are zero throughout (x.lora_B" in check_gradients(dead)[1].detail
    broken = Rehearsal(loss=math.nan, num_trained=9, not_finite=[f"p{i}" for i in range(6)])
    assert [check.passed for check in check_gradients(broken)] == [False, False]
    assert "and 2 more" in check_gradients(broken)[1].detail
    assert check_gradients(Rehearsal(loss=1.0))[1].passed is False


def test_memory_that_does_not_suffice_is_a_verdict(base, tokenizer, tmp_path, capsys):
    module = tiny_sft_module(base)

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words.")

    module.training_step = fail
    with pytest.raises(ValueError, match=r"Tried to allocate 2\.00 GiB\..*activation_checkpointing: full"):
        dry_run(module, TinyChats(tokenizer), tiny_trainer(tmp_path))
    shown = capsys.readouterr().out
    assert "FAILED  memory" in shown
    assert "FAILED  longest batch" in shown
    assert check_memory(Rehearsal(), None, torch.device("cpu")).passed is None


def test_a_stop_token_that_generation_ignores_is_named(base, tokenizer, tmp_path, capsys):
    module = tiny_sft_module(base)
    module.on_train_start = lambda: setattr(module.model.get_base_model().generation_config, "eos_token_id", 0)
    with pytest.raises(ValueError, match=r"generation does not stop at <\|im_end\|>"):
        dry_run(module, TinyChats(tokenizer), tiny_trainer(tmp_path))
    assert "FAILED  stop tokens" in capsys.readouterr().out


def test_checkpoints_that_do_not_fit_are_a_verdict(base, tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    trainer = tiny_trainer(tmp_path, enable_checkpointing=True, callbacks=[AdapterCheckpoint()])
    with pytest.raises(ValueError, match="disk space: 3 checkpoints of"):
        dry_run(tiny_sft_module(base), TinyChats(tokenizer), trainer)
    assert "FAILED  disk space" in capsys.readouterr().out


def test_the_size_of_a_checkpoint_is_near_that_of_a_real_one(base, rows, tokenizer, tmp_path, capsys):
    trainer = tiny_trainer(tmp_path / "a", enable_checkpointing=True, callbacks=[AdapterCheckpoint()], max_epochs=1)
    module = tiny_sft_module(base, r=64)
    trainer.fit(module, data_module(rows, tokenizer, tmp_path))
    (folder,) = [p.parent for p in Path(tmp_path / "a").rglob("adapter_model.safetensors")]
    real = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
    capsys.readouterr()

    trainer = tiny_trainer(tmp_path / "b", enable_checkpointing=True, callbacks=[AdapterCheckpoint()], max_epochs=1)
    dry_run(tiny_sft_module(base, r=64), data_module(rows, tokenizer, tmp_path), trainer, json=True)

    checks = {check["name"]: check["detail"] for check in json.loads(capsys.readouterr().out)["checks"]}
    planned = float(checks["disk space"].split("checkpoints of ")[1].split(" MiB")[0])
    assert real <= planned <= real + 0.5


def test_places_of_a_trainer(tmp_path):
    savers = [
        AdapterCheckpoint(dirpath=tmp_path / "x", save_top_k=5, monitor="val_loss"),
        ModelCheckpoint(dirpath="memory://bucket/y", save_top_k=-1),
    ]
    places = Places.of(tiny_trainer(tmp_path, enable_checkpointing=True, callbacks=savers))
    assert places.checkpoints == [(str(tmp_path / "x"), 7), ("memory://bucket/y", None)]
    assert places.others == [(str(tmp_path), "default_root_dir")]


def test_preference_runs_are_tried_and_estimated_too(run, base, tmp_path):
    pairs = [{"prompt": f"Hi {n}?", "chosen": "Hello! " * n, "rejected": "No."} for n in range(1, 12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = {
        "model": {"class_path": "PreferenceModule", "init_args": {"model_name": base}},
        "data": {"class_path": "PreferenceDataModule", "init_args": {"train": "train.jsonl", "max_length": 128}},
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": "run"},
    }
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))

    code, output, errors = run("fit", "--dry_run")
    assert code == 0, output + errors
    assert "ok      gradients" in output
    assert "every lora_B" in output

    code, output, errors = run("estimate", "--memory_gib=[8]", "--json")
    assert code == 0, errors
    assert json.loads(output)["num_tokens"] == 2 * 128  # both answers of a pair
