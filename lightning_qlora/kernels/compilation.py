"""Decoder layers through ``torch.compile``, which fuses what they do element by element.

Layers of one kind share their graphs, and the number of tokens in them is dynamic, so that neither more layers nor
other batches make more of them. Attention takes the lengths of the documents; a graph contains it where it is torch's
varlen kernel, which reads them from a tensor, and otherwise ends before it and another begins behind it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from transformers import PreTrainedModel

from lightning_qlora.kernels.attention import DOCUMENT_ATTENTION, use_graph_attention
from lightning_qlora.kernels.checkpointing import SELECTIVE, MixedPlan, Plan, plan_of_layers

__all__ = ["compile_decoder", "compile_layers", "compile_parts"]


def compile_decoder(
    base: PreTrainedModel,
    layers: Sequence[nn.Module],
    plan: Plan | MixedPlan,
    *,
    dtype: torch.dtype,
    backend: str = "inductor",
) -> None:
    """Compile the decoder layers of a model whole where that is sound, else their norms and MLPs, and say so.

    Args:
        base: On its device.
        layers: Of the model, in the order they run.
        plan: What they keep for the backward pass.
        dtype: Of the products.
        backend: Of ``torch.compile``.
    """
    if base.config._attn_implementation == DOCUMENT_ATTENTION and not _have_experts(layers):
        use_graph_attention(base, dtype)
        compile_layers(layers, plan, backend=backend)
    else:  # attention and routers of any kind may decide by numbers
        compile_parts(layers, plan, backend=backend)
        rank_zero_info(f"compile_layers: of {type(base).__name__}, only norms and MLPs are compiled.")


def _have_experts(layers: Sequence[nn.Module]) -> bool:
    return any("experts" in dict(module.named_children()) for layer in layers for module in layer.modules())


def compile_layers(layers: Sequence[nn.Module], plan: Plan | MixedPlan, *, backend: str = "inductor") -> int:
    """Compile decoder layers when they first run in training or evaluation; generation runs them as they are.

    What a layer keeps for the backward pass is decided around the compiled code: a layer that is recomputed runs the
    same graphs again. Layers of a selective plan are left as they are: their code contains the checkpoint.

    Args:
        layers: In the order they run; transformers' ``GradientCheckpointingLayer``, under
            :func:`~lightning_qlora.kernels.attention.document_attention`.
        plan: What they keep for the backward pass.
        backend: Of ``torch.compile``.

    Returns:
        How many layers will be compiled.
    """
    compiled: dict[Any, Callable[..., Any]] = {}
    count = 0
    for layer, name in zip(layers, plan_of_layers(plan, len(layers)), strict=True):
        if name in SELECTIVE:
            continue
        forward, checkpoints = _plain_forward(type(layer))
        if forward not in compiled:
            compiled[forward] = torch.compile(forward, dynamic=True, backend=backend)
        stateful: Any = layer
        stateful.forward = functools.partial(_run, layer, forward, compiled[forward], checkpoints)
        count += 1
    return count


def _plain_forward(layer: type[nn.Module]) -> tuple[Callable[..., Any], bool]:
    """Return what a layer computes, and whether its ``forward`` is that with checkpointing around it.

    transformers checkpoints layers in ``__call__`` up to 5.17, and later in a wrapper around ``forward``, of which a
    class that is derived from another has several.
    """
    forward: Any = layer.forward
    checkpoints = False
    while forward.__code__.co_name == "forward_with_checkpointing":
        forward, checkpoints = forward.__wrapped__, True
    return forward, checkpoints


def _run(
    layer: Any,
    plain: Callable[..., Any],
    compiled: Callable[..., Any],
    checkpoints: bool,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if kwargs.get("past_key_values") is not None:  # generation: a cache is another graph at every token
        return plain(layer, *args, **kwargs)
    if checkpoints and layer.training and layer.gradient_checkpointing:
        return layer._gradient_checkpointing_func(functools.partial(compiled, layer, **kwargs), *args)
    return compiled(layer, *args, **kwargs)


def compile_parts(layers: Sequence[nn.Module], plan: Plan | MixedPlan, *, backend: str = "inductor") -> int:
    """Compile only the norms and the MLP of decoder layers, where whole ones do not go.

    Args:
        layers: In the order they run.
        plan: What they keep for the backward pass; as for :func:`compile_layers`.
        backend: Of ``torch.compile``.

    Returns:
        How many parts will be compiled.
    """
    count = 0
    for layer, name in zip(layers, plan_of_layers(plan, len(layers)), strict=True):
        if name in SELECTIVE:
            continue
        for part, module in layer.named_children():
            if part == "mlp" or part.endswith("norm"):
                module.compile(dynamic=True, backend=backend)
                count += 1
    return count
