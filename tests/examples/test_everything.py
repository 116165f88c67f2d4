"""All measurements in miniature, and the page that shows them."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys

import pytest
import torch

pytest.importorskip("trl")
EXTRA = ["--device", "cpu", "--shape", "tiny"]


@pytest.fixture(scope="module")
def everything(benchmark_scripts):
    return importlib.import_module("everything")


@pytest.fixture(scope="module")
def report(benchmark_scripts):
    return importlib.import_module("report")


MAKE, MAKE_SMALL = "peers.py make CHECKPOINT --shape 8b", "peers.py make CHECKPOINT-0.5b --shape 0.5b"


def test_every_command_is_one_that_its_script_takes(everything):
    options = everything.parse(["--out", "r.jsonl", "--checkpoint", "/a/b/", *EXTRA])
    commands = [each.command for each in [*everything.MAKES.values(), *everything.MEASUREMENTS]]
    assert len(commands) == len(set(commands))
    for command in commands:
        script = importlib.import_module(command.split()[0].removesuffix(".py"))
        taken = vars(script.parse(everything.arguments_of(command, options)))
        assert taken.get("checkpoint") in (None, "/a/b-0.5b" if "CHECKPOINT-0.5b" in command else "/a/b")
        if script.__name__ == "cpu_speed":
            assert taken["extra"] == command.split()[1:]  # of fit, which has neither a shape nor a device
        else:
            assert (taken["shape"], taken["device"]) == ("tiny", "cpu")


def test_rounds_repeat_own_and_peers_in_turn(everything):
    planned = everything.plan(["floor", "speed"], 2)
    again = [each.command for number, each in planned if number == 1]
    assert again[:2] == ["bench.py run full2k --plan full", "peers.py run unsloth full2k CHECKPOINT"]
    assert "floor.py" not in again


def test_a_small_model_with_graphs_and_without_beside_the_peers_that_do_the_same(everything):
    planned = [each.command for _, each in everything.plan(["small"], 1)]
    assert [each.command for _, each in everything.plan(["small"], 2)] == 2 * planned
    options = " --shape 0.5b --steps 20 --warmup 10"
    assert all(command.endswith(options) for command in planned)
    peers = ["unsloth full2k", "unsloth full2k --plan none", "trl-liger full2k --plan none",
             "unsloth chat2k_pack --plan none"]  # fmt: skip
    assert [command for command in planned if command.startswith("peers")] == [
        f"peers.py run {peer} CHECKPOINT-0.5b{options}" for peer in peers
    ]
    own = [command.removesuffix(options) for command in planned if command.startswith("bench")]
    assert own[1::2] == [f"{command} --cuda_graphs false" for command in own[::2]]
    assert own[::2] == [f"bench.py run {what}" for what in ("full2k --plan full", "full2k --plan none",
                                                            "chat2k_pack --plan none")]  # fmt: skip


def test_own_measurements_of_a_group_share_a_process_and_repeated_ones_do_not(everything):
    own = {"gates", "curve", "timeline", "variants", "optimizers", "context", "growth"}
    together = everything.batches(everything.plan(list(everything.GROUPS), 2))
    for each in together:
        assert len(each) == 1 or {m.group for _, m in each} < own
    names = [each[0][1].group for each in together]
    assert [names.count(name) for name in own] == [1] * len(own)
    assert sum(map(len, together)) == len(everything.plan(list(everything.GROUPS), 2))


FAKE = """
import json, os, pathlib, sys
mood = pathlib.Path(__file__).with_suffix(".mood")
for command in " ".join(sys.argv[1:]).split(" then "):
    if "--compile_layers" in command and mood.read_text() == "bad":
        print("Segmentation fault", file=sys.stderr)
        sys.exit(3)
    print(json.dumps({"asked": command, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}), flush=True)
"""


@pytest.fixture
def fake(everything, monkeypatch, tmp_path):
    """A bench.py that ends early at the first compiled measurement, while its mood is bad."""
    (tmp_path / "bench.py").write_text(FAKE)
    (tmp_path / "bench.mood").write_text("bad")
    monkeypatch.setattr(everything, "HERE", tmp_path)
    return tmp_path


def test_a_run_goes_on_where_it_stopped_and_after_a_failure(everything, fake, tmp_path, capsys):
    out = tmp_path / "r.jsonl"
    arguments = ["--out", str(out), "--groups", "gates", *EXTRA]
    assert everything.Session(everything.parse([*arguments, "--budget_s", "-1"])).run() == 0
    assert not out.exists()
    page = tmp_path / "RESULTS.md"
    assert everything.main([*arguments, "--page", str(page)]) == 2
    assert "Segmentation fault" in page.read_text()
    assert "gates took" in capsys.readouterr().err
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["command"] for r in records] == [m.command for m in everything.MEASUREMENTS if m.group == "gates"]
    for record in records:
        if "--compile_layers" in record["command"]:
            assert record["failed"] == 3
            assert record["stderr"] == ["Segmentation fault"]
        else:
            assert record["asked"] == f"{record['command'].removeprefix('bench.py ')} {' '.join(EXTRA)}"
    (tmp_path / "bench.mood").write_text("good")
    assert everything.main([*arguments, "--page", str(page)]) == 0
    assert page.read_text().startswith("# ")
    assert "Segmentation fault" not in page.read_text()
    again = [json.loads(line)["command"] for line in out.read_text().splitlines()][len(records) :]
    assert again == [record["command"] for record in records if "failed" in record] != []


@pytest.mark.parametrize("peer", [False, True])
def test_only_what_is_asked_for(everything, fake, tmp_path, peer):
    (fake / "bench.mood").write_text("good")
    (fake / "peers.py").write_text((fake / "bench.py").read_text())
    out, wanted = tmp_path / "r.jsonl", ["full8k --plan full", *(["trl dpo"] if peer else [])]
    arguments = ["--out", str(out), "--groups", "speed", "--checkpoint", str(tmp_path / "none"), *EXTRA]
    assert everything.Session(everything.parse([*arguments, "--containing", *wanted])).run() == 0
    found = [json.loads(line)["command"] for line in out.read_text().splitlines()]
    peers = ["peers.py run trl dpo CHECKPOINT"] if peer else []
    assert found == [*([MAKE] if peer else []), "bench.py run full8k --plan full", *peers]


@pytest.mark.parametrize(
    ("groups", "containing", "there", "made"),
    [
        (["start"], "start_speed", (), [MAKE]),
        (["start"], "start_speed", ("",), []),
        (["start", "small"], "unsloth", (), [MAKE_SMALL]),
        (["start", "small"], "CHECKPOINT", ("-0.5b",), [MAKE]),
        (["start", "small"], "CHECKPOINT", (), [MAKE, MAKE_SMALL]),
        (["cpu", "small"], "--cuda_graphs false", (), []),
    ],
)
def test_only_bases_that_are_read_and_not_there_are_made(everything, tmp_path, groups, containing, there, made):
    """Also where the file says that they were made: it may be another machine's."""
    for ending in there:
        (tmp_path / f"base{ending}").mkdir()
    out = tmp_path / "r.jsonl"
    out.write_text("".join(json.dumps({"round": 0, "command": each}) + "\n" for each in (MAKE, MAKE_SMALL)))
    arguments = ["--out", str(out), "--checkpoint", str(tmp_path / "base"), "--groups", *groups]
    session = everything.Session(everything.parse([*arguments, "--containing", containing]))
    assert [each.command for batch in session.makes for _, each in batch] == made
    assert len(session.queue) == len(everything.plan(groups, 1, [containing])) > 0


def test_no_base_is_made_for_what_is_measured_already(everything, tmp_path):
    out = tmp_path / "r.jsonl"
    out.write_text(json.dumps({"round": 0, "command": "start_speed.py CHECKPOINT --repeats 3"}))
    arguments = ["--out", str(out), "--checkpoint", str(tmp_path / "base"), "--groups", "start"]
    session = everything.Session(everything.parse(arguments))
    assert session.makes == session.queue == []


@pytest.mark.parametrize(("given", "expected"), [(None, {"0", "1", "2"}), ("5,7,6,4", {"5", "7", "6"})])
def test_several_gpus_measure_side_by_side(everything, fake, tmp_path, monkeypatch, given, expected):
    """Each command once, on one of the GPUs; what the peers load is made before any of it."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    (fake / "bench.mood").write_text("good")
    (fake / "peers.py").write_text((fake / "bench.py").read_text())
    out = tmp_path / "r.jsonl"
    groups = ["gates", "speed", "small", "growth"]
    arguments = ["--out", str(out), "--groups", *groups, "--gpus", "3", "--checkpoint", str(tmp_path / "none"), *EXTRA]
    assert everything.Session(everything.parse(arguments)).run() == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    asked = [measurement.command for measurement in everything.MEASUREMENTS if measurement.group in groups]
    assert [record["command"] for record in records[:2]] == [MAKE, MAKE_SMALL]
    assert sorted(record["command"] for record in records[2:]) == sorted(asked)
    assert {record["gpu"] for record in records} == expected
    assert {record["gpus_at_work"] for record in records} == {3}


def test_what_a_script_prints_is_kept(everything, monkeypatch, tmp_path):
    options = everything.parse(["--out", str(tmp_path / "r.jsonl"), "--timeout_s", "60"])
    monkeypatch.setattr(everything, "HERE", tmp_path)

    def ran(code, *lines, wait=0):
        said = "\n".join(f"print({line!r}, flush=True)" for line in lines)
        script = (
            f"import sys, time\n{said}\nprint('one\\ntwo', file=sys.stderr)\ntime.sleep({wait})\nsys.exit({code})\n"
        )
        (tmp_path / "floor.py").write_text(script)
        return list(everything.measure(["floor.py"], options))

    assert ran(0, "noise", '{"tok_s": 1}') == [{"tok_s": 1}]
    assert ran(1, '{"passed": false}') == [{"passed": False, "failed": "the check"}]
    assert ran(0, "| a |", "| b |") == [{"markdown": "| a |\n| b |\n"}]
    assert ran(2, "half a table") == ran(2) == [{"failed": 2, "stderr": ["one", "two"]}]
    options.timeout_s = 1
    assert ran(0, '{"tok_s": 1}', wait=30) == [{"tok_s": 1}, {"failed": "more than 1 s", "stderr": ["one", "two"]}]


@pytest.mark.filterwarnings("ignore")  # the peer's own
@pytest.mark.parametrize("case", ["full2k", "dpo"])
def test_a_peer_on_the_same_rows(everything, benchmark_scripts, case, tmp_path, monkeypatch, capsys):
    peers, bench = importlib.import_module("peers"), importlib.import_module("bench")
    records = []
    for script, *words in (
        (peers, "make", str(tmp_path / "base")),
        (peers, "run", "trl", case, str(tmp_path / "base"), "--steps", "2", "--warmup", "1"),
        (bench, "run", case, "--steps", "2", "--warmup", "1"),
    ):
        monkeypatch.setattr(sys, "argv", [script.__name__, *words, *EXTRA])
        with contextlib.suppress(SystemExit):
            script.main()
        records.append(json.loads(capsys.readouterr().out))
    _, peer, own = records
    assert peer["trainable"] == own["trainable"]
    assert abs(peer["tokens_per_step"] - own["tokens_per_step"]) <= 1
    assert peer["tok_s"] > peer["sup_tok_s"] > 0
    share = own["sup_tok_s"] / own["tok_s"]
    assert peer["sup_tok_s"] / peer["tok_s"] == pytest.approx(share, rel=0.02)  # the same tokens are supervised


@pytest.mark.parametrize(
    ("ranks", "device", "words"), [(1, "cuda", ["torchrun"]), (2, "cpu", ["GPUs only", "--strategy ddp"])]
)
def test_where_peers_have_no_fsdp_is_said_beforehand(everything, monkeypatch, capsys, ranks, device, words):
    peers = importlib.import_module("peers")
    monkeypatch.setattr(peers, "WORLD_SIZE", ranks)
    with pytest.raises(SystemExit, match="2"):
        peers.parse(["run", "trl", "full2k", "folder", "--strategy", "fsdp", "--device", device])
    message = capsys.readouterr().err
    assert all(word in message for word in words)


def test_what_is_whole_on_each_rank_is_not_measured_as_fsdp(everything):
    peers = importlib.import_module("peers")
    with pytest.raises(RuntimeError, match=r"2 parameters are whole on each rank, weight first"):
        peers.check_is_sharded(torch.nn.Linear(2, 2))


def test_the_floor_is_the_sum_of_its_parts(benchmark_scripts, monkeypatch, capsys):
    floor = importlib.import_module("floor")
    monkeypatch.setattr(sys, "argv", ["floor.py", *EXTRA, "--tokens", "64", "--max_length", "32", "--repeats", "1"])
    floor.main()
    found = json.loads(capsys.readouterr().out)
    forward = found["products_forward_ms"] + found["dequantisation_ms"] + found["attention_forward_ms"]
    assert found["step_full_ms"] - found["step_none_ms"] == pytest.approx(4 * forward, abs=0.2)
    assert found["tok_s_none"] > found["tok_s_full"] > 0


def test_the_page_shows_medians_ratios_and_failures(report, tmp_path):
    own = {"what": "run", "case": "full2k", "plan": "none", "plan_used": "none", "sup_tok_s": 5, "peak_gib": 30.0,
           "mean_step_ms": 500.0, "step_ms": {"p50": 499.6}, "optimizer": "adamw",
           "build_s": 1, "import_s": 1, "first_step_s": 1, "shape": "8b", "rank": 16,
           "fused_lora": "auto", "compile_layers": False, "cap_gib": None, "rows": None, "max_length": None,
           "predicted_gib": 33.0, "tokens_per_step": 8192, "device_name": "a GPU", "torch": "2.11",
           "group": "speed"}  # fmt: skip
    peer = {"what": "run", "peer": "unsloth", "case": "full2k", "plan": "none", "sup_tok_s": 4, "peak_gib": 35.0,
            "step_ms": {"p50": 700.0}, "tokens_per_step": 8192, "group": "speed", "round": 0,
            "command": "peers.py run unsloth full2k --plan none CHECKPOINT"}  # fmt: skip
    parts = {f"{name}_ms": 1.0 for name in ("products_forward", "products_backward", "dequantisation",
                                            "attention_forward", "attention_backward", "head")}  # fmt: skip
    floor = {"command": "floor.py", "group": "floor", "round": 0, "shape": "8b", "tok_s_full": 100, "tok_s_none": 200}
    command = "bench.py run full2k --plan none"
    records = [
        *({**own, "command": command, "round": n, "tok_s": s, "step_ms": {"p50": ms}}
          for n, (s, ms) in enumerate(((150, 499.6), (190, 400.0), (100, 700.0)))),
        {**own, "command": "bench.py run full2k --plan full --rows 1", "plan": "full", "round": 0, "tok_s": 90,
         "tokens_per_step": 2048, "group": "growth", "rows": 1},
        {**own, "command": "bench.py run full2k --plan full --rows 8", "plan": "full", "round": 0, "tok_s": 95,
         "tokens_per_step": 16384, "group": "growth", "rows": 8},
        {**own, "command": "bench.py run full2k --plan full", "plan": "full", "round": 0, "tok_s": 93},
        {**own, "command": "bench.py run full2k --plan offload --rows 1 --max_length 4096 --shape 70b", "round": 0,
         "plan": "offload", "tok_s": 9, "group": "growth", "shape": "70b", "rows": 1, "max_length": 4096},
        {**own, "command": "bench.py run full2k --plan full --optimizer adamw_8bit", "plan": "full", "round": 0,
         "tok_s": 92, "group": "optimizers", "optimizer": "adamw_8bit"},
        {**own, "command": "bench.py run full2k --plan none --shape 0.5b", "round": 0, "tok_s": 300, "group": "small",
         "shape": "0.5b", "graph_replays": 22},
        {"command": "start_speed.py CHECKPOINT", "group": "start", "round": 0, "shape": "8b",
         "runs": [{"imported_s": 1.0, "built_s": 2.0, "first_batch_s": 3.0, "first_step_s": 4.0}]},
        {"command": "cpu_speed.py", "group": "cpu", "round": 0, "dtype": "float32", "threads": 2, "own_step_ms": 8.0,
         "plain_step_ms": 9.0, "speed_ratio": 1.125, "speed_ratio_of_each_turn": [1.1, 1.2]},
        {**peer, "tok_s": 100},
        {"command": "bench.py gate full2k", "group": "gates", "round": 0, "passed": True, "loss_difference": 1e-4,
         "gradient_cosine": 0.9995, "plain_loss_difference": 2e-4, "plain_gradient_cosine": 0.9994,
         "cosine_to_plain": 0.9996},
        {"command": "bench.py curve full2k", "group": "curve", "round": 0, "shape": "0.5b", "losses": [3.0, 1.0],
         "plain_losses": [3.0, 1.1], "exact_losses": [3.1, 1.2], "largest_distance": 0.05},
        {"command": "bench.py context --cap_gib 80 --max_length 350000", "group": "context", "round": 0,
         "cap_gib": 80.0, "max_length": 350000, "context": 350000, "estimated": 479552, "peak_gib": 54.5},
        {"command": "kernel_speed.py", "group": "floor", "round": 0, "markdown": "| Q, K, V | 1.0 |\n"},
        {**floor, **parts},
        {"command": "bench.py gate full2k --plan offload", "group": "gates", "round": 0, "failed": 1, "stderr": ["no"]},
    ]  # fmt: skip
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(record) + "\n" for record in records))
    report.main([str(results), "--output", str(tmp_path / "RESULTS.md")])
    page = (tmp_path / "RESULTS.md").read_text()
    assert "| 4 x 2,048 tokens | none | lightning_qlora | 150 | 5 | 500 | 30.00 | 1.50 x, 1.40 x | 75% |" in page
    assert "| 4 x 2,048 tokens | none | unsloth | 100 | 4 | 700 | 35.00 |  | 50% |" in page
    assert "| `bench.py gate full2k --plan offload` | ['no'] |" in page
    assert "## Kernels one by one\n\n| Q, K, V | 1.0 |" in page
    assert "| `full2k` | 1.0e-04 | 0.999500 | 2.0e-04 | 0.999400 | 0.999600 | yes |" in page
    assert (
        "| `curve full2k` | 2 | 3.000 | 1.000 | 1.100 | 1.200 | 0.00% / 2.44% | 3.23% / 6.98% | 3.23% / 4.65% |" in page
    )
    assert "| `full2k --plan none` | none | 33.00 | 30.00 | +10.0% |" in page
    assert "| 80 | 350,000 | 479,552 | 350,000 | 54.50 |" in page
    grown = [
        "| 8b | 16 | full | 1 | 2,048 | 90 | 500 | 30.00 |",
        "| 8b | 16 | full | 4 | 2,048 | 93 | 500 | 30.00 |",
        "| 8b | 16 | full | 8 | 2,048 | 95 | 500 | 30.00 |",
        "| 70b | 16 | offload | 1 | 4,096 | 9 | 500 | 30.00 |",
    ]
    assert "\n".join(grown) + "\n\n" in page
    assert "| `adamw_8bit` | 92 | 500 | 30.00 |" in page
    assert "| 4 x 2,048 tokens | none | yes | lightning_qlora | 300 | 500 | 30.00 |  |" in page
    assert "| the first | 1.0 | 1.0 | 1.0 | 1.0 | 4.0 |" in page
    assert "| float32 | 2 | 8 | 9 | 1.12 x | 1.10 to 1.20 |" in page
    for plot in ("tokens", "breakdown", "curve"):
        assert f"(results_{plot}.svg)" in page
        assert "<svg" in (tmp_path / f"results_{plot}.svg").read_text()


def test_a_small_model_has_a_table_of_its_own_that_says_where_graphs_were_replayed(report):
    common = {"case": "full2k", "plan": "none", "group": "small", "shape": "0.5b", "round": 0, "tokens_per_step": 8192,
              "peak_gib": 7.5}  # fmt: skip
    own = {**common, "plan_used": "none", "rank": 16, "rows": None, "max_length": None, "mean_step_ms": 50.0}
    command = "bench.py run full2k --plan none"
    records = [
        {**common, "command": "peers.py run unsloth", "peer": "unsloth", "tok_s": 100, "step_ms": {"p50": 80.0}},
        {**own, "command": f"{command} --cuda_graphs false", "cuda_graphs": "false", "graph_replays": 0, "tok_s": 90,
         "step_ms": {"p50": 90.0}},
        {**own, "command": command, "cuda_graphs": "auto", "graph_replays": 22, "tok_s": 200, "step_ms": {"p50": 50.0}},
        {**own, "command": f"{command} --rank 8", "plan": "full", "plan_used": "full", "tok_s": 80,
         "step_ms": {"p50": 95.0}},
        {**common, "command": "peers.py run trl", "failed": 1},
    ]  # fmt: skip
    page = "\n".join(report.small(records))
    rows = [
        "| 4 x 2,048 tokens | full | no | lightning_qlora | 80 | 95 | 7.50 |  |",  # without the key, and no peer
        "| 4 x 2,048 tokens | none | yes | lightning_qlora | 200 | 50 | 7.50 | 2.00 x, 1.60 x |",
        "| 4 x 2,048 tokens | none | no | lightning_qlora | 90 | 90 | 7.50 | 0.90 x, 0.89 x |",
        "| 4 x 2,048 tokens | none |  | unsloth | 100 | 80 | 7.50 |  |",
    ]
    assert "| --- |\n" + "\n".join(rows) + "\n" in page
    assert "shape 0.5b" in page
    assert report.growth(records) == report.speed(records, None) == report.small([]) == []


def test_a_start_is_drawn_by_its_parts_and_the_first_one_apart(report):
    names = ("imported_s", "built_s", "first_batch_s", "first_step_s")
    noted = (5.0, 15.0, 17.0, 47.0), (4.0, 10.0, 11.6, 13.0), (4.4, 10.4, 11.8, 13.4)
    runs = [dict(zip(names, seconds, strict=True)) for seconds in noted]
    record = {"group": "start", "command": "start_speed.py CHECKPOINT", "shape": "8b", "runs": runs}
    page = "\n".join(report.starts([record]))
    assert "| run | imports and command line | base with adapters | data and summary | first step | all |" in page
    rows = ["| the first | 5.0 | 10.0 | 2.0 | 30.0 | 47.0 |", "| median of 2 later | 4.2 | 6.0 | 1.5 | 1.5 | 13.2 |"]
    assert "\n".join(rows) in page
    assert "median" not in "\n".join(report.starts([{**record, "runs": runs[:1]}]))
    assert report.starts([{"group": "start", "command": "start_speed.py CHECKPOINT", "failed": 1}]) == []


def test_a_step_on_a_cpu_is_drawn_for_each_dtype(report):
    record = {"group": "cpu", "dtype": "bfloat16", "threads": 2, "own_step_ms": 833.4, "plain_step_ms": 978.0,
              "speed_ratio": 1.174, "speed_ratio_of_each_turn": [1.1, 0.91, 1.35]}  # fmt: skip
    page = "\n".join(report.processors([record, {**record, "dtype": "float32"}, {"group": "cpu", "failed": 1}]))
    rows = [f"| {dtype} | 2 | 833 | 978 | 1.17 x | 0.91 to 1.35 |" for dtype in ("bfloat16", "float32")]
    assert "\n".join(rows) in page
    assert report.processors([]) == []
