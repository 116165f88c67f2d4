"""What a decoder layer keeps between forward and backward: everything, part of it, its input, or nothing here.

All plans compute the same gradients; they trade memory for recomputation and copies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_qlora.kernels.host_offload import HostOffload, formed_again

__all__ = [
    "OFFLOADING",
    "PLANS",
    "SELECTIVE",
    "MixedPlan",
    "Plan",
    "needs_host",
    "plan_of_layers",
    "random_state_left_alone",
    "set_checkpointing",
]

Plan: TypeAlias = Literal["none", "selective", "selective_offload", "full", "offload"]
"""What is kept between forward and backward: everything (``none``); all but the MLP's activations, with the MLP
recomputed (``selective``); the same in host memory (``selective_offload``); each layer's input, with the layer
recomputed (``full``); that in host memory (``offload``).

For Llama-3.1-8B with fused kernels these are 92, 36, 36, 8 and 8 KiB a token and layer."""
PLANS: tuple[Plan, ...] = get_args(Plan)
SELECTIVE: tuple[Plan, ...] = ("selective", "selective_offload")
"""Those that recompute the MLP alone."""
OFFLOADING: tuple[Plan, ...] = ("selective_offload", "offload")
"""Those that need host memory."""

_FEED_FORWARD = ("mlp", "feed_forward", "block_sparse_moe", "ffn")  # what families call it


class MixedPlan(NamedTuple):
    """A lean plan for the first layers and a rich one for the others.

    The first layers are the ones to recompute: when the backward pass comes to them, it has released the others.

    Attributes:
        lean: Of the first layers.
        num_lean: How many they are.
        rich: Of the others.
    """

    lean: Plan
    num_lean: int
    rich: Plan

    def __str__(self) -> str:
        return f"{self.lean} in the first {self.num_lean} layers, {self.rich} in the others"


def needs_host(plan: Plan | MixedPlan | None) -> bool:
    """Whether any layers keep tensors in host memory."""
    plans = (plan.lean, plan.rich) if isinstance(plan, MixedPlan) else (plan,)
    return any(each in OFFLOADING for each in plans)


def plan_of_layers(plan: Plan | MixedPlan, num_layers: int) -> list[Plan]:
    """Spell a plan out, layer by layer."""
    if isinstance(plan, MixedPlan):
        return [plan.lean if index < plan.num_lean else plan.rich for index in range(num_layers)]
    return [plan] * num_layers


def set_checkpointing(layers: Sequence[nn.Module], plan: Plan | MixedPlan) -> HostOffload:
    """Let decoder layers follow a plan from now on.

    transformers would also make the embedding's output require a gradient. Checkpointing without reentrance needs none
    of it, and the first layer is spared the product that computes it.

    Args:
        layers: In the order they run; transformers' ``GradientCheckpointingLayer``. Where one has no MLP that is known,
            selective plans recompute the layer.
        plan: For all of them, or a mixture.

    Returns:
        What moves tensors to the host, where the plan has it.
    """
    offload = HostOffload()
    for layer, name in zip(layers, plan_of_layers(plan, len(layers)), strict=True):
        stateful: Any = layer
        stateful.gradient_checkpointing = name != "none"
        stateful._gradient_checkpointing_func = _checkpointing(layer, name, offload)
    return offload


def _checkpointing(layer: nn.Module, plan: Plan, offload: HostOffload) -> Callable[..., Any] | None:
    """Return what calls a layer in training."""
    if plan == "none":
        return None
    recompute: Callable[..., Any] = _recompute
    feed_forward = _feed_forward_of(layer) if plan in SELECTIVE else None
    if feed_forward is not None:
        recompute = functools.partial(_recompute_part, feed_forward)
    return functools.partial(offload if plan in OFFLOADING else formed_again, recompute)


_restores_random_state = ContextVar("restores_random_state", default=True)


@contextmanager
def random_state_left_alone() -> Iterator[None]:
    """Let layers that are called within, and draw no random numbers, be recomputed without setting their state back.

    While a CUDA graph is recorded the state cannot be asked for.
    """
    before = _restores_random_state.set(False)
    try:
        yield
    finally:
        _restores_random_state.reset(before)


def _recompute(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=_restores_random_state.get())


def _feed_forward_of(layer: nn.Module) -> nn.Module | None:
    """Return a decoder layer's MLP, if it has one by a name that is known."""
    children = dict(layer.named_children())
    return next((children[name] for name in _FEED_FORWARD if name in children), None)


def _recompute_part(part: nn.Module, layer: Callable[..., Any], *args: Any) -> Any:
    """Call a layer one part of which keeps its input only."""
    attributes = vars(part)
    before = attributes.get("forward")
    attributes["forward"] = functools.partial(_recompute, part.forward)
    try:
        return layer(*args)
    finally:
        if before is None:
            del attributes["forward"]
        else:
            attributes["forward"] = before
