"""Data parallelism for adapters: every rank has a whole 4-bit base, and only what is trained travels."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

__all__ = ["QLoRADDPStrategy"]

_BUCKET_MIB = 256  # gradients of rank 16 of an 8B model are 160


class QLoRADDPStrategy(DDPStrategy):
    """DDP that sends and reduces adapters only.

    Every rank loads its own base on its own device, and quantises it alike. DDP would send rank 0's to all others at
    the start, without the constants of its 4-bit weights, which are no parameters; here only trained tensors are sent,
    so that adapters begin alike.

    The defaults that differ from torch's, each of which an argument of DistributedDataParallel overrides:
    ``gradient_as_bucket_view`` (one copy of the gradients less), no buffers sent (the base's never change),
    ``find_unused_parameters`` where a model trains experts that are picked by token, and only there, and on one host
    ``bucket_cap_mb`` of 256. Adapters are then exchanged all at once when the backward pass ends: that takes two
    milliseconds on NVLink, where torch's buckets of 25 MiB make the ranks wait for one another at each of them and take
    multiprocessors from the products meanwhile (on two H200s 3 % of a step; examples/benchmark/LOG.md). Between hosts
    torch's buckets stay, whose exchange a slow network needs to have begun early; on GPUs without NVLink try 25.
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
        if self.num_nodes == 1 and not {"bucket_cap_mb", "bucket_cap_mb_list"} & self._ddp_kwargs.keys():
            self._ddp_kwargs["bucket_cap_mb"] = _BUCKET_MIB
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
