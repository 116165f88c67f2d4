"""Torch's varlen operators in plain arithmetic on the CPU, where they have no kernel: same schema, same contract."""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen

__all__ = ["register_on_cpu"]


def register_on_cpu() -> None:
    """Give the operators CPU kernels, for the rest of the process."""
    varlen._varlen_attn.register_kernel("cpu")(_forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(_backward)


def _named(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip([argument.name for argument in operator._schema.arguments], args, strict=False)) | kwargs


def _attend(query: Tensor, key: Tensor, value: Tensor, call: dict[str, Any]) -> Tensor:
    scale = query.shape[-1] ** -0.5 if call.get("scale") is None else call["scale"]
    left, right = call["window_size"]
    assert right == 0, "not causal"
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    outputs = []
    for start, end in pairwise(call["cu_seq_q"].tolist()):
        position = torch.arange(end - start)
        distance = position[:, None] - position[None, :]
        allowed = (distance >= 0) & ((left < 0) | (distance <= left))
        scores = torch.einsum("qhd,khd->hqk", query[start:end], key[start:end]) * scale
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, value[start:end]))
    return torch.cat(outputs)


def _forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = _named(torch.ops.torch_attn._varlen_attn.default, args, kwargs)
    query = call["query"]
    output = _attend(query, call["key"], call["value"], call)
    lse = query.new_zeros(query.shape[1], query.shape[0], dtype=torch.float32)
    return output.contiguous(), lse, torch.zeros(2, dtype=torch.uint64)


def _backward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    call = _named(torch.ops.torch_attn._varlen_attn_backward.default, args, kwargs)
    found: list[Tensor] = []

    def differentiate() -> None:
        leaves = [call[name].detach().clone().requires_grad_() for name in ("query", "key", "value")]
        found.extend(torch.autograd.grad(_attend(*leaves, call), leaves, call["grad_out"]))

    thread = threading.Thread(target=differentiate)  # inside an operator nothing is recorded for autograd
    thread.start()
    thread.join()
    return tuple(found)
