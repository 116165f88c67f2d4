"""The benchmark's paths on the CPU, in miniature: it must run where it cannot be tried beforehand."""

from __future__ import annotations

import importlib
import json
import math
import sys

import pytest

TINY = ["--device", "cpu", "--shape", "tiny", "--steps", "2", "--warmup", "1"]


@pytest.fixture(scope="module")
def bench(benchmark_scripts):
    return importlib.import_module("bench")


def run(bench, capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments, *TINY])
    with pytest.raises(SystemExit) as end:
        bench.main()
    return end.value.code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("case", "options"),
    [("full2k", ["--plan", "auto"]), ("chat2k_pack", ["--plan", "offload", "--fused_lora", "true"])],
)
def test_a_measurement(bench, capsys, monkeypatch, case, options):
    code, found = run(bench, capsys, monkeypatch, "run", case, *options)
    assert code == 0
    assert found["plan_used"] == ("none" if "auto" in options else "offload")
    assert found["fused"] == ("true" in options)
    assert found["tok_s"] > found["sup_tok_s"] > 0
    assert 0 < found["step_ms"]["p5"] <= found["step_ms"]["p50"] <= found["step_ms"]["p95"]
    assert len(found["losses"]) == 3
    if case == "full2k":
        assert found["tokens_per_step"] == 4 * 2048 // bench.SHRUNK


@pytest.mark.parametrize("options", [["--plan", "none", "--fused_lora", "true"], ["--plan", "full"]])
def test_the_gate_passes_and_is_one(bench, capsys, monkeypatch, options):
    code, found = run(bench, capsys, monkeypatch, "gate", "chat2k_pack", *options)
    assert (code, found["passed"]) == (0, True)
    assert found["loss_difference"] < 1e-5
    assert found["worst_tensor_cosine"] > 0.9999
    token_loss = bench.Module.token_loss

    def leaking(self, batch):  # documents that read one another
        return token_loss(self, {**batch, "document_lengths": (sum(batch["document_lengths"]),)})

    monkeypatch.setattr(bench.Module, "token_loss", leaking)
    code, found = run(bench, capsys, monkeypatch, "gate", "chat2k_pack", *options)
    assert (code, found["passed"]) == (1, False)


def test_the_longest_context(bench, capsys, monkeypatch):
    code, found = run(bench, capsys, monkeypatch, "context", "--cap_gib", "8")
    assert code == 0
    assert 1500 < found["context"] == found["estimated"] <= 2048


def test_pairs(bench, capsys, monkeypatch):
    code, found = run(bench, capsys, monkeypatch, "run", "dpo", "--plan", "offload")
    assert code == 0
    assert found["losses"][0] == pytest.approx(math.log(2), abs=1e-4)
    assert found["tok_s"] > found["sup_tok_s"] > 0


def test_rows_are_the_same_each_time_and_of_chat_length(bench):
    case = bench.CASES["chat2k"]
    one, two = (bench.make_documents(case, 50, 128256) for _ in range(2))
    lengths = [len(row.input_ids) for row in one]
    assert all((a.input_ids == b.input_ids).all() for a, b in zip(one, two, strict=True))
    assert 32 <= min(lengths) < 300
    assert 600 < max(lengths) <= 2048
