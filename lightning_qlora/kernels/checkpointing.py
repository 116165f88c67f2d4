"""What a decoder layer keeps between forward and backward: everything, what is dear, its input, or nothing here.

All plans compute the same gradients; they trade memory for recomputation and copies.
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

__all__ = ["PLANS", "HostOffload", "MixedPlan", "Plan", "plan_of_layers", "set_checkpointing"]

Plan: TypeAlias = Literal["none", "selective", "full", "offload"]
"""What is kept between forward and backward: everything (``none``); the outputs of quantised products and of attention,
with the rest recomputed (``selective``); each layer's input, with the layer recomputed (``full``); likewise, with the
inputs in host memory (``offload``)."""
PLANS: tuple[Plan, ...] = get_args(Plan)


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


def plan_of_layers(plan: Plan | MixedPlan, num_layers: int) -> list[Plan]:
    """Spell a plan out, layer by layer."""
    if isinstance(plan, MixedPlan):
        return [plan.lean if index < plan.num_lean else plan.rich for index in range(num_layers)]
    return [plan] * num_layers


def set_checkpointing(layers: Sequence[nn.Module], plan: Plan | MixedPlan) -> None:
    """Let decoder layers follow a plan from now on.

    transformers would also make the embedding's output require a gradient. Checkpointing without reentrance needs none
    of it, and the first layer is spared the product that computes it.

    Args:
        layers: In the order they run; transformers' ``GradientCheckpointingLayer``.
        plan: For all of them, or a mixture.
    """
    functions: dict[Plan, Callable[..., Any] | None] = {
        "none": None,
        "selective": functools.partial(checkpoint, use_reentrant=False, context_fn=_selective_contexts),
        "full": functools.partial(checkpoint, use_reentrant=False),
        "offload": HostOffload(),
    }
    for layer, name in zip(layers, plan_of_layers(plan, len(layers)), strict=True):
        stateful: Any = layer
        stateful.gradient_checkpointing = name != "none"
        stateful._gradient_checkpointing_func = functions[name]


# Selective

_DEAR = ("bitsandbytes.gemm_4bit", "torch_attn._varlen_attn.", "lightning_qlora.lora_")


def _selective_contexts() -> tuple[Any, Any]:
    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(_selective_policy)
    return contexts


def _selective_policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what is dear to compute: the products with quantised weights, and attention."""
    name = str(operator)
    dear = name.startswith(_DEAR) or (name.startswith("aten._scaled_dot") and "backward" not in name)
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


# Offload

_DEPTH = 2  # layer inputs on the device at a time: the one in use and the one on its way


class HostOffload:
    """Checkpoints layers with their inputs in pinned host memory, copied while other layers compute.

    In the forward pass a copy stream takes each input to the host; the compute stream waits for that copy only when it
    is two layers further, and frees the input there. Freed on the stream that allocated it, the memory is used again at
    once; ``record_stream`` would let it pile up while the host runs ahead of the device. In the backward pass the input
    of the layer before is on its way while a layer is recomputed.

    Args:
        everywhere: Also move inputs that are on no GPU (they are copied, without streams), to test the bookkeeping.
    """

    def __init__(self, everywhere: bool = False) -> None:
        self.everywhere = everywhere
        self._leaving: deque[_Moved] = deque()  # inputs still on the device, oldest first
        self._last: weakref.ref[_Moved] | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a layer on its input, and keep neither its activations nor, on the device, the input."""
        with saved_tensors_hooks(self._pack, self._unpack):
            return checkpoint(function, *args, use_reentrant=False)

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """Return the stream of the copies from and to a device."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def _pack(self, tensor: Tensor) -> Tensor | _Moved:
        if not (tensor.is_cuda or self.everywhere) or not tensor.is_floating_point() or tensor.device.type == "meta":
            return tensor
        if tensor.numel() == 0:  # torch 2.11 saves one beside each layer's input
            return tensor
        moved = _Moved(self, tensor.detach(), self._last)
        self._last = weakref.ref(moved)
        self._leaving.append(moved)
        while len(self._leaving) > _DEPTH:
            self._leaving.popleft().leave()
        return moved

    def _unpack(self, packed: Tensor | _Moved) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if packed in self._leaving:  # the backward pass has begun: what has not left need not
            self._leaving.clear()
        tensor = packed.arrive()
        before = packed.before() if packed.before is not None else None
        if before is not None:
            before.send_for()
        return tensor


class _Moved:
    """A layer's input, on the device, on the host, or on its way."""

    def __init__(self, owner: HostOffload, tensor: Tensor, before: weakref.ref[_Moved] | None) -> None:
        self.owner = owner
        self.before = before
        self.device = tensor.device
        self.on_device: Tensor | None = tensor
        self.copied: torch.cuda.Event | None = None
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._copy(self.host, tensor)

    def _copy(self, target: Tensor, source: Tensor) -> None:
        if self.device.type != "cuda":
            target.copy_(source)
            return
        stream = self.owner.stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))  # source is computed, and target's memory is free
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            self.copied = stream.record_event()

    def _wait(self) -> None:
        """Let the compute stream, not the host, wait for the copy."""
        if self.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)
            self.copied = None

    def leave(self) -> None:
        """Free the device's memory once the copy on the host is complete."""
        self._wait()
        self.on_device = None

    def send_for(self) -> None:
        """Begin to bring the input back, if it has left."""
        if self.on_device is None:
            self.on_device = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
            self._copy(self.on_device, self.host)

    def arrive(self) -> Tensor:
        """Return the input on the device, and keep it there no longer than the caller does."""
        self.send_for()
        self._wait()
        tensor, self.on_device = self.on_device, None
        assert tensor is not None
        return tensor
