"""What a run will take, before anything is loaded: memory by item, what fits which device, and how long it lasts."""

from __future__ import annotations

import json as json_format
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any, Literal, get_args, get_type_hints

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftConfig

from lightning_qlora.accounting import step_flops
from lightning_qlora.checkpoints.adapter_folder import find_adapter
from lightning_qlora.kernels.elementwise import fuse_elementwise
from lightning_qlora.kernels.lora import fuse_lora
from lightning_qlora.memory import PLANS, Device, MemoryModel, Plan, Sharding, build_optimizer, build_skeleton
from lightning_qlora.memory import optimizer_memory as memory_of_optimizer
from lightning_qlora.model import compute_dtype
from lightning_qlora.modules import CausalLMModule
from lightning_qlora.tools.estimation.report import Budget, Estimate, as_dict, print_estimate
from lightning_qlora.tools.estimation.search import largest_that_fits
from lightning_qlora.tools.estimation.shapes import SHAPE_SCHEME, SHAPES, load_config
from lightning_qlora.tools.estimation.speed import estimate_speed

__all__ = ["estimate"]

MEMORY_GIB = [8.0, 12.0, 16.0, 24.0, 48.0, 80.0, 141.0]

_GIB = 2**30
_LONG = 65_536
_STRAIGHT = 0.005


def estimate(
    model: L.LightningModule,
    datamodule: L.LightningDataModule,
    trainer: L.Trainer,
    *,
    tokens: int | None = None,
    document_length: int | None = None,
    supervised_share: float = 1.0,
    memory_gib: list[float] = MEMORY_GIB,
    reserve_gib: float = 1.0,
    largest_model: bool = False,
    device: Literal["gpu", "cpu"] = "gpu",
    strategy: Literal["ddp", "fsdp"] = "ddp",
    world_size: int | None = None,
    json: bool = False,
) -> None:
    """Estimate memory by item and plan, what fits which device, and the time of a run, without loading any weights.

    Takes the configuration of fit and reads only the base's config.json; a base may also be one of the known public
    shapes, as in estimate --shape=llama3-8b. Memory is counted from a step run without its numbers, by the very code
    that trains, so it follows the family, the adapters and the options. Speed is derived from a few measurements.

    Args:
        model: What would be trained.
        datamodule: Whose limits say how large a micro-batch is; no data are read.
        trainer: Whose settings say how many micro-batches a step has, how many steps the run, and on how many devices.
        tokens: Tokens of a micro-batch; by default data.tokens_per_batch, or data.max_length.
        document_length: Tokens of each document in it; by default data.max_length.
        supervised_share: Share of the tokens that enter the loss, from 0 to 1; inspect prints it.
        memory_gib: Devices to find settings for, by their memory in GiB.
        reserve_gib: Memory to leave free for CUDA's context, the libraries and the gaps between tensors, in GiB.
        largest_model: Also find the largest known shape that fits each device, with these adapters and this batch.
        device: Where the run is to be; this machine need not have it.
        strategy: What each rank holds, where there is more than one. fsdp is derived, not simulated.
        world_size: Ranks; by default the trainer's devices times its nodes.
        json: Write the estimate as JSON to standard output, and nothing else.

    Raises:
        ValueError: If the base's configuration cannot be read, an option is out of its range, or the family cannot be
            simulated.
        MisconfigurationException: If the module is none of this package.
    """
    if not isinstance(model, CausalLMModule):
        raise MisconfigurationException(
            f"estimate knows the modules of this package; found {type(model).__name__}. Write model.class_path: "
            "SFTModule."
        )
    _check(tokens, document_length, supervised_share, world_size, [*memory_gib, reserve_gib])
    ranks = world_size or trainer.num_devices * trainer.num_nodes
    longest = document_length or getattr(datamodule, "max_length", None) or 2048
    whole_row = longest * getattr(datamodule, "documents_per_row", 1)  # a pair is two answers
    num_tokens = tokens or getattr(datamodule, "tokens_per_batch", None) or whole_row
    longest = min(longest, num_tokens)
    build = _Builder(model, "cuda" if device == "gpu" else "cpu", trainer, strategy if ranks > 1 else "none", ranks)
    with redirect_stdout(sys.stderr):
        memory, optimizer = build(model.model_name)
        offered = _offered_plans()
        limits = [int((gib - reserve_gib) * _GIB) for gib in memory_gib]
        models = _largest_models(build, num_tokens, longest, offered[-1], limits) if largest_model else {}
        context = _peak_of_one_document(memory, offered[-1])
        budgets = [
            Budget(gib, *_what_fits(memory, num_tokens, longest, offered, limit, context), models.get(limit))
            for gib, limit in zip(memory_gib, limits, strict=True)
        ]
        supervised = round(supervised_share * num_tokens)
        plans = {"document_length": longest, "num_supervised": supervised}
        configured = model.activation_checkpointing
        plan = offered[-1] if configured == "auto" else configured  # auto decides on the device; its slowest choice
        num_steps = trainer.max_steps if trainer.max_steps >= 0 else None
        found = Estimate(
            model_name=model.model_name.removeprefix(SHAPE_SCHEME),
            device=build.device,
            sharding=build.sharding,
            world_size=ranks,
            storages=memory.storages,
            plan=configured,
            offered=offered,
            num_tokens=num_tokens,
            document_length=longest,
            micro_batches=trainer.accumulate_grad_batches,
            num_steps=num_steps,
            optimizer=optimizer,
            memory=[memory.estimate(num_tokens, plan=each, **plans) for each in PLANS],
            budgets=budgets,
            reserve_gib=reserve_gib,
            speeds=estimate_speed(
                step_flops(memory.model),
                plan=plan,
                num_tokens=num_tokens,
                micro_batches=trainer.accumulate_grad_batches,
                num_steps=num_steps,
                device=build.device,
                **plans,
            ),
        )
    if json:
        json_format.dump(as_dict(found), sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        print_estimate(found)


def _check(
    tokens: int | None, document_length: int | None, share: float, world_size: int | None, memory: list[float]
) -> None:
    counts = {"tokens": tokens, "document_length": document_length, "world_size": world_size}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; write a whole number from 1.")
    if not 0 <= share <= 1:
        raise ValueError(f"supervised_share is {share}; write a share from 0 to 1.")
    if min(memory) < 0:
        raise ValueError(f"memory_gib and reserve_gib hold {min(memory)}; write GiB from 0.")


class _Builder:
    """Builds the memory model of any base with the run's adapters, optimizer and ranks."""

    def __init__(
        self, module: CausalLMModule, device: Device, trainer: L.Trainer, sharding: Sharding, world_size: int
    ) -> None:
        self.module = module
        self.device: Device = device
        self.sharding: Sharding = sharding
        self.world_size = world_size
        self.accumulates = trainer.accumulate_grad_batches > 1
        self.dtype = module.base_dtype or (torch.bfloat16 if device == "cuda" else compute_dtype(torch.device("cpu")))

    def __call__(self, model_name: str) -> tuple[MemoryModel, str]:
        """Return the memory model, and the class of the optimizer."""
        module = self.module
        config = load_config(model_name, revision=module.revision, trust_remote_code=module.trust_remote_code)
        adapters: Any = (
            module.lora if module.adapter is None else PeftConfig.from_pretrained(str(find_adapter(module.adapter)))
        )
        skeleton = build_skeleton(
            config,
            adapters,
            quantization=module.quantization,
            dtype=self.dtype,
            trust_remote_code=module.trust_remote_code,
        )
        if module.fuses_lora(self.device):
            fuse_lora(skeleton)
        if module.fuses_elementwise(self.device):
            fuse_elementwise(skeleton)
        optimizer: Any = build_optimizer(module.optimizer, skeleton)
        mixed = None if self.dtype is torch.float32 else self.dtype
        memory = MemoryModel(
            skeleton,
            memory_of_optimizer(optimizer, on_gpu=self.device == "cuda"),
            device=self.device,
            autocast=mixed,
            accumulates=self.accumulates,
            sharding=self.sharding,
            world_size=self.world_size,
            recorded=module.cuda_graphs is True,
        )
        return memory, type(optimizer).__name__


def _offered_plans() -> tuple[Plan, ...]:
    """Return the choices of activation_checkpointing, from the fastest to the leanest."""
    choices = get_args(get_type_hints(CausalLMModule.__init__)["activation_checkpointing"])
    return tuple(plan for plan in PLANS if plan in choices)


def _what_fits(
    memory: MemoryModel,
    num_tokens: int,
    longest: int,
    offered: tuple[Plan, ...],
    limit: int,
    context: Callable[[int], int],
) -> tuple[Plan | None, int, int, int]:
    """Return the plan for the configured batch, the largest batch, the longest context, and its bytes on the host."""
    plan = next(
        (p for p in offered if memory.estimate(num_tokens, plan=p, document_length=longest).peak <= limit), None
    )
    batch = largest_that_fits(
        lambda size: memory.estimate(size, plan=offered[-1], document_length=longest).peak, limit, step=longest
    )
    length = largest_that_fits(context, limit, step=64)
    known = min(length, _LONG)  # it grows in proportion
    host = memory.estimate(known, plan=offered[-1]).host * length // known if length and memory.device != "cpu" else 0
    return plan, batch, length, host


def _peak_of_one_document(memory: MemoryModel, plan: Plan) -> Callable[[int], int]:
    """Return the peak as a function of the length of a single document.

    With fused attention it grows in proportion, and long ones follow from two shorter ones; without, it is simulated
    at every length.
    """

    def simulate(length: int) -> int:
        return memory.estimate(length, plan=plan).peak

    quarter, half, whole = (simulate(_LONG // part) for part in (4, 2, 1))
    slope = (whole - half) / (_LONG // 2)
    if abs(half - quarter - slope * _LONG / 4) > _STRAIGHT * half:
        return simulate
    return lambda length: simulate(length) if length <= _LONG else round(whole + slope * (length - _LONG))


def _largest_models(
    build: _Builder, num_tokens: int, longest: int, plan: Plan, limits: list[int]
) -> dict[int, str | None]:
    peaks = {}
    for name in SHAPES:
        memory, _ = build(SHAPE_SCHEME + name)
        peaks[name] = memory.estimate(num_tokens, plan=plan, document_length=longest).peak
    return {limit: next((name for name in reversed(SHAPES) if peaks[name] <= limit), "none") for limit in limits}
