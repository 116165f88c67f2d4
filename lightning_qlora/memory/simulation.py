"""A training step run on the meta device, with every tensor's birth and death counted.

The real classes run: transformers' layers, PEFT's adapters, bitsandbytes' products, the document attention and the
chunked head, forward and backward, with or without recomputation. Only the numbers are missing. So the count follows
the code by itself, whatever the family, the adapters or the kernels, as long as these are made of torch's operators or
are custom operators that say what they return (``torch.library.register_fake``, as bitsandbytes' do).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from lightning_qlora.kernels.attention import packed_attention_arguments, use_document_attention
from lightning_qlora.kernels.checkpointing import PLANS, Plan
from lightning_qlora.kernels.self_check import first_line
from lightning_qlora.losses.cross_entropy import head_cross_entropy
from lightning_qlora.memory.skeleton import META
from lightning_qlora.memory.tracking import MemoryTracker, held_tensors
from lightning_qlora.model import base_model, set_activation_checkpointing

__all__ = ["PLANS", "Device", "Plan", "SimulationError", "StepMemory", "simulate_step"]

Device: TypeAlias = Literal["cuda", "cpu"]
"""Where the step is to run: it decides which attention kernel there is, and how heads are grouped."""


class SimulationError(ValueError):
    """A step of this model cannot be run without its numbers."""


class StepMemory(NamedTuple):
    """Bytes beyond what is held all the time (weights, gradients, optimizer), at the moments that can be the largest.

    Attributes:
        forward: The most during the forward pass of the layers.
        head: The most while the head and the loss are computed.
        kept: Held between forward and backward.
        backward: The most during the backward pass.
        host: In host memory between forward and backward.
    """

    forward: int
    head: int
    kept: int
    backward: int
    host: int

    def with_layers(self, kept: int, host: int) -> StepMemory:
        """Return the step of more layers, or of fewer, that keep so much more on the device and on the host."""
        forward, head, before, backward, on_host = self
        return StepMemory(forward + kept, head + kept, before + kept, backward + kept, on_host + host)


def simulate_step(
    model: PeftModel,
    document_lengths: Sequence[int],
    num_supervised: int,
    *,
    plan: Plan = "none",
    device: Device = "cuda",
    dtype: torch.dtype | None = None,
) -> StepMemory:
    """Run forward and backward of one packed micro-batch and count what they hold.

    Args:
        model: A skeleton; its gradients are filled, so that accumulating into them allocates nothing.
        document_lengths: Tokens of each packed document.
        num_supervised: Tokens that enter the loss.
        plan: What is kept for the backward pass.
        device: Where the step would run.
        dtype: Of autocast; ``None`` for a run without mixed precision.

    Raises:
        SimulationError: If the model's code needs numbers to decide what it does.
    """
    base: Any = base_model(model)
    offload = set_activation_checkpointing(base, plan)
    base.disable_input_require_grads()  # enabling twice would leave a hook behind
    if plan != "none":  # the few layers of a simulation stand for all, whose inputs require gradients
        base.enable_input_require_grads()
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    try:
        with (
            META,
            _autocast_flag(dtype),
            _DeviceMode(device, dtype),
            MemoryTracker(held_tensors(model)) as tracker,
        ):
            moments = _run(base, tuple(document_lengths), num_supervised, tracker)
    except (NotImplementedError, RuntimeError, torch._subclasses.fake_tensor.DataDependentOutputException) as error:
        raise SimulationError(
            f"A step of {type(base).__name__} cannot be simulated without its weights: {first_line(error)}"
        ) from error
    finally:
        for parameter in model.parameters():
            parameter.grad = None
    return StepMemory(*moments, host=0 if offload is None else offload.moved_bytes)


def _run(base: Any, lengths: tuple[int, ...], num_supervised: int, tracker: MemoryTracker) -> tuple[int, int, int, int]:
    ids_BL = torch.empty((1, sum(lengths)), dtype=torch.int64)
    targets_N = torch.empty(num_supervised, dtype=torch.int64)
    inputs = {"input_ids": ids_BL, "position_ids": torch.empty_like(ids_BL), "use_cache": False}
    if use_document_attention(base):
        inputs |= packed_attention_arguments(ids_BL, lengths)
    if _logits_are_plain(base.config):
        hidden_TD = base.get_decoder()(**inputs).last_hidden_state.flatten(0, 1)
        head = _head(base)
    else:
        hidden_TD, head = base(**inputs).logits.flatten(0, 1), nn.Identity()
    forward = tracker.take_peak()
    loss = head_cross_entropy(hidden_TD[torch.empty_like(targets_N)], head, targets_N).loss_sum
    del hidden_TD
    head_peak, kept = tracker.take_peak(), tracker.live
    # The engine itself: autograd.backward would put the modes aside, also while a layer is recomputed.
    _engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )
    return forward, head_peak, kept, tracker.take_peak()


def _logits_are_plain(config: Any) -> bool:
    """Whether the logits are the head of the hidden states; some families scale them after the head."""
    return all(getattr(config, name, None) in (None, 1, 1.0) for name in ("logits_scaling", "logit_scale"))


class _Softcap(nn.Module):
    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, logits_NV: Tensor) -> Tensor:
        return self.bound * torch.tanh(logits_NV / self.bound)


def _head(base: Any) -> nn.Module:
    head: nn.Module = base.get_output_embeddings()
    softcap = getattr(base.config, "final_logit_softcapping", None)
    return head if softcap is None else nn.Sequential(head, _Softcap(softcap))


# The device that is not there


class _DeviceMode(TorchFunctionMode):
    """Lets code on the meta device see what it would see on a device: its attention kernels, and autocast.

    Args:
        device: The device.
        dtype: Of autocast, if any.
    """

    def __init__(self, device: Device, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.on_gpu = device == "cuda"
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _IS_CUDA:
            return self.on_gpu
        if func in _AUTOCAST and self.dtype is not None:
            args, kwargs = tree_map_only(Tensor, self._cast, (args, kwargs))
        if func is functional.scaled_dot_product_attention:
            return (_attend_on_gpu if self.on_gpu else _attend_on_cpu)(*args, **kwargs)
        return func(*args, **kwargs)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


_IS_CUDA = torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]  # a property of a type written in C
_AUTOCAST = frozenset(
    {functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, torch.bmm, torch.addmm, torch.baddbmm}
    | {functional.scaled_dot_product_attention, functional.conv1d, torch.einsum}
)


@contextlib.contextmanager
def _autocast_flag(dtype: torch.dtype | None) -> Iterator[None]:
    """Answer ``torch.is_autocast_enabled()``, which PEFT asks; on the meta device there is no autocast itself."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or before[1])
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def _attend_on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Torch's flash attention for CPUs, which takes masks, as numbers of the queries' dtype."""
    bias = None if attn_mask is None else _as_bias(attn_mask, query)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=bias, scale=scale)[0]  # type: ignore[no-any-return]


def _attend_on_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash attention where no mask is given; with one, the memory-efficient kernel, which cannot group heads."""
    if attn_mask is None:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
        return kernel(query, key, value, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]
    if query.shape[1] != key.shape[1]:  # the reference of plain operators is all that is left
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return functional.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    bias = _as_bias(attn_mask, query).expand(*query.shape[:3], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]


def _as_bias(mask: Tensor, query: Tensor) -> Tensor:
    return torch.zeros_like(mask, dtype=query.dtype) if mask.dtype == torch.bool else mask
