import importlib
import json
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def scaling(benchmark_scripts):
    return importlib.import_module("scaling")


@pytest.mark.parametrize(
    ("available", "expected"),
    [(0, []), (1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])],
)
def test_what_is_measured_unless_told_otherwise(scaling, available, expected):
    assert scaling.device_counts(available) == expected


@pytest.mark.parametrize(
    ("gpus", "arguments", "words"),
    [
        (0, [], ["--devices 1", "are 0", "--accelerator cpu"]),
        (1, ["--devices", "1", "2", "4"], ["--devices 4", "are 1"]),
        (1, ["--only", "fsdp"], ["two at least"]),
    ],
)
def test_too_few_gpus_are_said_before_anything_runs(scaling, gpus, arguments, words, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr(scaling, "launch", lambda case: pytest.fail("launched"))
    with pytest.raises(SystemExit, match="2"):
        scaling.main(arguments)
    message = capsys.readouterr().err
    assert all(word in message for word in words)


def test_cases_for_eight_gpus(scaling, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    options = scaling.parse(["--devices", "1", "2", "4", "8"])
    cases = [(c.strategy, c.shape, c.rows, c.devices) for c in scaling.plan(options)]
    assert cases[:8] == [("ddp", "8b", rows, n) for rows in ("chat", "full") for n in (1, 2, 4, 8)]
    assert cases[8:] == [("fsdp", "70b", "full", n) for n in (2, 4, 8)]
    assert [(c.devices, c.resume) for c in scaling.resuming(options, "folder")] == [(8, False), (4, True)]


def test_efficiency_is_against_the_fewest_devices(scaling):
    def record(rows, devices, rate, **more):
        fixed = {"strategy": "ddp", "shape": "8b", "saves": False, "resume": False, "start_seconds": 1.0}
        return {**fixed, "rows": rows, "devices": devices, "tokens_per_second": rate, "peak_memory_gib": [1.0], **more}

    records = [record("chat", 4, 360.0), record("chat", 1, 100.0), record("full", 2, 50.0)]
    records.append({**record("full", 8, 0.0), "error": "OutOfMemoryError: CUDA |\n out of memory"})
    records.append(record("chat", 2, 10.0, saves=True))
    scaling.add_efficiency(records)
    assert [r.get("efficiency") for r in records] == [0.9, 1.0, 1.0, None, None]
    assert "| ddp 8b chat | 4 | 360 | 90.0% | 1.00 | 1.0 |" in scaling.table(records)
    assert "| ddp 8b chat (saved) | 2 | 10 |  | 1.00 | 1.0 |" in scaling.table(records)
    assert "| ddp 8b full | 8 | failed: OutOfMemoryError: CUDA / out of memory | | | |" in scaling.table(records)


ON_CPUS = ["--accelerator", "cpu", "--shape", "tiny", "--steps", "3"]


def run(scripts, out, *options):
    command = [sys.executable, str(scripts / "scaling.py"), *ON_CPUS, "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_two_processes_on_a_cpu(benchmark_scripts, tmp_path):
    out = tmp_path / "scaling.jsonl"
    done = run(benchmark_scripts, out, "--tokens_per_batch", "256", "--only", "fsdp")
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(tmp_path) not in out.read_text()
    measured, saved, resumed = [json.loads(line) for line in out.read_text().splitlines()]
    assert (measured["devices"], measured["optimizer_steps"], len(measured["peak_memory_gib"])) == (2, 13, 2)
    assert measured["tokens_per_second"] > 0
    assert (saved["devices"], saved["optimizer_steps"]) == (2, 12)
    assert (resumed["devices"], resumed["optimizer_steps"]) == (1, 24)
    assert resumed["train_loss"] != saved["train_loss"]


@pytest.mark.slow
def test_what_fails_says_why_and_the_next_case_is_measured(benchmark_scripts, tmp_path):
    """No row is as short as the budget of tokens."""
    out = tmp_path / "scaling.jsonl"
    done = run(benchmark_scripts, out, "--tokens_per_batch", "-1", "--only", "ddp", "--devices", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["rows"] for record in records] == ["chat", "full"]
    for record in records:
        assert "Error: " in record["error"]
        assert "ChildFailedError" not in record["error"]
