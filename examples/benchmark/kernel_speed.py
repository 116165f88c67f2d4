"""The kernels of fused LoRA, one by one, beside bitsandbytes' and beside the bare products.

    python examples/benchmark/kernel_speed.py                                         # a GPU, about a minute
    python examples/benchmark/kernel_speed.py --device cpu --shape tiny --tokens 96   # proves every path

Prints Markdown: how fast 4-bit weights are dequantised, and what each group of projections of a decoder layer takes,
forward and backward, with the adapters added after the base products (``after``) and inside them (``inside``), beside
the products alone with weights that are dequantised already (``bare``). The way that fit takes on a GPU is in bold.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import bitsandbytes.functional as bnb
import torch
from cases import SHAPES
from torch import Tensor

from lightning_qlora.kernels.dequantization import constants_of, dequantize_into, is_fast
from lightning_qlora.kernels.lora_products import cheaper_ways, lora_low, lora_products, pack_adapters

BLOCKSIZE, QUANT_TYPE = 64, "nf4"


class Group(NamedTuple):
    """Projections of one input: its size, and theirs."""

    name: str
    width: int
    widths: tuple[int, ...]


def sizes_of(shape: str) -> tuple[int, int, int]:
    """Return the sizes of hidden states, of the MLP's and of all keys of a token."""
    sizes = SHAPES[shape]
    hidden, mlp, heads, key_heads = (
        sizes[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    return hidden, mlp, hidden // heads * key_heads


def groups_of(shape: str) -> list[Group]:
    hidden, mlp, keys = sizes_of(shape)
    return [
        Group("Q, K, V", hidden, (hidden, keys, keys)),
        Group("O", hidden, (hidden,)),
        Group("gate, up", hidden, (mlp, mlp)),
        Group("down", mlp, (hidden,)),
    ]


class Weights(NamedTuple):
    """A group's weights and adapters, and an input with its outputs' gradients."""

    packed: list[Tensor]
    constants: list[Tensor]
    numbers: list[Tensor]
    a: list[Tensor]
    b: list[Tensor]
    x: Tensor
    gradients: list[Tensor]


def random_weights(group: Group, options: argparse.Namespace) -> Weights:
    """Return a group as training has it: NF4 with nested constants, adapters in float32."""
    torch.manual_seed(0)
    device, dtype = torch.device(options.device), torch.bfloat16 if options.device == "cuda" else torch.float32
    packed, constants, numbers = [], [], []
    for height in group.widths:
        weight = torch.randn(height, group.width, device=device, dtype=dtype) * group.width**-0.5
        stored, state = bnb.quantize_4bit(weight, blocksize=BLOCKSIZE, compress_statistics=True, quant_type=QUANT_TYPE)
        packed.append(stored)
        constants += constants_of(state)
        numbers.append(bnb.dequantize_4bit(stored, state))
    a = [torch.randn(options.rank, group.width, device=device) * group.width**-0.5 for _ in group.widths]
    b = [torch.randn(height, options.rank, device=device) * 0.05 for height in group.widths]
    x = torch.randn(options.tokens, group.width, device=device, dtype=dtype)
    gradients = [torch.randn(options.tokens, height, device=device, dtype=dtype) for height in group.widths]
    for tensor in (*a, *b, x):
        tensor.requires_grad_()
    return Weights(packed, constants, numbers, a, b, x, gradients)


class Clock:
    """Measures what a function takes on the device, in milliseconds: the median of repeats after a warm-up.

    Args:
        device: ``cuda`` or ``cpu``.
        repeats: How many are timed.
    """

    def __init__(self, device: str, repeats: int) -> None:
        self.on_gpu = device == "cuda"
        self.repeats = repeats

    def __call__(self, function: Callable[[], Any]) -> float:
        """Return how long one call takes."""
        for _ in range(3):
            function()
        if not self.on_gpu:
            found = []
            for _ in range(self.repeats):
                begun = time.perf_counter()
                function()
                found.append(1000 * (time.perf_counter() - begun))
            return statistics.median(found)
        marks = []
        for _ in range(self.repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            marks.append((begin, end))
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in marks)


def dequantisation_table(options: argparse.Namespace, clock: Clock) -> list[str]:
    hidden, mlp, keys = sizes_of(options.shape)
    shapes = [(keys, hidden), (hidden, hidden), (mlp, hidden)]
    lines = ["| matrix | bitsandbytes | | ours | | ours, in longer rows | |", "|---|---|---|---|---|---|---|"]
    for height, width in shapes:
        weights = random_weights(Group("", width, (height,)), options)
        dtype = weights.x.dtype
        stored, state_of = weights.packed[0], weights.constants
        moved = stored.numel() + sum(each.numel() * each.element_size() for each in state_of)
        moved += height * width * dtype.itemsize
        rows = torch.empty(height, width + 2 * options.rank, device=options.device, dtype=dtype)
        whole = rows.new_empty(height, width)
        _, state = bnb.quantize_4bit(weights.numbers[0], compress_statistics=True, quant_type=QUANT_TYPE)
        functions = [lambda stored=stored, state=state: bnb.dequantize_4bit(stored, state)]
        for out in (whole, rows[:, :width]):
            functions.append(
                lambda out=out, stored=stored, of=state_of: dequantize_into(out, stored, of, BLOCKSIZE, QUANT_TYPE)
            )
        if not is_fast(whole, state_of, BLOCKSIZE, QUANT_TYPE):
            print("Without Triton's kernel, ours is bitsandbytes' and a copy.", file=sys.stderr)
        cells = []
        for function in functions:
            milliseconds = clock(function)
            cells.append(f"{1000 * milliseconds:.1f} us | {moved / milliseconds / 1e6:,.0f} GB/s")
        lines.append(f"| {height} x {width} | {' | '.join(cells)} |")
    return lines


def run_forward(weights: Weights, scales: list[float], forward: bool, backward: bool) -> list[Tensor]:
    stored, heights = (BLOCKSIZE, QUANT_TYPE), [each.shape[0] for each in weights.b]
    packed = pack_adapters(weights.a, weights.b, scales, weights.x.dtype)
    base = weights.packed, weights.constants
    low, *shapes = lora_low(weights.x, *base, weights.a, weights.b, *packed, scales, *stored, backward, "", [], [])
    return list(lora_products(weights.x, low, shapes, *base, [], packed[1], heights, *stored, forward))


def group_row(group: Group, options: argparse.Namespace, clock: Clock) -> str:
    """Time one group, and check that both ways compute the same."""
    weights = random_weights(group, options)
    scales = [2.0] * len(group.widths)
    wanted = cheaper_ways(group.width, group.widths)
    inputs = [weights.x, *weights.a, *weights.b]
    forward, backward, found = [], [], []
    x = weights.x.detach()
    with torch.no_grad():
        forward.append(clock(lambda: [x @ numbers.t() for numbers in weights.numbers]))
        pairs = list(zip(weights.gradients, weights.numbers, strict=True))
        backward.append(clock(lambda: [gradient @ numbers for gradient, numbers in pairs]))
        for inside in (False, True):
            forward.append(clock(lambda inside=inside: run_forward(weights, scales, inside, False)))
    for inside in (False, True):
        outputs = run_forward(weights, scales, inside, inside)

        def differentiate(outputs: list[Tensor] = outputs) -> tuple[Tensor, ...]:
            return torch.autograd.grad(outputs, inputs, weights.gradients, retain_graph=True)

        found.append([*(output.detach() for output in outputs), *differentiate()])
        backward.append(clock(differentiate))
    worst = max(float((one - two).norm() / two.norm()) for one, two in zip(*found, strict=True))
    assert worst <= 2e-2, f"the two ways of {group.name} differ by {worst:.2g} of the norm"
    cells = []
    for (bare, *ways), chosen in ((forward, wanted.forward), (backward, wanted.backward)):
        cells.append(f"{bare:.3f}")
        cells += [f"**{way:.3f}**" if inside == chosen else f"{way:.3f}" for inside, way in enumerate(ways)]
    return f"| {group.name} | {' | '.join(cells)} | {worst:.1e} |"


def version_of(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shape", default="8b", choices=sorted(SHAPES))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse(sys.argv[1:])
    clock = Clock(options.device, options.repeats)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    libraries = ", ".join([f"torch {torch.__version__}", version_of("triton"), version_of("bitsandbytes")])
    print(f"{device}; {libraries}; NF4 with nested constants, {options.tokens:,} tokens, rank {options.rank}\n")
    print("\n".join(dequantisation_table(options, clock)))
    print("\n| ms | forward: bare | after | inside | backward: bare | after | inside | differ |")
    print("|---|---|---|---|---|---|---|---|")
    for group in groups_of(options.shape):
        print(group_row(group, options, clock), flush=True)


if __name__ == "__main__":
    main()
