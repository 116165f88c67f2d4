"""How long a step takes: a few measurements, and what follows from them by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lightning_qlora.accounting import StepFlops
from lightning_qlora.memory import Device, Plan

__all__ = ["GPUS", "MEASURED", "Measurement", "Speed", "estimate_speed", "needed_flops"]

_TERA = 1e12
_REPEATED: dict[Plan, float] = {"none": 0.0, "selective": 0.5, "selective_offload": 0.5, "full": 1.0, "offload": 1.0}
"""Share of the forward products that the backward pass makes again; gate and up are about half of a layer's."""


class Measurement(NamedTuple):
    """A pace that was measured.

    Attributes:
        device: What it was measured on.
        what: The work, and with which code.
        plan: What was kept for the backward pass.
        tokens_per_second: Real tokens.
        tflops: Arithmetic that the model needs by :func:`~lightning_qlora.accounting.step_flops`, and that the plan
            repeats, in TFLOP/s.
        peak_tflops: Dense peak of the device's data sheet at the dtype of the run; ``None`` for a CPU.
    """

    device: str
    what: str
    plan: Plan
    tokens_per_second: float
    tflops: float
    peak_tflops: float | None


_LLAMA = "Llama 3 8B, r=16, 4 documents of 2,048 tokens, 60 % supervised; this package"
_QUICKSTART = "the quickstart: SmolLM2 135M, r=16, batches of 2 tickets, 188 tokens; this package"

MEASURED: tuple[Measurement, ...] = (
    Measurement("H200", _LLAMA, "none", 17_064, 529.6, 989.5),
    Measurement("H200", _LLAMA, "selective_offload", 13_851, 527.5, 989.5),
    Measurement("H200", _LLAMA, "full", 12_779, 583.5, 989.5),
    Measurement("CPU, 2 cores", _QUICKSTART, "none", 172, 0.0857, None),
)
"""Every figure here was measured, those of the H200 as examples/benchmark/RESULTS.md says. Nothing else was."""

GPUS: dict[str, float] = {
    "H200": 989.5,
    "H100": 989.5,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX A6000": 154.8,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "L4": 121.0,
}
"""Dense bfloat16 peaks of the vendor's data sheets, in TFLOP/s."""


@dataclass(frozen=True, slots=True)
class Speed:
    """The pace that a run would have on one device by arithmetic; it was not measured there.

    Attributes:
        device: Its name.
        tokens_per_second: Of one rank.
        seconds_per_step: Of an optimizer step.
        run_seconds: Of the whole run, if its length is known.
    """

    device: str
    tokens_per_second: float
    seconds_per_step: float
    run_seconds: float | None


def estimate_speed(
    flops: StepFlops,
    *,
    plan: Plan,
    num_tokens: int,
    document_length: int,
    num_supervised: int,
    micro_batches: int,
    num_steps: int | None,
    device: Device,
) -> list[Speed]:
    """Derive the pace on each known device from the share of its peak that was measured on another.

    That share holds for models and batches that keep a device busy: small ones are slower than this says.

    Args:
        flops: Of the model.
        plan: What is kept for the backward pass.
        num_tokens: Of one micro-batch.
        document_length: Of its documents.
        num_supervised: Tokens that enter the loss.
        micro_batches: Of an optimizer step, on one rank.
        num_steps: Of the run, if it is known.
        device: Which kind of device.
    """
    measured = [m for m in MEASURED if (m.peak_tflops is None) == (device == "cpu")]
    basis = next((m for m in measured if _REPEATED[m.plan] == _REPEATED[plan]), measured[0])
    rates = {basis.device: basis.tflops}
    if basis.peak_tflops is not None:
        rates = {name: basis.tflops / basis.peak_tflops * peak for name, peak in GPUS.items()}
    work = needed_flops(flops, num_tokens, document_length, num_supervised, plan=plan)
    speeds = []
    for name, tflops in rates.items():
        seconds = work / (tflops * _TERA)
        per_step = seconds * micro_batches
        speeds.append(Speed(name, num_tokens / seconds, per_step, None if num_steps is None else per_step * num_steps))
    return speeds


def needed_flops(flops: StepFlops, num_tokens: int, document_length: int, num_supervised: int, *, plan: Plan) -> float:
    """Count the arithmetic of a micro-batch; what is recomputed of the forward pass, twice."""
    full, rest = divmod(num_tokens, document_length)
    lengths = [document_length] * full + ([rest] if rest else [])
    work = float(flops(lengths, num_supervised))
    # Half of the products with frozen weights are the forward pass, and a third of those of attention.
    work += _REPEATED[plan] * num_tokens * flops.per_token / 2
    if _REPEATED[plan] == 1:
        work += sum(n * n for n in lengths) * flops.per_squared_length / 3
    return work
