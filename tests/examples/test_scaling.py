import dataclasses
import importlib
import json
import subprocess
import sys
import time
import types

import psutil
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
        (0, ["--accelerator", "cpu", "--cap_gib", "6"], ["--cap_gib", "--accelerator gpu"]),
    ],
)
def test_too_few_gpus_are_said_before_anything_runs(scaling, gpus, arguments, words, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr(scaling, "launch", lambda *_: pytest.fail("launched"))
    with pytest.raises(SystemExit, match="2"):
        scaling.main(arguments)
    message = capsys.readouterr().err
    assert all(word in message for word in words)


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)


def test_cases_for_eight_gpus(scaling, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    options = scaling.parse(["--devices", "1", "2", "4", "8"])
    cases = [(c.strategy, c.shape, c.rows, c.devices) for c in scaling.plan(options)]
    assert cases[:8] == [("ddp", "8b", rows, n) for rows in ("chat", "full") for n in (1, 2, 4, 8)]
    assert cases[8:] == [("fsdp", "70b", "full", n) for n in (2, 4, 8)]
    assert [(c.strategy, c.devices, c.resume) for c in scaling.resuming(options, "folder")] == [
        ("fsdp", 8, False), ("fsdp", 4, True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "cases", "saved"),
    [
        ("--rows full --no-resume", [("ddp", "8b", "full"), ("fsdp", "70b", "full")], None),
        ("--rows chat full --only fsdp", [("fsdp", "70b", "chat"), ("fsdp", "70b", "full")], ("fsdp", "70b", "full")),
        ("--only ddp --rows chat", [("ddp", "8b", "chat")], ("ddp", "8b", "chat")),
        ("--shape 14b --rows full", [("ddp", "14b", "full"), ("fsdp", "14b", "full")], ("fsdp", "14b", "full")),
    ],
)
def test_what_is_chosen(scaling, four_gpus, words, cases, saved):
    options = scaling.parse(["--devices", "4", "--warmup", "3", "--cap_gib", "6", *words.split()])
    planned, resumed = scaling.plan(options), scaling.resuming(options, "folder")
    assert [(c.strategy, c.shape, c.rows) for c in planned] == cases
    assert [(c.strategy, c.shape, c.rows) for c in resumed] == ([saved, saved] if saved else [])
    assert {(c.warmup, c.cap_gib) for c in planned + resumed} == {(3, 6.0)}


def test_an_own_case_is_what_its_command_measures(scaling, four_gpus):
    options = scaling.parse(
        ["--shape", "8b", "--tokens_per_batch", "2048", "--cap_gib", "6.5", "--steps", "7", "--warmup", "3"]
    )
    cases = scaling.plan(options)
    assert len(cases) == 8
    for case in cases:
        alone = scaling.parse(case.command.split()[1:])
        assert [*scaling.plan(alone), *scaling.resuming(alone, "folder")] == [case]
    commands = [case.command for case in [*cases, *scaling.resuming(options, "folder")]]
    assert len(set(commands)) == 10


def test_trl_has_as_many_rows_of_the_same_length_behind_each_own_case(scaling, four_gpus):
    peers = importlib.import_module("peers")
    options = scaling.parse(["--peers", "folder", "--devices", "1", "4", "--tokens_per_batch", "4096"])
    cases = scaling.plan(options)
    assert {case.shape for case in cases} == {"8b"}
    for own, trl in zip(cases[::2], cases[1::2], strict=True):
        assert (own.trainer, trl.trainer) == ("lightning_qlora", "trl")
        assert trl == dataclasses.replace(own, trainer="trl")
        words = scaling.peer_words(trl, "folder")
        assert (
            f"torchrun --nproc-per-node={trl.devices} {' '.join(words)}".replace("folder", "CHECKPOINT") == trl.command
        )
        asked = peers.parse([*words[1:], "--strategy", "ddp"])
        case = importlib.import_module("cases").case_of(asked)
        assert (case.rows, case.max_length, case.packed) == (2, 2048, own.rows == "chat")
        assert f"--strategy {own.strategy}" in trl.command
    tiny = dataclasses.replace(cases[1], shape="tiny", tokens_per_batch=256)
    asked = peers.parse(scaling.peer_words(tiny, "folder")[1:])
    assert importlib.import_module("cases").case_of(asked)[1:3] == (256, 1)
    on_cpus = scaling.parse(["--accelerator", "cpu", "--peers", "folder"])
    assert {case.strategy for case in scaling.plan(on_cpus) if case.trainer == "trl"} == {"ddp"}


@pytest.mark.parametrize("trainer", ["lightning_qlora", "trl"])
def test_memory_is_capped_before_anything_is_loaded(scaling, monkeypatch, trainer):
    capped = []

    def cap(fraction, device):
        capped.append((fraction, device))
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", cap)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: types.SimpleNamespace(total_memory=24 * 2**30))
    monkeypatch.setenv("LOCAL_RANK", "1")
    case = scaling.Case(trainer, "fsdp", "8b", "full", 2, "gpu", 4, 2, 2048, cap_gib=6.0)
    peers = importlib.import_module("peers")
    monkeypatch.setattr(peers, "LOCAL_RANK", 1)
    monkeypatch.setattr(peers, "WORLD_SIZE", 2)
    run = {"lightning_qlora": importlib.import_module("scaling_rank").run, "trl": peers.run}[trainer]
    with pytest.raises(KeyboardInterrupt):
        run(peers.parse(scaling.peer_words(case, "folder")[1:]) if trainer == "trl" else case)
    assert capped == [(0.25, 1)]


def test_what_hangs_is_ended_with_all_that_it_started_and_says_so(scaling, tmp_path):
    started = tmp_path / "pid"
    child = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True); "
        "print('waiting', file=sys.stderr, flush=True); time.sleep(60)"
    )
    begun = time.monotonic()
    found = scaling._measure([sys.executable, "-c", parent], timeout_s=3)
    assert time.monotonic() - begun < 30
    assert found == {"failed": "more than 3 s: waiting\n"}
    left = int(started.read_text())
    assert not psutil.pid_exists(left) or psutil.Process(left).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("errors", "reason"),
    [
        ("noise\n[rank1]: torch.OutOfMemoryError: CUDA\nx.errors.ChildFailedError: \n", "torch.OutOfMemoryError: CUDA"),
        ("x.errors.ChildFailedError: \nSignal 9 (SIGKILL)", "x.errors.ChildFailedError: \nSignal 9 (SIGKILL)"),
    ],
)  # fmt: skip
def test_the_reason_is_the_first_error_of_a_rank(scaling, errors, reason):
    script = f"import sys; sys.stderr.write({errors!r}); sys.exit(1)"
    assert scaling._measure([sys.executable, "-c", script], timeout_s=60) == {"failed": reason}


def test_the_page_of_several_gpus(scaling, tmp_path):
    report = importlib.import_module("report")

    def line(devices, rate, strategy="ddp", trainer="lightning_qlora", rows="full", **more):
        case = scaling.Case(trainer, strategy, "8b", rows, devices, "gpu", 40, 10, 8192)
        case = dataclasses.replace(case, **{name: more.pop(name) for name in ("resume", "folder") if name in more})
        return {
            "round": 0, "group": "scaling", "command": case.command, **dataclasses.asdict(case), "device_name": "a GPU",
            "saves": case.folder is not None, "tokens_per_second": rate, "peak_memory_gib": [8.0, 9.125][:devices],
            "start_peak_gib": [None], "start_seconds": 21.0, "torch": "2.11", **more,
        }  # fmt: skip

    steps = {"train_loss": 6.5, "save_seconds": 0.25}
    records = [
        line(4, 1.0),
        line(4, 38_000.0, strategy="fsdp"), line(2, 18_000.0), {**line(2, 20_000.0), "round": 1},
        line(1, 10_000.0), line(4, 36_000.0),
        line(1, 8_000.0, trainer="trl"), line(2, 12_000.0, trainer="trl"), line(2, 50.0, rows="chat"),
        {"round": 0, "group": "scaling", "command": line(4, 0.0, trainer="trl")["command"], "failed": "CUDA | out"},
        line(2, 9.0, folder="f", resume=True, steps_before=12, optimizer_steps=24, **steps),
        line(4, 9.0, folder="f", steps_before=0, optimizer_steps=12, **steps),
    ]  # fmt: skip
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(record) + "\n" for record in records))
    report.main([str(results), "--output", str(tmp_path / "RESULTS.md")])
    page = (tmp_path / "RESULTS.md").read_text()
    rows = [row for row in page.splitlines() if row.startswith(("| lightning_qlora", "| trl"))]
    case = "8b | full | 8,192 | "
    assert rows == [
        "| lightning_qlora | ddp | 8b | chat | 8,192 |  | 2 | 50 | 100.0% | 9.12 |  | 21.0 |",
        f"| lightning_qlora |  | {case} | 1 | 10,000 | 100.0% | 8.00 |  | 21.0 |",
        f"| trl |  | {case} | 1 | 8,000 | 100.0% | 8.00 |  | 21.0 |",
        f"| lightning_qlora | ddp | {case} | 2 | 19,000 | 95.0% | 9.12 |  | 21.0 |",
        f"| trl | ddp | {case} | 2 | 12,000 | 75.0% | 9.12 |  | 21.0 |",
        f"| lightning_qlora | ddp | {case} | 4 | 36,000 | 90.0% | 9.12 |  | 21.0 |",
        f"| lightning_qlora | fsdp | {case} | 4 | 38,000 | 95.0% | 9.12 |  | 21.0 |",
        f"| lightning_qlora | ddp | {case} | 4 | 0 | 12 | 6.500 | 21.0 | 0.25 |",
        f"| lightning_qlora | ddp | {case} | 2 | 12 | 24 | 6.500 | 21.0 | 0.25 |",
    ]
    assert "a GPU: torch 2.11." in page
    assert "--device cuda --steps 40 --warmup 10 --rows 4 --max_length 2048` | CUDA / out |" in page


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
    assert (saved["steps_before"], resumed["steps_before"]) == (0, 12)
    assert resumed["train_loss"] != saved["train_loss"]


@pytest.mark.slow
def test_ddp_on_two_processes_beside_trl_and_gone_on_with_one(benchmark_scripts, tmp_path):
    pytest.importorskip("trl")
    out, base = tmp_path / "scaling.jsonl", tmp_path / "base"
    options = ["--only", "ddp", "--rows", "full", "--devices", "2", "--warmup", "2", "--tokens_per_batch", "256"]
    done = run(benchmark_scripts, out, *options, "--peers", str(base))
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(tmp_path) not in out.read_text()
    own, trl, saved, resumed = [json.loads(line) for line in out.read_text().splitlines()]
    assert (own["trainer"], trl["trainer"]) == ("lightning_qlora", "trl")
    for record in (own, trl):  # 256 tokens of each rank
        assert record["tokens_per_second"] * record["step_seconds"] == pytest.approx(512, rel=0.1)
        assert len(record["peak_memory_gib"]) == 2
    assert (saved["steps_before"], saved["optimizer_steps"]) == (0, 4)
    assert (resumed["devices"], resumed["steps_before"], resumed["optimizer_steps"]) == (1, 4, 8)
    report = importlib.import_module("report")
    assert "\n".join(report.several_gpus(report.read(out))) in done.stdout
    again = run(benchmark_scripts, out, *options, "--no-resume", "--peers", str(tmp_path), "--timeout_s", "60")
    assert again.returncode == 1
    *before, _, failed = [json.loads(line) for line in out.read_text().splitlines()]
    assert before == [own, trl, saved, resumed]
    assert "Error: " in failed["failed"]  # a folder without a checkpoint


@pytest.mark.slow
def test_what_fails_says_why_and_the_next_case_is_measured(benchmark_scripts, tmp_path):
    """No row is as short as the budget of tokens."""
    out = tmp_path / "scaling.jsonl"
    done = run(benchmark_scripts, out, "--tokens_per_batch", "-1", "--only", "ddp", "--devices", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["rows"] for record in records] == ["chat", "full"]
    for record in records:
        assert "Error: " in record["failed"]
        assert "ChildFailedError" not in record["failed"]
