"""Every shipped configuration runs, with a tiny model in place of the large one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from tiny_models import save_tiny_model

from lightning_qlora.cli import main

ROOT = Path(__file__).parent.parent
OVERLAYS = ("ddp", "fsdp")
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem not in OVERLAYS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"), tokenizer=tiny_tokenizer("chatml"))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "data").mkdir()
    rows = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(60)]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"{i}, of course!"} for i in range(60)]
    (tmp_path / "data" / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return tmp_path


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_configuration_runs_with_a_tiny_model(config, base, workplace, capsys):
    options = yaml.safe_load(config.read_text())
    assert main(["fit", f"--config={config}", *tiny_run(base)]) == 0, capsys.readouterr().err
    root = Path(options["trainer"]["default_root_dir"])
    assert list(root.rglob("adapter_model.safetensors"))
    assert list(root.rglob("metrics.csv"))


def in_a_process(path):
    """Of each data module one configuration, unless slow tests run."""
    return pytest.param(path, id=path.stem, marks=[] if path.stem in ("sft", "dpo") else pytest.mark.slow)


@pytest.mark.parametrize("config", [in_a_process(path) for path in CONFIGS])
def test_a_process_of_its_own_knows_every_name_in_a_configuration(config):
    """Other tests import what the command line might have forgotten to."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "lightning_qlora", "fit", f"--config={config}", "--print_config"]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    data = yaml.safe_load(run.stdout)["data"]["class_path"]
    assert data.endswith("PreferenceDataModule" if config.stem in ("dpo", "orpo") else "SFTDataModule")


@pytest.mark.slow
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_runs_on_two_ranks(overlay, base, workplace):
    configs = [f"--config={ROOT / 'configs' / name}.yaml" for name in ("sft", overlay)]
    options = [*tiny_run(base), "--trainer.devices=2", "--trainer.accumulate_grad_batches=1"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "lightning_qlora", "fit", *configs, *options]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in run.stderr
    published = sorted(Path("runs/sft").rglob("adapter_model.safetensors"))
    shapes = {value.shape[0] for name, value in load_file(published[-1]).items() if "lora_A" in name}
    assert shapes == {16}  # whole, not the half of a rank


def tiny_run(base):
    return [
        f"--model.model_name={base}",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=2",
        "--trainer.limit_val_batches=1",
        "--trainer.val_check_interval=1",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        "--data.max_length=2048",
        "--data.tokens_per_batch=4096",
    ]
