"""The memory model of a run that is about to start, the memory its device has free, and the plan that fits both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import psutil  # type: ignore[import-untyped]
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from peft import PeftModel
from torch.optim import Optimizer

from lightning_qlora.accounting import step_flops
from lightning_qlora.kernels.checkpointing import MixedPlan, Plan
from lightning_qlora.memory.estimate import MemoryEstimate, MemoryModel
from lightning_qlora.memory.link import link_keeps_up
from lightning_qlora.memory.optimizer import OptimizerMemory, optimizer_memory
from lightning_qlora.memory.simulation import SimulationError
from lightning_qlora.memory.skeleton import skeleton_of

__all__ = [
    "PlanChoice",
    "autocast_dtype",
    "choose_plan",
    "free_memory",
    "host_has_room",
    "memory_of_run",
    "most_tokens",
]

_GIB = 2**30
_GAPS = 0.05  # of the memory: gaps between tensors, and what the estimate is off by
_OTHER_WORKSPACES = 64 * 2**20  # than cuBLAS', which are estimated
_HOST_SHARE = 0.6  # of the host's free memory, for what waits there; its blocks may take half as much again
_CPU_PLANS: tuple[Plan, ...] = ("none", "selective", "full")  # what is on the host already cannot be moved there
_GPU_PLANS: tuple[Plan, ...] = (*_CPU_PLANS, "offload")
_LINKED_PLANS: tuple[Plan, ...] = ("none", "selective_offload", "full", "offload")


class PlanChoice(NamedTuple):
    """A plan for a run, and why.

    Attributes:
        plan: What the layers keep.
        reason: One sentence for the user.
        estimate: Of its memory, if it could be estimated.
    """

    plan: Plan | MixedPlan
    reason: str
    estimate: MemoryEstimate | None = None


def choose_plan(
    trainer: L.Trainer, model: PeftModel, optimizers: Sequence[Optimizer], *, recorded: bool = False
) -> PlanChoice:
    """Choose the fastest plan whose estimated peak fits the memory that is free, the same on all ranks.

    Where the model or the batches are unknown, the choice is ``full``.

    Args:
        trainer: Of the run that is about to start.
        model: On its device.
        optimizers: Over its trained parameters.
        recorded: Whether passes are to be run by CUDA graphs, whatever these take.
    """
    num_tokens = most_tokens(getattr(trainer, "datamodule", None))
    if num_tokens is None:
        return PlanChoice("full", "how many tokens a batch has is not known of this data module")
    try:
        memory = memory_of_run(trainer, model, optimizers, recorded=recorded)
        budget, host = _budgets(trainer, memory)
        plans = _CPU_PLANS
        if trainer.strategy.root_device.type == "cuda":
            all_fits = memory.estimate(num_tokens).peak <= budget  # then the link does not matter
            plans = _LINKED_PLANS if all_fits or _link_keeps_up(trainer, memory, num_tokens) else _GPU_PLANS
        found = memory.fitting_plan(num_tokens, budget, plans=plans, mixed=True, host_budget=host)
        best = found or memory.estimate(num_tokens, plan=plans[-1])
    except SimulationError as error:
        return PlanChoice("full", f"the memory of a step could not be estimated: {error}")
    verdict = f"{num_tokens:,} tokens a batch take about {best.peak / _GIB:.2f} of {budget / _GIB:.2f} GiB"
    if found is None:
        verdict += ", which is more than there is: lower data.tokens_per_batch or data.max_length if memory runs out"
    return PlanChoice(best.plan, verdict, best)


def _budgets(trainer: L.Trainer, memory: MemoryModel) -> tuple[int, int]:
    """Return the bytes that may be taken of the device, and those that may wait on the host, the same on all ranks."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        budget = int((1 - _GAPS) * (free_memory(device) + torch.cuda.memory_reserved(device))) - _OTHER_WORKSPACES
        host = int(_HOST_SHARE * free_memory(torch.device("cpu"))) // trainer.num_devices
    else:
        held = memory.weights + memory.adapters  # on the device already, so not among what is free
        budget, host = int((1 - _GAPS) * free_memory(device)) + held, 0
    if trainer.world_size > 1:
        budget, host = _smallest(trainer, budget), _smallest(trainer, host)
    return budget, host


def _link_keeps_up(trainer: L.Trainer, memory: MemoryModel, num_tokens: int) -> bool:
    """Whether, on all ranks, activations can be copied to the host while layers compute."""
    flops = num_tokens * step_flops(memory.model).per_token / 2
    moved = memory.estimate(num_tokens, plan="selective_offload").host
    keeps_up = link_keeps_up(trainer.strategy.root_device, moved, flops)
    return trainer.strategy.reduce_boolean_decision(keeps_up, all=True)


def memory_of_run(
    trainer: L.Trainer, model: PeftModel, optimizers: Sequence[Optimizer], *, recorded: bool = False
) -> MemoryModel:
    """Build the memory model of a run, from the model as it is loaded; ``recorded`` as for :func:`choose_plan`."""
    device = trainer.strategy.root_device.type
    sharded = isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy)
    each = [optimizer_memory(optimizer, on_gpu=device == "cuda") for optimizer in optimizers]
    return MemoryModel(
        skeleton_of(model),
        OptimizerMemory(*map(sum, zip(*each, strict=True))),
        device="cuda" if device == "cuda" else "cpu",
        autocast=autocast_dtype(trainer),
        accumulates=trainer.accumulate_grad_batches > 1,
        sharding="fsdp" if sharded else "ddp" if trainer.world_size > 1 else "none",
        world_size=trainer.world_size,
        recorded=recorded,
    )


def autocast_dtype(trainer: L.Trainer) -> torch.dtype | None:
    """Return the dtype of mixed precision; ``None`` for a run without."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(trainer.precision))


def most_tokens(datamodule: Any) -> int | None:
    """Return the most positions a batch of this package's data modules can have, or ``None`` for another's."""
    if (budget := getattr(datamodule, "tokens_per_batch", None)) is not None:
        return int(budget)
    longest = getattr(datamodule, "max_length", None)
    if longest is None:
        return None
    rows = 1 if getattr(datamodule, "packing", True) else int(getattr(datamodule, "batch_size", 1))
    return int(longest) * int(getattr(datamodule, "documents_per_row", 1)) * rows


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process may still take from a device, or from the host for a CPU.

    On a GPU: what is free there, within the share that ``torch.cuda.set_per_process_memory_fraction`` leaves to this
    process. On a CPU: what is available, within the limit of the control group.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        share = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        return min(free, share - torch.cuda.memory_reserved(device))
    return min(int(psutil.virtual_memory().available), _left_in_group())


def host_has_room(device: torch.device, num_devices: int) -> bool:
    """Whether what this process holds on a device fits on the host, if others do the same with as many devices."""
    if device.type != "cuda":
        return True
    return num_devices * torch.cuda.memory_allocated(device) < (1 - _GAPS) * free_memory(torch.device("cpu"))


def _left_in_group(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return what Linux' control group leaves; a large number where it sets no limit."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
    except (OSError, ValueError):
        return 2**62
    return 2**62 if limit == "max" else max(0, int(limit) - used)


def _smallest(trainer: L.Trainer, nbytes: int) -> int:
    """Return the least over all ranks: with sharded layers, all must recompute the same ones."""
    total = torch.tensor(float(nbytes), device=trainer.strategy.root_device, dtype=torch.float32)
    return int(trainer.strategy.reduce(total, reduce_op="min"))
