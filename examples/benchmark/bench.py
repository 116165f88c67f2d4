"""Speed and memory of fit itself on one GPU, beside checks that it computes what it should.

    python examples/benchmark/bench.py run full2k --plan none             # one measurement
    python examples/benchmark/bench.py run full2k --rows 1 2 8            # one for each value, in one process
    python examples/benchmark/bench.py run full2k dpo then gate full2k    # several commands, likewise
    python examples/benchmark/bench.py timeline full2k --plan none        # what a step is made of, and idle time
    python examples/benchmark/bench.py gate full2k --plan selective       # loss and gradients against float32
    python examples/benchmark/bench.py curve --compile_layers             # losses beside those of a plain training
    python examples/benchmark/bench.py context --cap_gib 24               # the longest document that trains
    python examples/benchmark/bench.py run full2k --device cpu --shape tiny --steps 3 --warmup 1

Every measurement prints one JSON line. README.md beside this file says what the cases are and what the lines hold.
everything.py runs them all, beside the peers and the floor.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

from lightning_qlora.startup import quick_imports  # noqa: E402

with quick_imports():  # as the command line does
    import argparse
    import json
    import sys
    import traceback
    from contextlib import redirect_stdout
    from typing import Any

    import bitsandbytes
    import peft
    import torch
    import transformers
    from cases import CASES, GIB, SHAPES, Case, case_of, expand, summary
    from checks import curve, free_memory, gate
    from fits import OPTIMIZERS, Batches, Clock, make_module, make_trainer
    from timeline import timeline

    from lightning_qlora import PerformanceMonitor, RunGuard
    from lightning_qlora.memory import PLANS, MemoryModel, build_optimizer, optimizer_memory, skeleton_of

IMPORTED = time.perf_counter()

# One measurement


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Fit a case and return what it took."""
    on_gpu = options.device == "cuda"
    steps = options.steps + options.warmup
    data = Batches(case_of(options), steps, SHAPES[options.shape]["vocab_size"])
    module = make_module(options)
    clock = Clock(on_gpu)
    begun = time.perf_counter()
    make_trainer(options, steps, [clock, PerformanceMonitor(), RunGuard()]).fit(module, data)
    supervised = sum(batch["targets"].numel() for batch in data.batches[options.warmup :])
    memory = {"predicted_gib": round(predicted_peak(clock, data) / GIB, 3)}
    if on_gpu:
        memory |= {
            "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
        }
    return {
        "plan_used": str(clock.plan),
        "fused": clock.fused,
        "graph_replays": clock.graph_replays,
        **summary(clock.seconds()[options.warmup :], sum(data.num_tokens[options.warmup :]), supervised),
        **memory,
        "losses": [round(loss.item(), 4) for loss in clock.losses[:3]],
        "import_s": round(IMPORTED - STARTED, 2),
        "build_s": round(clock.built - begun, 2),
        "first_step_s": round(clock.first_step - clock.built, 2),
        "trainable": sum(p.numel() for p in module.parameters() if p.requires_grad),
    }


def predicted_peak(clock: Clock, data: Batches) -> int:
    """Return what the package's memory model says of the batch with the most tokens, in bytes."""
    assert clock.memory is not None
    batch = max(data.batches, key=lambda batch: batch["input_ids"].numel())
    return clock.memory.estimate(
        batch["input_ids"].numel(),
        plan=clock.plan,
        document_length=max(batch["document_lengths"]),
        num_supervised=batch["targets"].numel(),
    ).peak


# The longest context


def longest_context(options: argparse.Namespace) -> dict[str, Any]:
    """Estimate the longest document that fits, train on it, and shorten it by 3 % until it does."""
    on_gpu = options.device == "cuda"
    module: Any = make_module(argparse.Namespace(**{**vars(options), "plan": "offload"}))
    module.configure_model()
    memory = MemoryModel(
        skeleton_of(module.model),
        optimizer_memory(build_optimizer(module.optimizer, module.model), on_gpu=on_gpu),
        autocast=torch.bfloat16 if on_gpu else None,
        device="cuda" if on_gpu else "cpu",
    )
    budget = int(0.95 * (options.cap_gib or 8) * GIB) if on_gpu else memory.estimate(2048, plan="offload").peak
    estimated = longest_that_fits(memory, budget)
    length = min(estimated, options.max_length or estimated)
    short = Batches(Case("full", 64, 1), 1, SHAPES[options.shape]["vocab_size"])  # then the optimizer's state is there
    while True:
        data = Batches(Case("full", length, 1), 1, SHAPES[options.shape]["vocab_size"])
        data.batches = [*short.batches, *data.batches]
        try:
            make_trainer(options, 2, []).fit(module, data)
            break
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            length = int(0.97 * length) // 64 * 64
    peak = torch.cuda.max_memory_allocated() / GIB if on_gpu else None
    return {"estimated": estimated, "context": length, "peak_gib": peak and round(peak, 2), "plan_used": "offload"}


def longest_that_fits(memory: MemoryModel, budget: int) -> int:
    """Return the length of a document, in steps of 64, whose estimated peak is a budget: a line through two others."""
    one, two = 16_384, 32_768
    for _ in range(2):  # memory grows in proportion, but for rounding
        peaks = [memory.estimate(length, plan="offload").peak for length in (one, two)]
        length = two + (budget - peaks[1]) * (two - one) // (peaks[1] - peaks[0])
        one, two = two, max(64, length // 64 * 64)
        if one == two:
            break
    return two


# Commands


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "timeline", "gate", "curve", "context"])
    parser.add_argument("case", nargs="?", choices=sorted(CASES), default="full2k")
    parser.add_argument("--plan", default="full", choices=[*PLANS, "auto"])
    parser.add_argument("--fused_lora", default="auto", choices=["auto", "true", "false"])
    parser.add_argument("--compile_layers", action="store_true")
    parser.add_argument("--cuda_graphs", default="auto", choices=["auto", "true", "false"])
    parser.add_argument("--cap_gib", type=float, help="share of the GPU's memory that the process may take")
    parser.add_argument("--max_length", type=int, help="of a row, instead of the case's; of a context, the most to try")
    parser.add_argument("--rows", type=int, help="in a batch, instead of the case's")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--optimizer", default="adamw", choices=sorted(OPTIMIZERS), help="adamw is the fused one")
    parser.add_argument("--lr", type=float, help="2e-4, of a curve 1e-3")
    parser.add_argument("--steps", type=int, help="that are measured: 10, of a curve 200")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--batches", type=int, help="different ones of a curve; as many as steps if left out")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shape", choices=sorted(SHAPES), help="of the model: 8b, of a curve 0.5b")
    options = parser.parse_args(arguments)
    is_curve = options.what == "curve"
    options.lr = options.lr or (1e-3 if is_curve else 2e-4)
    options.steps = options.steps or (200 if is_curve else 10)
    options.shape = options.shape or ("0.5b" if is_curve else "8b")
    if options.what in ("gate", "curve") and options.case == "dpo":
        parser.error(f"{options.what} compares losses of documents; dpo has pairs.")
    return options


def start_afresh(on_gpu: bool) -> None:
    """Leave nothing of the measurement before, so that this one is what it would be by itself."""
    torch.compiler.reset()
    free_memory()
    torch.manual_seed(0)
    if on_gpu:
        torch.cuda.set_per_process_memory_fraction(1.0)


def result_of(options: argparse.Namespace) -> dict[str, Any]:
    """Measure; memory that ran out ends this measurement, and not those behind it."""
    on_gpu = options.device == "cuda"
    start_afresh(on_gpu)
    begun = time.perf_counter()
    held = {"held_gib": round(torch.cuda.memory_allocated() / GIB, 2)} if on_gpu else {}
    measures = {"run": measure, "timeline": timeline, "gate": gate, "curve": curve, "context": longest_context}
    try:
        result = measures[options.what](options)
    except RuntimeError as error:  # of torch
        traceback.print_exc()
        result = {"failed": f"{type(error).__name__}: {error}"}
    return {**result, **held, "wall_s": round(time.perf_counter() - begun, 1)}


def main() -> None:
    passed = True
    versions = {library.__name__: library.__version__ for library in (torch, transformers, peft, bitsandbytes)}
    for options in [parse(words) for words in expand(sys.argv[1:])]:
        with redirect_stdout(sys.stderr):
            result = result_of(options)
        device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
        print(json.dumps({**vars(options), **result, "device_name": device, **versions}), flush=True)
        passed &= "failed" not in result and result.get("passed", True)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
