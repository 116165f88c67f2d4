"""The start of the command line, timed in miniature."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
from tiny import tiny_tokenizer
from tiny_models import save_tiny_model


@pytest.fixture
def start_speed(benchmark_scripts):
    return importlib.import_module("start_speed")


def test_parts_of_a_start_one_after_the_other(start_speed, tmp_path, monkeypatch, capsys):
    base = save_tiny_model(tmp_path / "base", tokenizer=tiny_tokenizer("chatml"))
    monkeypatch.setattr(sys, "argv", ["start_speed.py", base, "--device", "cpu", "--repeats", "1"])
    start_speed.main()
    found = json.loads(capsys.readouterr().out)
    (run,) = found["runs"]
    parts = [run[name] for name in ("imported_s", "built_s", "first_batch_s", "first_step_s")]
    assert parts == sorted(parts)
    assert (found["first_s"], found["later_s"]) == (parts[-1], None)
    assert parts[0] > 0.5  # the process itself had to start and to import torch


def test_all_runs_are_one_line_with_the_first_apart(start_speed, monkeypatch, capsys):
    seconds = iter([40.0, 13.0, 19.0, 14.0])
    monkeypatch.setattr(start_speed, "start", lambda *_: {"first_step_s": next(seconds)})
    monkeypatch.setattr(sys, "argv", ["start_speed.py", "base", "--repeats", "4", "--shape", "0.5b"])
    start_speed.main()
    found = json.loads(capsys.readouterr().out)  # which two lines would not be
    assert [run["first_step_s"] for run in found["runs"]] == [40.0, 13.0, 19.0, 14.0]
    assert (found["first_s"], found["later_s"]) == (40.0, 14.0)
    assert (found["shape"], found["device"]) == ("0.5b", "cuda")


def test_a_start_that_fails_says_why(start_speed, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["start_speed.py", str(tmp_path / "nowhere"), "--device", "cpu"])
    with pytest.raises(RuntimeError, match=r"(?s)exit code \d.*nowhere"):
        start_speed.main()
