"""Norms and gated MLPs through ``torch.compile``, which fuses what they do element by element.

Only these parts of a layer are compiled: attention is called with the lengths of the documents, and a graph of it
would be made anew for every batch. Their number of tokens is dynamic, so that one graph serves all batches.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_qlora.kernels.checkpointing import MixedPlan, Plan, plan_of_layers

__all__ = ["compile_parts"]


def compile_parts(layers: Sequence[nn.Module], plan: Plan | MixedPlan, *, backend: str = "inductor") -> int:
    """Compile the norms and the MLP of decoder layers when they first run.

    Layers of the plan ``selective`` are left as they are: what is to be kept there is chosen operator by operator, and
    compiled code shows none.

    Args:
        layers: In the order they run.
        plan: What they keep for the backward pass.
        backend: Of ``torch.compile``.

    Returns:
        How many parts will be compiled.
    """
    count = 0
    for layer, name in zip(layers, plan_of_layers(plan, len(layers)), strict=True):
        if name == "selective":
            continue
        for part, module in layer.named_children():
            if part == "mlp" or part.endswith("norm"):
                module.compile(dynamic=True, backend=backend)
                count += 1
    return count
