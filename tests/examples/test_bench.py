"""The benchmark's paths on the CPU, in miniature: it must run where it cannot be tried beforehand."""

from __future__ import annotations

import importlib
import json
import math
import sys

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore:RunGuard finds no AdapterCheckpoint")  # a benchmark has nothing to save

TINY = ["--device", "cpu", "--shape", "tiny", "--steps", "2", "--warmup", "1"]


@pytest.fixture(scope="module")
def bench(benchmark_scripts):
    return importlib.import_module("bench")


def run_all(bench, capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    with pytest.raises(SystemExit) as end:
        bench.main()
    return end.value.code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def run(bench, capsys, monkeypatch, *arguments):
    code, (found,) = run_all(bench, capsys, monkeypatch, *arguments, *TINY)
    return code, found


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("full2k", ["--plan", "auto", "--optimizer", "adamw_foreach"]),
        ("chat2k_pack", ["--plan", "offload", "--fused_lora", "true"]),
    ],
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
        assert found["tokens_per_step"] == 4 * 64
        assert found["predicted_gib"] > 0


@pytest.mark.parametrize(
    "options", [["--plan", "none", "--fused_lora", "true"], ["--plan", "full", "--cuda_graphs", "true"]]
)
def test_the_gate_passes_and_is_one(bench, capsys, monkeypatch, options):
    code, found = run(bench, capsys, monkeypatch, "gate", "chat2k_pack", *options)
    assert (code, found["passed"]) == (0, True)
    assert found["loss_difference"] < 1e-5
    assert found["worst_tensor_cosine"] > 0.9999
    assert found["plain_loss_difference"] < 1e-5
    plain = ("plain_gradient_cosine", "plain_worst_tensor_cosine", "cosine_to_plain")
    assert min(found[name] for name in plain) > 0.9999
    let_documents_read_one_another(monkeypatch)
    code, found = run(bench, capsys, monkeypatch, "gate", "chat2k_pack", *options)
    assert (code, found["passed"]) == (1, False)
    assert found["plain_gradient_cosine"] > 0.9999 > found["cosine_to_plain"]


def let_documents_read_one_another(monkeypatch):
    kind = importlib.import_module("fits").Module
    token_loss = kind.token_loss
    monkeypatch.setattr(
        kind, "token_loss", lambda self, b: token_loss(self, {**b, "document_lengths": (sum(b["document_lengths"]),)})
    )


def test_a_curve_is_that_of_plain_code_or_is_not(bench, capsys, monkeypatch):
    arguments = ["curve", "chat2k_pack", "--lr", "5e-3", "--device", "cpu", "--shape", "tiny", "--steps", "16"]
    code, (found,) = run_all(bench, capsys, monkeypatch, *arguments)
    assert code == 0
    assert len(found["losses"]) == len(found["plain_losses"]) == 16
    assert sum(found["plain_losses"][-4:]) < sum(found["plain_losses"][:4]) - 0.2
    assert found["exact_losses"] == pytest.approx(found["plain_losses"], abs=1e-3)
    assert found["largest_distance"] < 1e-4
    let_documents_read_one_another(monkeypatch)
    _, (other,) = run_all(bench, capsys, monkeypatch, *arguments)
    assert other["plain_losses"] == pytest.approx(found["plain_losses"], abs=1e-3)
    assert other["largest_distance"] > 1e-4


@pytest.mark.parametrize("rows", ["1", "4"])
def test_what_a_step_is_made_of(bench, capsys, monkeypatch, rows):
    code, found = run(bench, capsys, monkeypatch, "timeline", "full2k", "--plan", "none", "--rows", rows)
    assert code == 0
    kinds = found["by_kind_ms"]
    assert kinds["products"] > 0
    assert kinds["attention"] > 0
    assert kinds["optimizer"] > 0
    assert max(kinds.values()) < found["busy_ms"] <= 1.01 * found["traced_ms"]  # medians, each of its own
    assert 0 <= found["idle_at_start_ms"] <= found["idle_ms"] < found["traced_ms"]


def test_a_timeline_counts_what_nothing_ran_and_what_ran_twice(benchmark_scripts):
    timeline = importlib.import_module("timeline")
    work = [(0, 10, "spin_kernel"), (1010, 3010, "nvjet_x"), (2010, 4010, "_dequantize"), (9010, 10_010, "unheard of")]
    step = [timeline.Work(start, end, name, end - start) for start, end, name in work]
    found = timeline.found([step, step])
    assert (found["traced_ms"], found["kernels"]) == (10.01, 3)
    assert (found["idle_ms"], found["idle_at_start_ms"], found["busy_ms"]) == (6.0, 1.0, 5.0)
    kinds = {kind: ms for kind, ms in found["by_kind_ms"].items() if ms}
    assert kinds == {"products": 2.0, "dequantisation": 2.0, "others": 1.0}
    assert found["longest"][0] == ["nvjet_x", 1.0, 2.0]


def test_many_in_one_process(bench, capsys, monkeypatch):
    measure = bench.measure

    def out_of_memory(options):
        if options.rows == 2:
            raise torch.OutOfMemoryError("no more")
        return measure(options)

    monkeypatch.setattr(bench, "measure", out_of_memory)
    code, found = run_all(
        bench, capsys, monkeypatch, "run", "full2k", "--rows", "1", "2", "3", *TINY, "then", "run", "chat2k", *TINY
    )
    assert code == 1
    assert [(each["case"], each["rows"]) for each in found] == [
        ("full2k", 1), ("full2k", 2), ("full2k", 3), ("chat2k", None)
    ]  # fmt: skip
    assert [each.get("failed") for each in found] == [None, "OutOfMemoryError: no more", None, None]
    _, alone = run(bench, capsys, monkeypatch, "run", "full2k", "--rows", "3")
    assert alone["losses"] == found[2]["losses"]


def test_commands_are_expanded(bench):
    words = ["run", "full2k", "dpo", "--rows", "1", "2", "--compile_layers", "then", "gate", "--plan", "none"]
    assert [" ".join(each) for each in bench.expand(words)] == [
        "run full2k --rows 1 --compile_layers", "run full2k --rows 2 --compile_layers",
        "run dpo --rows 1 --compile_layers", "run dpo --rows 2 --compile_layers", "gate --plan none",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        bench.parse(["gate", "dpo"])


def test_the_longest_context(bench, capsys, monkeypatch):
    code, found = run(bench, capsys, monkeypatch, "context", "--cap_gib", "8")
    assert code == 0
    assert 1500 < found["context"] == found["estimated"] <= 2048
    code, other = run(bench, capsys, monkeypatch, "context", "--cap_gib", "8", "--max_length", "320")
    assert (code, other["context"], other["estimated"]) == (0, 320, found["estimated"])


def test_pairs(bench, capsys, monkeypatch):
    code, found = run(bench, capsys, monkeypatch, "run", "dpo", "--plan", "offload")
    assert code == 0
    assert found["losses"][0] == pytest.approx(math.log(2), abs=1e-4)
    assert found["tok_s"] > found["sup_tok_s"] > 0


def test_rows_are_the_same_each_time_and_of_chat_length(bench):
    case = bench.CASES["chat2k"]
    one, two = (importlib.import_module("fits").make_documents(case, 50, 128256) for _ in range(2))
    lengths = [len(row.input_ids) for row in one]
    assert all((a.input_ids == b.input_ids).all() for a, b in zip(one, two, strict=True))
    assert 32 <= min(lengths) < 300
    assert 600 < max(lengths) <= 2048


def test_most_tokens_of_learnable_rows_follow_from_the_one_before(bench):
    make_documents = importlib.import_module("fits").make_documents
    shares = {}
    for learnable in (False, True):
        ids = [row.input_ids for row in make_documents(bench.CASES["full2k"], 3, 64, learnable)]
        assert all(row.min() >= 3 and row.max() < 64 for row in ids)
        follow = [(row[1:] == 3 + (5 * row[:-1] + 7) % 61).mean() for row in ids]
        shares[learnable] = min(follow), max(follow)
    assert shares[False][1] < 0.05
    assert 0.85 < shares[True][0] <= shares[True][1] < 0.91


def test_layers_of_a_random_base_change_the_residual_stream_a_little(bench):
    base = importlib.import_module("random_base").random_base("tiny", torch.device("cpu"), torch.float32)
    ids = torch.arange(3, 67)[None]
    embedded, *_, last = base.model(input_ids=ids, output_hidden_states=True).hidden_states[:-1]
    assert 0.9 < embedded.std() < 1.1
    assert 0 < (last - embedded).norm() < 0.1 * embedded.norm()
