"""Every shipped configuration runs, with a tiny model in place of the large one."""

import json
from pathlib import Path

import pytest
import yaml
from tiny import tiny_tokenizer
from tiny_models import save_tiny_model

from lightning_qlora.cli import main

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


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
    arguments = [
        "fit",
        f"--config={config}",
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
    assert main(arguments) == 0, capsys.readouterr().err
    root = Path(options["trainer"]["default_root_dir"])
    assert list(root.rglob("adapter_model.safetensors"))
    assert list(root.rglob("metrics.csv"))
