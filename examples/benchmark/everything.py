"""Every measurement: own, peers and floor, and the page that shows them.

    python examples/benchmark/everything.py --out results.jsonl --checkpoint /tmp/base --page RESULTS.md    # on one GPU
    python examples/benchmark/everything.py --out results.jsonl --groups gates speed --budget_s 560
    python examples/benchmark/everything.py --out results.jsonl --groups speed --containing chat2k_pack "trl dpo"

Lines are added to the file as they are measured, and what is there already is not measured again: a run that was cut
short goes on where it stopped. Rounds are interleaved, own and peers in turn, and the page shows their medians: there,
each measurement has a process of its own. Other groups share one, which imports its libraries once. A base that is read
is written beforehand, unless it is there.

With ``--gpus 4`` four GPUs of a machine take one process after another from the list; a record then says how many were
at work, since they share the host.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import report
from cases import expand

HERE = Path(__file__).parent


class Measurement(NamedTuple):
    """A command, the group it belongs to, and whether it is repeated in every round."""

    group: str
    command: str
    repeated: bool = False


_BASE, _SMALL_BASE = "CHECKPOINT", "CHECKPOINT-0.5b"  # in commands, for the folders of bases that are read
MAKES = {
    folder: Measurement("make", f"peers.py make {folder} --shape {shape}")
    for folder, shape in ((_BASE, "8b"), (_SMALL_BASE, "0.5b"))
}
"""What writes each of them."""


def _speed() -> list[Measurement]:
    """Own runs beside the peers on a large model."""
    beside = {
        "full2k --plan full": ["unsloth full2k", "trl-liger full2k", "trl full2k"],
        "full2k --plan selective_offload": [],
        "full2k --plan offload": [],
        "full2k --plan none": ["unsloth full2k --plan none", "trl-liger full2k --plan none"],
        "full8k --plan full": ["unsloth full8k", "trl-liger full8k"],
        "full8k --plan selective_offload": [],
        "chat2k_pack --plan full": ["unsloth chat2k_pack", "trl-liger chat2k_pack", "trl chat2k_pack"],
        "chat2k_pack --plan selective_offload": [],
        "chat2k_pack --plan none": ["unsloth chat2k_pack --plan none"],
        "chat2k_16 --plan auto": ["unsloth chat2k_16", "trl-liger chat2k_16"],
        "dpo --plan full": ["trl dpo"],
        "dpo --plan none": [],
    }
    return _beside("speed", beside, _BASE)


def _small() -> list[Measurement]:
    """Own runs, with CUDA graphs and without, beside the peers on a small model, whose steps wait for the host."""
    beside = {
        "full2k --plan full": ["unsloth full2k"],
        "full2k --plan full --cuda_graphs false": [],
        "full2k --plan none": ["unsloth full2k --plan none", "trl-liger full2k --plan none"],
        "full2k --plan none --cuda_graphs false": [],
        "chat2k_pack --plan none": ["unsloth chat2k_pack --plan none"],
        "chat2k_pack --plan none --cuda_graphs false": [],
    }
    return _beside("small", beside, _SMALL_BASE, " --shape 0.5b --steps 20 --warmup 10")


def _beside(group: str, beside: dict[str, list[str]], base: str, more: str = "") -> list[Measurement]:
    """Own runs, each beside the peers that do the same, all with the same further options."""
    found = []
    for own, peers in beside.items():
        commands = [f"bench.py run {own}", *(f"peers.py run {peer} {base}" for peer in peers)]
        found += [Measurement(group, command + more, repeated=True) for command in commands]
    return found


def _own(group: str, *commands: str) -> list[Measurement]:
    """Own runs, one for each combination of values."""
    return [Measurement(group, " ".join(["bench.py", *words])) for each in commands for words in expand(each.split())]


MEASUREMENTS = [
    *_own(
        "gates", "gate full2k --plan none selective_offload offload", "gate chat2k_pack --plan full selective_offload",
        "gate full2k --plan full --compile_layers", "gate chat2k_pack --plan none --compile_layers",
        "gate full2k --plan none --cuda_graphs true", "gate chat2k_pack --plan full --cuda_graphs true",
    ),
    *_own("curve", "curve full2k --plan none --rows 2 --steps 200"),
    *_own(
        "timeline", "timeline full2k --plan none selective_offload full", "timeline chat2k_pack --plan none",
        "timeline full2k --plan none --rows 1",
    ),
    Measurement("floor", "floor.py"),
    Measurement("floor", "kernel_speed.py"),
    *_speed(),
    *_small(),
    Measurement("start", f"start_speed.py {_BASE} --repeats 3"),
    *_own(
        "variants", "run full2k --plan full none --compile_layers", "run chat2k_pack --plan none --compile_layers",
        "run full2k --plan full none --fused_lora false", "run full2k --plan selective",
        "run full2k --plan auto --cap_gib 24 16 8",
    ),
    *_own("optimizers", "run full2k --plan full --optimizer adamw adamw_foreach adamw_8bit paged_adamw_8bit"),
    *_own("context", "context --cap_gib 8 24", "context --cap_gib 80 --max_length 350000"),  # 85 GiB on the host
    *_own(  # tokens of a batch, of a context, ranks and shapes; 4 rows and rank 16 are measured for speed
        "growth", "run full2k --plan full --rows 1 --max_length 1024 --steps 8 --warmup 10",
        "run full2k --plan full none --rows 1 2 --steps 8 --warmup 10",
        "run full2k --plan full --rows 8 32 --steps 4 --warmup 2",
        "run full2k --plan offload --rows 1 --max_length 1024 4096 16384 65536 --steps 2 --warmup 1",
        "run full2k --plan offload --rows 1 --max_length 131072 --steps 1 --warmup 1",
        "run full2k --plan selective_offload --rank 8 64 128 --steps 6 --warmup 2",
        "run full2k --plan selective_offload --shape 0.5b 14b --steps 6 --warmup 2",
        "run full2k --plan full --shape 70b --rows 1 --steps 3 --warmup 1",
    ),
    *(Measurement("cpu", f"cpu_speed.py --model.init_args.dtype={dtype}") for dtype in ("bfloat16", "float32")),
]  # fmt: skip
GROUPS = tuple(dict.fromkeys(each.group for each in MEASUREMENTS))


def plan(groups: list[str], rounds: int, containing: list[str] | None = None) -> list[tuple[int, Measurement]]:
    """Return what to measure in which round, in order.

    Args:
        groups: Of measurements.
        rounds: Of those that are repeated.
        containing: Parts of commands, one of which a chosen one has; ``None`` for all.
    """

    def is_chosen(each: Measurement) -> bool:
        return containing is None or any(part in each.command for part in containing)

    chosen = [each for each in MEASUREMENTS if each.group in groups and is_chosen(each)]
    later = [(number, each) for number in range(1, rounds) for each in chosen if each.repeated]
    return [(0, each) for each in chosen] + later


Batch: TypeAlias = list[tuple[int, Measurement]]
"""Measurements of one process, each with its round."""


def makes(waiting: Batch, options: argparse.Namespace) -> Batch:
    """Return what writes the bases that measurements read and that are not there."""
    words = {word for _, each in waiting for word in each.command.split()}
    return [(0, make) for base, make in MAKES.items() if base in words and not Path(placed(base, options)).exists()]


def placed(word: str, options: argparse.Namespace) -> str:
    """Return a word of a command, with the folder where bases are asked to be."""
    return word.replace(_BASE, str(options.checkpoint))


def arguments_of(command: str, options: argparse.Namespace) -> list[str]:
    """Return what a script is called with; cpu_speed.py has one device and one model, and gets nothing added."""
    script, *words = command.split()
    return [*(placed(word, options) for word in words), *(options.extra if script != "cpu_speed.py" else [])]


def batches(planned: list[tuple[int, Measurement]]) -> list[Batch]:
    """Return what runs in one process: own measurements of a group that is not repeated, and anything else alone."""

    def process(numbered: tuple[int, tuple[int, Measurement]]) -> object:
        index, (_, each) = numbered
        return each.group if each.command.startswith("bench.py") and not each.repeated else index

    return [[item for _, item in items] for _, items in itertools.groupby(enumerate(planned), process)]


def spread(batch: Batch, gpus: int) -> list[Batch]:
    """Cut what one process would measure into as many parts as GPUs could."""
    size = -(len(batch) // -gpus)
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def measure(commands: list[str], options: argparse.Namespace, gpu: str | None = None) -> Iterator[dict[str, Any]]:
    """Run commands of one script in one process, and yield what each found as soon as it is known.

    What goes wrong is part of the record; if the process ends early, that of the first that did not run is the last.
    """
    script, words = commands[0].split()[0], []
    for command in commands:
        words += ["then", *arguments_of(command, options)]
    arguments = [sys.executable, str(HERE / script), *words[1:]]
    late: list[bool] = []
    found, other = 0, []
    environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        try:
            while line := _next_line(process, options.timeout_s, late):
                if line.startswith("{"):
                    found += 1
                    result = json.loads(line)
                    yield result | ({} if result.get("passed", True) else {"failed": "the check"})
                else:
                    other.append(line)
        except GeneratorExit:
            process.kill()
            raise
        code = process.wait()
        errors.seek(0)
        said = errors.read().strip().splitlines()[-6:]
    if late:
        yield {"failed": f"more than {options.timeout_s:g} s", "stderr": said}
    elif other and not found and not code:
        yield {"markdown": "".join(other)}
    elif found < len(commands):
        yield {"failed": code, "stderr": said}


def _next_line(process: subprocess.Popen[str], seconds: float, late: list[bool]) -> str:
    """Return the next line, or nothing where the process ends or has to be ended."""
    assert process.stdout is not None

    def end() -> None:
        late.append(True)
        process.kill()

    watch = threading.Timer(seconds, end)
    watch.start()
    try:
        return process.stdout.readline()
    finally:
        watch.cancel()


class Session:
    """Measurements that wait, from which each GPU takes the next, and the file that their records are added to.

    Args:
        options: Of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.begun = time.monotonic()
        self.failed = 0
        self.at_work: dict[str, int] = {}
        self.took = defaultdict[str, float](float)
        self.lock = threading.Lock()
        known = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
        done = {(each["round"], each["command"]) for each in known if "failed" not in each}
        planned = plan(options.groups, options.rounds, options.containing)
        waiting = [item for item in planned if (item[0], item[1].command) not in done]
        self.makes = batches(makes(waiting, options))
        self.queue = [part for batch in batches(waiting) for part in spread(batch, options.gpus)]

    def run(self) -> int:
        """Measure all that waits; return how many failed."""
        gpus = [None] if self.options.gpus == 1 else visible_gpus(self.options.gpus)
        self.at_work = {} if gpus == [None] else {"gpus_at_work": len(gpus)}
        self.work(gpus[0], self.makes)
        with ThreadPoolExecutor(len(gpus)) as workers:
            for done in [workers.submit(self.work, gpu, self.queue) for gpu in gpus]:
                done.result()
        if self.is_late and self.queue:
            print(f"The budget of {self.options.budget_s:g} s is spent; run it again to go on.", file=sys.stderr)
        for group, seconds in self.took.items():
            print(f"{group} took {seconds:.0f} s.", file=sys.stderr)
        return self.failed

    @property
    def is_late(self) -> bool:
        """Whether no further measurement is to begin."""
        return time.monotonic() - self.begun > self.options.budget_s

    def work(self, gpu: str | None, queue: list[Batch]) -> None:
        """Measure on one GPU until nothing waits any more."""
        while not self.is_late:
            with self.lock:
                if not queue:
                    return
                items = queue.pop(0)
            count = self.measure(gpu, items)
            if count and items[count:]:  # in a new process
                with self.lock:
                    queue.insert(0, items[count:])

    def measure(self, gpu: str | None, items: Batch) -> int:
        """Run one process; return how many of its measurements there is a record of."""
        last, count = time.monotonic(), 0
        with contextlib.closing(measure([each.command for _, each in items], self.options, gpu)) as found:
            for (number, each), result in zip(items, found, strict=False):
                now, count = time.monotonic(), count + 1
                record = {"round": number, "group": each.group, "command": each.command, "took_s": round(now - last, 1)}
                self.note(record | self.at_work | result, now - last)
                last = now
                if self.is_late:
                    break
        return count

    def note(self, record: dict[str, Any], seconds: float) -> None:
        """Print a record, and add it to the file."""
        with self.lock:
            self.took[record["group"]] += seconds
            self.failed += "failed" in record
            print(json.dumps(record), flush=True)
            with self.options.out.open("a") as file:
                file.write(json.dumps(record) + "\n")


def visible_gpus(count: int) -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES is to be for each of so many GPUs."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[:count] if given else [str(index) for index in range(count)]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines, read and added to")
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("/tmp/base"), help="folder for a random 8b base (16 GB), 0.5b beside it"
    )
    parser.add_argument("--page", type=Path, help="to draw then of all records there are, as report.py does")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument(
        "--containing", nargs="+", help='of these groups only commands with one of these in them, such as "rank 8"'
    )
    parser.add_argument("--rounds", type=int, default=1, help="of the groups speed and small")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that measure side by side, each something else")
    parser.add_argument("--budget_s", type=float, default=float("inf"), help="no measurement begins later than this")
    parser.add_argument("--timeout_s", type=float, default=300, help="of one measurement")
    known, extra = parser.parse_known_args(arguments)
    known.extra = extra  # such as --device cpu --shape tiny, to try the paths
    return known


def main(arguments: list[str]) -> int:
    """Measure, and draw the page; return how many measurements failed."""
    options = parse(arguments)
    failed = Session(options).run()
    if options.page is not None and options.out.exists():
        report.main([str(options.out), "--output", str(options.page)])
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 125))
