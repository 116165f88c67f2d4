"""The page of results: tables and plots of what everything.py measured.

    pip install matplotlib
    python examples/benchmark/report.py results.jsonl --output examples/benchmark/RESULTS.md

A figure is the median of its rounds. Nothing is shown whose measurement failed, except that it failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import CASES, SHAPES, largest_distance

Record = dict[str, Any]
_PLANS = (("full", "full"), ("selective_offload", "full"), ("offload", "full"), ("none", "none"), ("auto", "full"))
"""Of own runs, with the one of the peers that a plan is compared with."""
_CASE = (
    "trainer", "strategy", "shape", "rows", "devices", "accelerator", "tokens_per_batch", "cap_gib", "resume", "saves",
)  # fmt: skip
"""What tells measurements of several GPUs apart."""
CASE_TITLES = {
    "full2k": "4 x 2,048 tokens", "full8k": "1 x 8,192 tokens", "chat2k_pack": "chat rows, packed to 8,192 tokens",
    "chat2k_16": "16 chat rows", "chat2k": "4 chat rows", "dpo": "DPO, 8 pairs",
}  # fmt: skip


def read(path: Path) -> list[Record]:
    """Return one record for each measurement: the last of a round, the median over rounds."""
    by_round: dict[tuple[object, int], Record] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        by_round[_measured(record), record["round"]] = record
    grouped: dict[object, list[Record]] = defaultdict(list)
    for (what, _), record in by_round.items():
        grouped[what].append(record)
    return [_median(records) for records in grouped.values()]


def _measured(record: Record) -> object:
    """Tell what was measured: by its command, or of several GPUs by its case, for how many steps ever."""
    return tuple(record.get(name) for name in _CASE) if record["group"] == "scaling" else record["command"]


def _median(records: list[Record]) -> Record:
    whole = [record for record in records if "failed" not in record] or records
    merged = dict(whole[-1], rounds=len(whole))
    for name in ("tok_s", "sup_tok_s", "peak_gib", "mean_step_ms", "build_s", "first_step_s", "tokens_per_second"):
        if isinstance(merged.get(name), int | float):  # the peaks of several ranks are not one number
            merged[name] = statistics.median(record[name] for record in whole)
    if "step_ms" in merged:
        merged["step_ms"] = {p: statistics.median(r["step_ms"][p] for r in whole) for p in merged["step_ms"]}
    return merged


def _is_own(record: Record) -> bool:
    return str(record["command"]).startswith("bench.py")


def _cells(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _table(head: list[str], rows: list[list[object]]) -> list[str]:
    return [_cells(*head), _cells(*("---" for _ in head)), *(_cells(*row) for row in rows), ""]


def _figure(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _name(record: Record) -> str:
    return "lightning_qlora" if _is_own(record) else str(record["peer"])


_SPEEDS: tuple[Callable[[Record], float], ...] = (
    lambda r: float(r["tok_s"]),
    lambda r: r["tokens_per_step"] / r["step_ms"]["p50"],  # known up to a factor
)


def speed(records: list[Record], floor: Record | None) -> list[str]:
    """Draw own runs beside the peers' on the same rows and plan."""
    chosen = [each for each in records if each["group"] == "speed" and "tok_s" in each]
    if not chosen:
        return []
    rows: list[list[object]] = []
    for case in CASE_TITLES:
        for plan, limited_by in _PLANS:
            mine = [r for r in chosen if r["case"] == case and r["plan"] == plan and _is_own(r)]
            peers = [r for r in chosen if r["case"] == case and r["plan"] == limited_by and not _is_own(r)]
            beside = sorted(peers, key=lambda r: -r["tok_s"]) if plan == limited_by else []  # they have no other plans
            for record in [*mine, *beside]:
                limits = _limits(floor, limited_by) if case == "full2k" and plan != "auto" else []
                shown = [_figure(record["tok_s"]), _figure(record["sup_tok_s"]), _figure(record["step_ms"]["p50"]),
                         _figure(record.get("peak_gib"), 2)]  # fmt: skip
                of_floor = ", ".join(f"{record['tok_s'] / limit:.0%}" for limit in limits)
                rows.append([CASE_TITLES[case], record.get("plan_used", plan), _name(record), *shown,
                             _to_best(record, peers), of_floor])  # fmt: skip
    head = ["rows", "recomputed", "trainer", "tokens/s", "supervised/s", "ms of the median step", "peak GiB",
            "to the best peer", "of the floor"]  # fmt: skip
    said = (
        "Tokens/s are of all measured steps together, so that a slow one among them counts. The first ratio to the "
        "best peer is of these, the second of the median steps, in which it does not."
    )
    return ["## Speed and memory beside the peers", "", said, "", *_table(head, rows)]


def _to_best(record: Record, peers: list[Record]) -> str:
    """Compare an own run with the best peer, by each of the speeds."""
    ratios = [of(record) / max(map(of, peers)) for of in _SPEEDS] if peers and _is_own(record) else []
    return ", ".join(f"{ratio:.2f} x" for ratio in ratios)


def _limits(floor: Record | None, plan: str) -> list[float]:
    """Return what the floor allows under a lasting load, and for a moment."""
    names = (f"lasting_tok_s_{plan}", f"tok_s_{plan}")
    return [floor[name] for name in names if name in floor] if floor is not None else []


def small(records: list[Record]) -> list[str]:
    """Draw own runs on a small model, with CUDA graphs and without, beside the peers'."""
    chosen = [r for r in records if r["group"] == "small" and "tok_s" in r]
    if not chosen:
        return []
    rows: list[list[object]] = []
    for case, plan in itertools.product(CASE_TITLES, ("full", "none")):
        alike = [r for r in chosen if (r["case"], r["plan"]) == (case, plan)]
        peers = [r for r in alike if not _is_own(r)]
        for r in sorted(alike, key=lambda r: (not _is_own(r), -r["tok_s"])):
            rows.append([CASE_TITLES[case], r.get("plan_used", plan), _graphs(r), _name(r), _figure(r["tok_s"]),
                         _figure(r["step_ms"]["p50"]), _figure(r.get("peak_gib"), 2), _to_best(r, peers)])  # fmt: skip
    head = ["rows", "recomputed", "CUDA graphs", "trainer", "tokens/s", "ms of the median step", "peak GiB",
            "to the best peer"]  # fmt: skip
    said = (
        f"The shape {chosen[0]['shape']}, whose kernels are over before the host has launched the next, unless a CUDA "
        "graph launches all of them. The first ratio is of tokens/s, the second of the median steps."
    )
    return ["## A small model", "", said, "", *_table(head, rows)]


def _graphs(record: Record) -> str:
    """Tell whether steps of an own run were replayed, whatever was asked for."""
    return ("yes" if record.get("graph_replays", 0) > 0 else "no") if _is_own(record) else ""


def gates(records: list[Record]) -> list[str]:
    """Draw how far each path is from float32."""
    rows = [[f"`{r['command'].removeprefix('bench.py gate ')}`", f"{r['loss_difference']:.1e}",
             f"{r['gradient_cosine']:.6f}", f"{r['plain_loss_difference']:.1e}", f"{r['plain_gradient_cosine']:.6f}",
             f"{r['cosine_to_plain']:.6f}", "yes" if r["passed"] else "**no**"]
            for r in records if r["group"] == "gates" and "passed" in r]  # fmt: skip
    head = ["path", "loss differs by", "cosine of the gradients", "plain code: loss", "plain code: cosine",
            "cosine to plain code", "passed"]  # fmt: skip
    return ["## The first step against float32, unpacked", "", *_table(head, rows)] if rows else []


def curves(records: list[Record]) -> list[str]:
    """Draw where the losses of many steps begin and end, beside those of plain code and of float32."""
    rows = []
    for r in [r for r in records if "exact_losses" in r]:
        own, plain, exact = trainings = r["losses"], r["plain_losses"], r["exact_losses"]
        pairs = (own, plain), (own, exact), (plain, exact)
        parts = len(own) // 2, len(own)
        distances = [
            " / ".join(f"{largest_distance(one[:steps], two[:steps]):.2%}" for steps in parts) for one, two in pairs
        ]
        last = [f"{losses[-1]:.3f}" for losses in trainings]
        rows.append([f"`{r['command'].removeprefix('bench.py ')}`", len(own), f"{own[0]:.3f}", *last, *distances])
    head = ["training", "steps", "first loss", "last loss", "of plain code", "of float32", "to plain code",
            "to float32", "plain code to float32"]  # fmt: skip
    said = (
        "Distances are the largest between means over 10 steps, in the first half of the steps and in all. Batches "
        "that come again and again are learned by heart, and when is a matter of rounding."
    )
    return ["## Losses beside plain code", "", said, "", *_table(head, rows)] if rows else []


def timelines(records: list[Record]) -> list[str]:
    """Draw what steps are made of, and how long the device had nothing to do in them."""
    chosen = [r for r in records if "by_kind_ms" in r]
    if not chosen:
        return []
    rows = [[f"`{r['command'].removeprefix('bench.py timeline ')}`", r["untraced_ms"], r["traced_ms"],
             _figure(r["kernels"]), *r["by_kind_ms"].values(), r["idle_ms"], r["idle_at_start_ms"]]
            for r in chosen]  # fmt: skip
    head = ["step", "ms untraced", "traced", "kernels", *chosen[0]["by_kind_ms"], "idle", "of it at the beginning"]
    said = "In milliseconds of a step. Between kernels that wait for nothing an H200 is idle for about 2 us each."
    return ["## What a step is made of", "", said, "", *_table(head, rows)]


def peaks(records: list[Record]) -> list[str]:
    """Draw what the memory model says of each run beside what it took."""
    rows = [[f"`{r['command'].removeprefix('bench.py run ')}`", r["plan_used"], f"{r['predicted_gib']:.2f}",
             f"{r['peak_gib']:.2f}", f"{r['predicted_gib'] / r['peak_gib'] - 1:+.1%}"]
            for r in records if _is_own(r) and "predicted_gib" in r and "peak_gib" in r]  # fmt: skip
    head = ["run", "plan", "predicted GiB", "real GiB", "prediction is off by"]
    return ["## Predicted and real peak", "", *_table(head, rows)] if rows else []


def optimizers(records: list[Record]) -> list[str]:
    """Draw what each optimizer costs."""
    rows = [[f"`{r['optimizer']}`", *_cost(r)] for r in records if r["group"] == "optimizers" and "tok_s" in r]
    head = ["optimizer", *_COST]
    said = (
        "Of 41.9 M parameters, in steps of 4 x 2,048 tokens with recomputation. `adamw` is torch's fused one, which is "
        "the default, `adamw_foreach` the same without fusing; those of 8 bits are of bitsandbytes."
    )
    return ["## Optimizers", "", said, "", *_table(head, rows)] if rows else []


def growth(records: list[Record]) -> list[str]:
    """Draw how cost grows with the tokens of a batch and of a document, the rank and the shape."""
    chosen = [r for r in records if _is_own(r) and "tok_s" in r]
    beside = {f"bench.py run full2k --plan {plan}" for plan in {r["plan"] for r in chosen if r["group"] == "growth"}}
    chosen = [r for r in chosen if r["group"] == "growth" or r["command"] in beside]
    rows = []
    for r in sorted(chosen, key=_grown):
        _, *trained, tokens = _grown(r)
        rows.append([*trained, _figure(tokens), *_cost(r)])
    head = ["shape", "rank", "recomputed", "documents", "tokens of each", *_COST]
    return ["## How cost grows", "", *_table(head, rows)] if rows else []


def _grown(r: Record) -> tuple[Any, ...]:
    """Return what was trained on what, behind the shape's place among all."""
    case = CASES[r["case"]]
    tokens = r["rows"] or case.rows, r["max_length"] or case.max_length
    return list(SHAPES).index(r["shape"]), r["shape"], r["rank"], r["plan"], *tokens


_COST = ["tokens/s", "ms of a step", "peak GiB"]


def _cost(r: Record) -> list[object]:
    return [_figure(r["tok_s"]), _figure(r["mean_step_ms"]), _figure(r.get("peak_gib"), 2)]


def variants(records: list[Record]) -> list[str]:
    """Draw everything else that trains, by its command."""
    rows = [[f"`{r['command'].removeprefix('bench.py run ')}`", r["plan_used"], *_cost(r),
             _figure(r["build_s"] + r["first_step_s"], 1)]
            for r in records if r["group"] == "variants" and "tok_s" in r]  # fmt: skip
    head = ["run", "plan", *_COST, "seconds to the end of step 1"]
    return ["## Variants", "", *_table(head, rows)] if rows else []


def contexts(records: list[Record]) -> list[str]:
    """Draw the longest documents under a cap of memory."""
    rows = [[f"{r['cap_gib']:g}", _figure(r["context"]), _figure(r["estimated"]), _figure(r["max_length"]),
             _figure(r.get("peak_gib"), 2)]
            for r in records if r["group"] == "context" and "context" in r]  # fmt: skip
    head = ["GiB allowed", "tokens that trained", "tokens estimated beforehand", "the most to try", "peak GiB"]
    return ["## The longest document, alone in its batch", "", *_table(head, rows)] if rows else []


_PARTS = {
    "imports and command line": "imported_s", "base with adapters": "built_s", "data and summary": "first_batch_s",
    "first step": "first_step_s",
}  # fmt: skip
"""Of a start, each with what says when it was over."""


def starts(records: list[Record]) -> list[str]:
    """Draw what the command line does until its first step is over."""
    lines: list[str] = []
    for r in [r for r in records if r["group"] == "start" and "runs" in r]:
        first, *later = [_parts(run) for run in r["runs"]]
        rows: list[list[object]] = [["the first", *(_figure(seconds, 1) for seconds in first)]]
        if later:
            medians = map(statistics.median, zip(*later, strict=True))
            rows.append([f"median of {len(later)} later", *(_figure(seconds, 1) for seconds in medians)])
        said = (
            f"In seconds, from a checkpoint of the shape {r['shape']} on the same machine. Where that is fresh, the "
            "first run compiles kernels, which later ones find."
        )
        lines += [said, "", *_table(["run", *_PARTS, "all"], rows)]
    return ["## From the command to the end of the first step", "", *lines] if lines else []


def _parts(run: dict[str, float]) -> list[float]:
    """Return the seconds of each part of a start, and of all of it."""
    over = [run[name] for name in _PARTS.values()]
    return [*(end - begin for begin, end in itertools.pairwise([0.0, *over])), over[-1]]


def processors(records: list[Record]) -> list[str]:
    """Draw the quickstart's step on a CPU beside that of plain code."""
    rows = [[r["dtype"], r["threads"], _figure(r["own_step_ms"]), _figure(r["plain_step_ms"]),
             f"{r['speed_ratio']:.2f} x", " to ".join(f"{of(r['speed_ratio_of_each_turn']):.2f}" for of in (min, max))]
            for r in records if r["group"] == "cpu" and "speed_ratio" in r]  # fmt: skip
    head = ["dtype", "threads", "ms of a step", "of plain code", "speed to plain code", "of single turns"]
    return ["## The quickstart's step on a CPU", "", *_table(head, rows)] if rows else []


def kernels(records: list[Record]) -> list[str]:
    """Show what kernel_speed.py drew."""
    drawn = [r["markdown"].strip() for r in records if "markdown" in r and "failed" not in r]
    return ["## Kernels one by one", "", *drawn, ""] if drawn else []


def several_gpus(records: list[Record]) -> list[str]:
    """Draw what scaling.py found: speed and memory by numbers of devices, and runs that went on with fewer."""
    chosen = [r for r in records if r["group"] == "scaling" and "failed" not in r]
    chosen.sort(key=lambda r: (r["shape"], r["rows"], r["tokens_per_batch"], r["cap_gib"] or 0, *_place(r)))
    if not chosen:
        return []
    versions = {name: r[name] for r in chosen for name in ("torch", "transformers", "trl", "accelerate") if name in r}
    lines = ["## Several GPUs", "", f"{chosen[0]['device_name']}: " + ", ".join(map(" ".join, versions.items())) + ".",
             "Efficiency is tokens/s of each GPU beside the same trainer's on one, or on the fewest.", ""]  # fmt: skip
    case = ["trainer", "strategy", "shape", "rows", "tokens of a GPU's step", "GiB allowed", "GPUs"]
    measured, saved = ([r for r in chosen if r["saves"] is saves] for saves in (False, True))
    if measured:
        head = [*case, "tokens/s", "efficiency", "peak GiB of a GPU", "while starting", "seconds to step 1"]
        lines += _table(head, [
            [*_of_case(r), _figure(r["tokens_per_second"]), f"{_efficiency(r, measured):.1%}",
             _largest(r["peak_memory_gib"]), _largest(r["start_peak_gib"]), _figure(r["start_seconds"], 1)]
            for r in measured
        ])  # fmt: skip
    if saved:
        head = [*case, "steps before", "steps after", "last loss", "seconds to its first step", "seconds to save"]
        lines += ["Saved on all, and gone on with half as many:", "", *_table(head, [
            [*_of_case(r), r["steps_before"], r["optimizer_steps"], f"{r['train_loss']:.3f}",
             _figure(r["start_seconds"], 1), _figure(r["save_seconds"], 2)] for r in saved
        ])]  # fmt: skip
    return lines


def _efficiency(record: Record, records: list[Record]) -> float:
    """Compare tokens/s for each device with the same work on the fewest; one device has no strategy."""
    names = ("trainer", "shape", "rows", "tokens_per_batch")
    alike = [r for r in records if all(r[name] == record[name] for name in names)
             and (r["devices"] == 1 or r["strategy"] == record["strategy"])]  # fmt: skip
    fewest = min(alike, key=lambda r: r["devices"])
    return float(record["tokens_per_second"] / record["devices"] / (fewest["tokens_per_second"] / fewest["devices"]))


def _place(r: Record) -> tuple[object, ...]:
    """Where a row belongs: what went on behind what it went on from, one device before strategies."""
    return r["resume"], r["devices"] > 1, r["strategy"], r["devices"], r["trainer"]


def _of_case(r: Record) -> list[object]:
    strategy = r["strategy"] if r["devices"] > 1 else ""
    cap = "" if r["cap_gib"] is None else f"{r['cap_gib']:g}"
    return [r["trainer"], strategy, r["shape"], r["rows"], _figure(r["tokens_per_batch"]), cap, r["devices"]]


def _largest(gib: list[float | None]) -> str:
    return _figure(max((each for each in gib if each is not None), default=None), 2)


def failures(records: list[Record]) -> list[str]:
    """List what did not run."""
    failed = [record for record in records if "failed" in record and "passed" not in record]
    said = [str(r["stderr"])[-160:] if "stderr" in r else str(r["failed"])[:160] for r in failed]
    rows = [[f"`{r['command']}`", words.replace("|", "/")] for r, words in zip(failed, said, strict=True)]
    return ["## Failed", "", *_table(["command", "what it said"], rows)] if rows else []


# Plots


def draw(records: list[Record], floor: Record | None, folder: Path) -> list[str]:
    """Write the plots beside the page, and return the Markdown that shows them."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lightning_qlora"  # the same figures make the same file
    from matplotlib import pyplot

    shown = []
    plain = [r for r in records if _is_own(r) and r["group"] in ("speed", "growth") and "tok_s" in r
             and (r["case"], r["shape"], r["rank"]) == ("full2k", "8b", 16)]  # fmt: skip
    by_tokens = [r for r in plain if r["plan"] == "full"]
    by_context = [r for r in plain if r["plan"] == "offload" and r["rows"] == 1]
    for name, title, points, x, y in (
        ("tokens", "Tokens/s by tokens of a batch (8B, recomputed)", by_tokens, "tokens a batch", "tok_s"),
        ("context", "Memory by context (8B, inputs on the host)", by_context, "tokens of the document", "peak_gib"),
    ):
        points = sorted((r["tokens_per_step"], r[y]) for r in points if r.get(y) is not None)
        if len(points) > 1:
            figure, axes = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
            axes.plot(*zip(*points, strict=True), marker="o")
            axes.set(xscale="log", title=title, xlabel=x, ylabel={"tok_s": "tokens/s", "peak_gib": "GiB"}[y])
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            shown.append(_save(figure, folder, name, title))
    shown += [_draw_curve(pyplot, r, folder) for r in records if "exact_losses" in r][:1]
    own = next((r for r in records if r["command"] == "bench.py run full2k --plan none" and "mean_step_ms" in r), None)
    if floor is not None and own is not None and floor["shape"] == own["shape"]:
        shown.append(_draw_breakdown(pyplot, floor, own, folder))
    return [*shown, ""] if shown else []


def _draw_curve(pyplot: Any, record: Record, folder: Path) -> str:
    figure, axes = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
    axes.plot(record["exact_losses"], label="float32", linewidth=5, alpha=0.25)
    axes.plot(record["plain_losses"], label="plain code", linewidth=3, alpha=0.4)
    axes.plot(record["losses"], label="lightning_qlora", linewidth=1)
    title = f"Loss of {len(record['losses'])} steps from the same start ({record['shape']})"
    axes.set(title=title, xlabel="step", ylabel="nats a token")
    axes.legend()
    axes.grid(alpha=0.3)
    return _save(figure, folder, "curve", title)


def _draw_breakdown(pyplot: Any, floor: Record, own: Record, folder: Path) -> str:
    layers = SHAPES[floor["shape"]]["num_hidden_layers"]
    parts = {
        "products": layers * (floor["products_forward_ms"] + floor["products_backward_ms"]),
        "dequantisation": 2 * layers * floor["dequantisation_ms"],
        "attention": layers * (floor["attention_forward_ms"] + floor["attention_backward_ms"]),
        "head": floor["head_ms"],
    }
    parts["everything else"] = max(0.0, own["mean_step_ms"] - sum(parts.values()))
    figure, axes = pyplot.subplots(figsize=(6, 1.8), layout="constrained")
    left = 0.0
    for name, value in parts.items():
        axes.barh([""], [value], left=left, label=f"{name}, {value:.0f} ms")
        left += value
    title = "A step without recomputation: the floor's parts, and the rest"
    axes.set(title=title, xlabel="ms")
    axes.legend(fontsize="x-small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.35))
    return _save(figure, folder, "breakdown", title)


def _save(figure: Any, folder: Path, name: str, title: str) -> str:
    figure.savefig(folder / f"results_{name}.svg", metadata={"Date": None})
    return f"![{title}](results_{name}.svg)\n"


def render(records: list[Record], folder: Path) -> str:
    """Return the page."""
    floor = next((r for r in records if r["command"] == "floor.py" and "failed" not in r), None)
    measured = [r for r in records if "device_name" in r and r["group"] != "scaling"]
    lines = ["# Results", ""]
    if measured:
        first = measured[0]
        names = ("torch", "transformers", "peft", "bitsandbytes", "trl", "unsloth")
        versions = {name: r[name] for r in measured for name in names if name in r}
        lines += [f"On one {first['device_name']}: " + ", ".join(f"{n} {v}" for n, v in versions.items()) + ".", ""]
    lines += ["Measured by the commands of `examples/benchmark/everything.py`, drawn by `report.py`; README.md beside "
              "this page says what the cases are. A figure is the median of its rounds.", ""]  # fmt: skip
    if floor is not None:
        full, none = (" or ".join(f"{limit:,}" for limit in _limits(floor, plan)) for plan in ("full", "none"))
        lines += [f"The floor (products, dequantisation and attention alone): {full} tokens/s with recomputation, "
                  f"{none} without; the first under a lasting load, the second for a moment.", ""]  # fmt: skip
    lines += speed(records, floor)
    for part in (small, starts, processors, timelines, gates, curves, contexts, growth, optimizers, variants,
                 several_gpus, peaks, kernels):  # fmt: skip
        lines += part(records)
    return "\n".join([*lines, *draw(records, floor, folder), *failures(records)]).rstrip() + "\n"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="file of JSON lines")
    parser.add_argument("--output", type=Path, default=Path("RESULTS.md"))
    options = parser.parse_args(arguments)
    options.output.write_text(render(read(options.results), options.output.parent), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
