"""Data parallelism for adapters: every rank has a whole 4-bit base, and only what is trained travels."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

__all__ = ["QLoRADDPStrategy"]


class QLoRADDPStrategy(DDPStrategy):
    """DDP that sends and reduces adapters only.

    Every rank loads its own base on its own device, and quantises it alike. DDP would send rank 0's to all others at
    the start, without the constants of its 4-bit weights, which are no parameters; here only trained tensors are sent,
    so that adapters begin alike.

    The defaults that differ from torch's, each of which an argument of DistributedDataParallel overrides:
    ``gradient_as_bucket_view`` (one copy of the gradients less), no buffers sent (the base's never change), and
    ``find_unused_parameters`` where a model trains experts that are picked by token, and only there.
    ``static_graph`` stays off: with torch 2.13 an accumulated first step ends in an internal error, and it saves
    nothing where all adapters take part in each step.

    Args:
        options: Arguments of lightning.pytorch.strategies.DDPStrategy and torch's DistributedDataParallel.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"gradient_as_bucket_view": True, **options})

    @override
    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        if not {"static_graph", "find_unused_parameters"} & self._ddp_kwargs.keys() and _trains_experts(model):
            self._ddp_kwargs["find_unused_parameters"] = True
        kept = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        # By name, since broadcast_buffers=False is deprecated in torch 2.13, and what replaces it is not in 2.11.
        if not {"broadcast_buffers", "forward_sync_buffers"} & self._ddp_kwargs.keys():
            kept += [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, kept)
        return super()._setup_model(model)


def _trains_experts(model: nn.Module) -> bool:
    """Whether which adapters take part in a step depends on its tokens: those of experts that are modules of a list."""
    return any(
        any(parameter.requires_grad for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "experts"
    )


StrategyRegistry.register("ddp_qlora", QLoRADDPStrategy, "DDP that sends and reduces adapters only", override=True)
