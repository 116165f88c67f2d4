"""Every measurement: own, peers and floor, each in a process of its own, and the page that shows them.

    python examples/benchmark/everything.py --out results.jsonl --checkpoint /tmp/base      # on a machine with one GPU
    python examples/benchmark/everything.py --out results.jsonl --groups gates speed --budget_s 560
    python examples/benchmark/report.py results.jsonl --output examples/benchmark/RESULTS.md

Lines are added to the file as they are measured, and what is there already is not measured again: a run that was cut
short goes on where it stopped. Rounds are interleaved, own and peers in turn, and the page shows their medians.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


class Measurement(NamedTuple):
    """A command, the group it belongs to, and whether it is repeated in every round."""

    group: str
    command: str
    repeated: bool = False


def _speed() -> list[Measurement]:
    """Own runs, each beside the peers that do the same."""
    beside = {
        "full2k --plan full": ["unsloth full2k", "trl-liger full2k", "trl full2k"],
        "full2k --plan none": ["unsloth full2k --plan none", "trl-liger full2k --plan none"],
        "full8k --plan full": ["unsloth full8k", "trl-liger full8k"],
        "chat2k_pack --plan full": ["unsloth chat2k_pack", "trl-liger chat2k_pack"],
        "chat2k_pack --plan none": ["unsloth chat2k_pack --plan none"],
        "chat2k_16 --plan auto": ["unsloth chat2k_16", "trl-liger chat2k_16"],
        "dpo --plan full": ["trl dpo"],
    }
    found = []
    for own, peers in beside.items():
        found.append(Measurement("speed", f"bench.py run {own}", repeated=True))
        found += [Measurement("speed", f"peers.py run {peer} CHECKPOINT", repeated=True) for peer in peers]
    return found


_RUN = "bench.py run full2k"
MEASUREMENTS = [
    *(Measurement("gates", f"bench.py gate {each}") for each in (
        "full2k --plan none", "chat2k_pack --plan selective", "full2k --plan offload",
        "chat2k_pack --plan none --compile_layers", "full2k --plan full --compile_layers",
    )),
    Measurement("floor", "floor.py"),
    Measurement("floor", "kernel_speed.py"),
    Measurement("speed", "peers.py make CHECKPOINT"),
    *_speed(),
    *(Measurement("variants", f"{_RUN} {each}") for each in (
        "--plan full --compile_layers", "--plan none --compile_layers", "--plan full --fused_lora false",
        "--plan none --fused_lora false", "--plan none --fused_lora false --compile_layers", "--plan selective",
        "--plan offload", "--plan auto", "--plan auto --cap_gib 24", "--plan auto --cap_gib 16",
        "--plan auto --cap_gib 8",
    )),
    *(Measurement("variants", f"bench.py run chat2k_pack --plan {plan} --compile_layers") for plan in ("full", "none")),
    *(Measurement("context", f"bench.py context --cap_gib {cap}") for cap in (8, 24, 80)),
    *(Measurement("growth", f"{_RUN} --plan full --rows {rows} --steps 8") for rows in (1, 2, 8, 16, 32)),
    Measurement("growth", f"{_RUN} --plan full --rows 1 --max_length 1024 --steps 8"),
    *(Measurement("growth", f"{_RUN} --plan offload --rows 1 --max_length {1024 * k} --steps 4")
      for k in (1, 4, 16, 32, 64, 128)),
    *(Measurement("growth", f"{_RUN} --plan full --rank {rank} --steps 8") for rank in (8, 32, 64, 128)),
    *(Measurement("growth", f"{_RUN} --plan full --shape {shape} --steps 6") for shape in ("0.5b", "14b", "70b")),
]  # fmt: skip
GROUPS = tuple(dict.fromkeys(each.group for each in MEASUREMENTS))


def plan(groups: list[str], rounds: int) -> list[tuple[int, Measurement]]:
    """Return what to measure in which round, in order."""
    chosen = [each for each in MEASUREMENTS if each.group in groups]
    later = [(number, each) for number in range(1, rounds) for each in chosen if each.repeated]
    return [(0, each) for each in chosen] + later


def measure(command: str, options: argparse.Namespace) -> dict[str, object]:
    """Run one measurement; what goes wrong is part of the record."""
    words = command.replace("CHECKPOINT", options.checkpoint).split()
    arguments = [sys.executable, str(HERE / words[0]), *words[1:], *options.extra]
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=options.timeout_s)
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {options.timeout_s} s"}
    lines = done.stdout.strip().splitlines()
    if not lines or (done.returncode and not lines[-1].startswith("{")):
        return {"failed": done.returncode, "stderr": done.stderr.strip().splitlines()[-6:]}
    if lines[-1].startswith("{"):
        return dict(json.loads(lines[-1])) | ({"failed": done.returncode} if done.returncode else {})
    return {"markdown": done.stdout}


def run(options: argparse.Namespace) -> int:
    """Measure what is not in the file yet; return how many failed."""
    begun, failed = time.monotonic(), 0
    known = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {(each["round"], each["command"]) for each in known if "failed" not in each}
    for number, each in plan(options.groups, options.rounds):
        if each.command.startswith("peers.py make") and Path(options.checkpoint).exists():
            continue
        if (number, each.command) in done:
            continue
        if time.monotonic() - begun > options.budget_s:
            print(f"The budget of {options.budget_s} s is spent; run it again to go on.", file=sys.stderr)
            break
        record = {"round": number, "group": each.group, "command": each.command, **measure(each.command, options)}
        failed += "failed" in record
        print(json.dumps(record), flush=True)
        with options.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
    return failed


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines, read and added to")
    parser.add_argument("--checkpoint", default="/tmp/base", help="folder for the peers' random checkpoint (16 GB)")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--rounds", type=int, default=1, help="of the group speed")
    parser.add_argument("--budget_s", type=float, default=float("inf"), help="no measurement begins later than this")
    parser.add_argument("--timeout_s", type=float, default=300, help="of one measurement")
    known, extra = parser.parse_known_args(arguments)
    known.extra = extra  # such as --device cpu --shape tiny, to try the paths
    return known


if __name__ == "__main__":
    sys.exit(min(run(parse(sys.argv[1:])), 125))
