"""The floor of a step: its matrix products, the dequantisation of its weights and its attention, each timed alone.

    python examples/benchmark/floor.py

No adapters, norms, loss or optimizer: nothing that trains a 4-bit base by bitsandbytes' own dequantisation and bf16
products can be faster, unless it leaves products out. One JSON line, in milliseconds a layer and in tokens/s a step.

A GPU that multiplies for seconds on end runs at lower clocks than in the tenths of a second that a part takes by
itself. So the sum of the parts (``step``) is what no step can beat, and ``lasting_step``, all parts in turn over and
over, what no training can.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import bitsandbytes
import bitsandbytes.functional as bnb
import torch
from cases import SHAPES
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def milliseconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the mean time of some work, after three rounds of warm-up."""
    for _ in range(3):
        work()
    if device.type != "cuda":
        begun = time.perf_counter()
        for _ in range(repeats):
            work()
        return 1000 * (time.perf_counter() - begun) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Time one layer's parts and the head, and add a step up from them."""
    shape, device = SHAPES[options.shape], torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden, inner, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    head_dim = hidden // heads
    keys = shape["num_key_value_heads"] * head_dim
    tokens, rows = options.tokens, max(1, options.tokens // options.max_length)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype)

    def timed(work: Callable[[], Any]) -> float:
        return milliseconds(work, device, options.repeats)

    forward_works: list[Callable[[], Any]] = []
    backward_works: list[Callable[[], Any]] = []
    parts = {"products_forward": 0.0, "products_backward": 0.0, "dequantisation": 0.0}
    linears = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    for out, into in [*linears, (inner, hidden), (inner, hidden), (hidden, inner)]:
        weight, x, gradient = random(out, into), random(tokens, into), random(tokens, out)
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        works: list[Callable[[], Any]] = [
            lambda x=x, weight=weight: x @ weight.t(),
            lambda gradient=gradient, weight=weight: gradient @ weight,
            lambda packed=packed, state=state: bnb.dequantize_4bit(packed, state),
        ]
        for name, work in zip(parts, works, strict=True):
            parts[name] += timed(work)
        forward_works += [works[2], works[0]]
        backward_works += [works[2], works[1]]

    query = random(rows, heads, tokens // rows, head_dim).requires_grad_()
    key = random(rows, keys // head_dim, tokens // rows, head_dim).requires_grad_()

    def attend() -> Tensor:
        return scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)

    output = attend()
    gradient = torch.randn_like(output)

    def attend_backward() -> Any:
        return torch.autograd.grad(output, (query, key), gradient, retain_graph=True)

    parts["attention_forward"], parts["attention_backward"] = timed(attend), timed(attend_backward)
    forward_works.append(attend)
    backward_works.append(attend_backward)
    supervised = random(max(1, int(0.6 * tokens)), hidden)  # of the rows of cases.py, in the mean
    embedding = random(shape["vocab_size"], hidden)
    parts["head"] = 2 * timed(lambda: supervised @ embedding.t())

    layers = shape["num_hidden_layers"]
    forward = parts["products_forward"] + parts["dequantisation"] + parts["attention_forward"]
    backward = parts["products_backward"] + parts["dequantisation"] + parts["attention_backward"]
    step = {"none": layers * (forward + backward) + parts["head"]}
    step["full"] = step["none"] + layers * forward

    def whole_step(passes: int) -> None:
        for _ in range(passes * layers):
            for work in forward_works:
                work()
        supervised @ embedding.t(), supervised @ embedding.t()
        for _ in range(layers):
            for work in backward_works:
                work()

    lasting = {
        plan: milliseconds(lambda passes=passes: whole_step(passes), device, options.steps)
        for plan, passes in (("none", 1), ("full", 2))
    }
    return {
        **{f"{name}_ms": round(value, 3) for name, value in parts.items()},
        **{f"step_{plan}_ms": round(value, 1) for plan, value in step.items()},
        **{f"tok_s_{plan}": round(1000 * tokens / value) for plan, value in step.items()},
        **{f"lasting_step_{plan}_ms": round(value, 1) for plan, value in lasting.items()},
        **{f"lasting_tok_s_{plan}": round(1000 * tokens / value) for plan, value in lasting.items()},
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of a step")
    parser.add_argument("--max_length", type=int, default=2048, help="of a document")
    parser.add_argument("--shape", default="8b", choices=sorted(SHAPES))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--repeats", type=int, default=20, help="of each part")
    parser.add_argument("--steps", type=int, default=8, help="of all parts in turn")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse(sys.argv[1:])
    result = measure(options)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    versions = {"torch": torch.__version__, "bitsandbytes": bitsandbytes.__version__}
    print(json.dumps({"what": "floor", **vars(options), **result, "device_name": device, **versions}), flush=True)


if __name__ == "__main__":
    main()
