import importlib
import json
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def scaling(benchmark_scripts):
    return importlib.import_module("scaling")


def test_cases_for_eight_gpus(scaling):
    options = scaling.parse(["--devices", "1", "2", "4", "8"])
    cases = [(c.strategy, c.shape, c.rows, c.devices) for c in scaling.plan(options)]
    assert cases[:8] == [("ddp", "8b", rows, n) for rows in ("chat", "full") for n in (1, 2, 4, 8)]
    assert cases[8:] == [("fsdp", "70b", "full", n) for n in (2, 4, 8)]
    assert [(c.devices, c.resume) for c in scaling.resuming(options, "folder")] == [(8, False), (4, True)]


def test_efficiency_is_against_the_fewest_devices(scaling):
    def record(rows, devices, rate, **more):
        fixed = {"strategy": "ddp", "shape": "8b", "folder": None, "resume": False, "start_seconds": 1.0}
        return {**fixed, "rows": rows, "devices": devices, "tokens_per_second": rate, "peak_memory_gib": [1.0], **more}

    records = [record("chat", 4, 360.0), record("chat", 1, 100.0), record("full", 2, 50.0)]
    records.append({**record("full", 8, 0.0), "error": "out of memory"})
    scaling.add_efficiency(records)
    assert [r.get("efficiency") for r in records] == [0.9, 1.0, 1.0, None]
    assert "| ddp 8b chat | 4 | 360 | 90.0% | 1.00 | 1.0 |" in scaling.table(records)
    assert "failed: out of memory" in scaling.table(records)


@pytest.mark.slow
def test_two_processes_on_a_cpu(benchmark_scripts, tmp_path):
    out = tmp_path / "scaling.jsonl"
    options = ["--shape", "tiny", "--accelerator", "cpu", "--steps", "3", "--tokens_per_batch", "256", "--only", "fsdp"]
    command = [
        sys.executable,
        str(benchmark_scripts / "scaling.py"),
        *options,
        "--devices",
        "1",
        "2",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    measured, saved, resumed = [json.loads(line) for line in out.read_text().splitlines()]
    assert (measured["devices"], measured["optimizer_steps"], len(measured["peak_memory_gib"])) == (2, 13, 2)
    assert measured["tokens_per_second"] > 0
    assert (saved["devices"], saved["optimizer_steps"]) == (2, 12)
    assert (resumed["devices"], resumed["optimizer_steps"]) == (1, 24)
    assert resumed["train_loss"] != saved["train_loss"]
