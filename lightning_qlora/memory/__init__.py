"""How much memory training takes, without loading anything: a step is run on the meta device and its tensors counted.

``build_skeleton`` makes the model without data, ``MemoryModel`` estimates any batch and plan on it.
"""

from lightning_qlora.kernels.checkpointing import MixedPlan
from lightning_qlora.memory.estimate import MemoryEstimate, MemoryModel, Sharding
from lightning_qlora.memory.optimizer import OptimizerMemory, build_optimizer, optimizer_memory
from lightning_qlora.memory.run import (
    PlanChoice,
    autocast_dtype,
    choose_plan,
    free_memory,
    host_has_room,
    memory_of_run,
    most_tokens,
)
from lightning_qlora.memory.simulation import PLANS, Device, Plan, SimulationError, StepMemory, simulate_step
from lightning_qlora.memory.skeleton import build_base_skeleton, build_skeleton, skeleton_of

__all__ = [
    "PLANS",
    "Device",
    "MemoryEstimate",
    "MemoryModel",
    "MixedPlan",
    "OptimizerMemory",
    "Plan",
    "PlanChoice",
    "Sharding",
    "SimulationError",
    "StepMemory",
    "autocast_dtype",
    "build_base_skeleton",
    "build_optimizer",
    "build_skeleton",
    "choose_plan",
    "free_memory",
    "host_has_room",
    "memory_of_run",
    "most_tokens",
    "optimizer_memory",
    "simulate_step",
    "skeleton_of",
]
