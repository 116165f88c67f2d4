"""The storm ends bit-equal; a storm that does not would say so."""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")  # of the forked processes; nothing here depends on warnings


@pytest.fixture(scope="module")
def storm():
    path = Path(__file__).parents[2] / "examples" / "storm" / "storm.py"
    spec = importlib.util.spec_from_file_location("storm", path)
    module = sys.modules["storm"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["storm"]


def test_a_few_incidents_change_nothing(storm, tmp_path, capsys):
    assert storm.Storm(tmp_path, num_incidents=3, seed=1).run()
    output = capsys.readouterr().out
    assert "VERDICT: bit-equal" in output
    assert output.count("exit ") == 4


@pytest.mark.soak
@pytest.mark.parametrize("seed", [1, 2])
def test_a_storm_changes_nothing(storm, tmp_path, capsys, seed):
    assert storm.Storm(tmp_path, num_incidents=30, seed=seed).run(), capsys.readouterr().out


def test_a_difference_is_named(storm):
    state = {"weights": {"a": torch.zeros(3)}, "steps": [1, {"lr": 0.1}], "name": "x"}
    assert storm.unequal(state, copy.deepcopy(state), "") == []
    other = {"weights": {"a": torch.tensor([0.0, 0.0, 1e-38])}, "steps": [1, {"lr": 0.2}], "name": "x"}
    assert storm.unequal(state, other, "") == [".weights.a", ".steps[1].lr: 0.1 and 0.2"]
    assert storm.unequal(state, {**state, "more": 1}, "") == [": keys ['more']"]
    assert storm.unequal([1.0], [1], "s") == ["s[0]: float and int"]


def test_an_attempt_that_trained_other_rows_fails_the_storm(storm, tmp_path):
    run = storm.Storm(tmp_path, num_incidents=0, seed=0)
    run.calm = {1: [[3], "0x1p0", "0x1p-9"], 2: [[4], "0x1p0", "0x1p-9"]}
    attempt = storm.Attempt(
        pid=0, pipe=0, batches=[[1, [[3], "0x1p0", "0x1p-9"]], [2, [[5], "0x1p0", "0x1p-9"]]], code=0
    )
    run._check(attempt, "SIGTERM", 7, [4, 2])
    assert [problem.split(":")[0] for problem in run.problems] == [
        "attempt 7 (SIGTERM) ended with 0",
        "attempt 7 (SIGTERM) lost step 4",
        "micro-batch 2 of attempt 7",
    ]
