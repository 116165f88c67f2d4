"""The CPU's ratio in miniature: both sides take the same steps."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny import tiny_tokenizer
from tiny_models import save_tiny_model

STEPS = 3


@pytest.fixture
def found(benchmark_scripts, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LIGHTNING_QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"What is {i} plus {i}{i * '0'}?", "completion": f"It is {2 * i}."} for i in range(12)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = save_tiny_model(tmp_path / "base", tokenizer=tiny_tokenizer("chatml"))
    config = {
        "model": {"init_args": {"model_name": base, "dtype": "bfloat16", "lr": 0.01}},
        "data": {"init_args": {"train": "train.jsonl", "max_length": 128}},
        "trainer": {"gradient_clip_val": 0.1},
    }
    Path("x.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", "x.yaml", "--rounds", "2", "--steps", str(STEPS), "--model.init_args.lora.r=4"]
    measured = [each.command for each in importlib.import_module("everything").MEASUREMENTS if each.group == "cpu"]
    (in_float32,) = (command.split() for command in measured if "float32" in command)
    monkeypatch.setattr(sys, "argv", [*in_float32, *arguments])
    script = importlib.import_module("cpu_speed")
    batches, devices = [], []
    load = script.SFTModule.load_base
    monkeypatch.setattr(
        script.SFTModule, "load_base", lambda module, device: devices.append(device) or load(module, device)
    )
    monkeypatch.setattr(script, "padded", lambda batch, pad=script.padded: batches.append(pad(batch)) or batches[-1])
    script.main()
    return json.loads(capsys.readouterr().out), batches, devices


@pytest.mark.filterwarnings("ignore:RunGuard finds no AdapterCheckpoint")
def test_both_take_the_same_steps(found):
    result, batches, devices = found
    assert devices == 2 * [torch.device("cpu")]  # also where there is a GPU
    assert result["dtype"] == "float32"
    assert result["first_losses"][0] == pytest.approx(result["first_losses"][1], abs=1e-4)
    assert result["last_losses"][0] == pytest.approx(result["last_losses"][1], abs=1e-3)
    assert result["last_losses"][0] < result["first_losses"][0] - 0.01  # they do train
    assert result["speed_ratio"] == pytest.approx(result["plain_step_ms"] / result["own_step_ms"], rel=0.2)
    assert len(result["speed_ratio_of_each_turn"]) == 2
    assert len(batches) == 2 * STEPS
    assert any((batch["attention_mask"] == 0).any() for batch in batches)  # rows of several lengths
    for batch in batches:
        assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
