"""Sharding of a 4-bit base by FSDP2, for models that one device does not hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from typing_extensions import override

from lightning_qlora.memory.layers import decoder_layers, embedding_alone, head_alone
from lightning_qlora.model import base_model
from lightning_qlora.parts import cut_until_used
from lightning_qlora.random_state import capture_random_state, restore_random_state
from lightning_qlora.strategies.integer_parameters import integer_parameters
from lightning_qlora.strategies.sharded_load import ShardedLoad, laid_out

__all__ = ["FSDP2Strategy"]


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2: each rank holds its part of every decoder layer, and gathers one layer at a time.

    The bytes of 4-bit weights are cut up as they are stored; their constants (an eighth of a bit a weight with double
    quantisation) stay whole on each rank. Embedding, head and whatever else lies outside the layers are cut up too: the
    embedding is gathered for its own use, and the head for the loss, where they are two matrices and nothing of them is
    trained; the rest for the length of a step. Adapters, gradients and optimizer state are sharded with their layers.
    Dtypes are left as they are, so that a step computes what it computes under DDP; ``bf16-mixed`` works as everywhere.

    Checkpoints hold adapters and their optimizer state. Gathered into one file, the default, they resume on any number
    of devices, with this strategy or another. The base is never gathered.

    No rank ever holds the whole base. Each reads the files through the page cache, which the ranks of a host share,
    quantises weight by weight on its own device, and keeps its part (:mod:`lightning_qlora.strategies.sharded_load`).
    Reading them on one rank and sending them would load the network with N copies of the base in 16 bits to save
    quantising, which takes seconds. While it loads a rank holds its parts, embedding and head, one whole layer of each
    kind, and the weight at hand in 16 bits.

    Args:
        cpu_offload: Keep the parts, their gradients and the optimizer state in host memory, from the loading on.
        save_distributed_checkpoint: One file a rank instead of one; those resume under this strategy only.
        process_group_backend: Of torch.distributed; null chooses by device.
        timeout: Of torch.distributed's operations.
    """

    def __init__(
        self,
        *,
        cpu_offload: bool = False,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.cpu_offload = cpu_offload
        self._sharded: PeftModel | None = None

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def _offloads_from_gpu(self) -> bool:
        return self.cpu_offload and self.root_device.type == "cuda"

    @override
    def _get_process_group_backend(self) -> str:
        # Parts that are kept on the host are gathered there for PEFT, and their gradients clipped over the ranks.
        chosen = self._process_group_backend or ("cpu:gloo,cuda:nccl" if self._offloads_from_gpu else None)
        return chosen or super()._get_process_group_backend()

    @override
    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        world = torch.distributed.group.WORLD
        if world is not None and self._process_group_backend != "nccl":
            # Bound to a GPU, a group would be split for the mesh, which torch 2.11 does for NCCL alone.
            world.bound_device_id = None

    # ShardsModel

    @contextmanager
    def building(self) -> Iterator[None]:
        """Cut the base up as it is read, and give every rank rank 0's random state, for the same adapters on each."""
        own = capture_random_state()
        first = self.broadcast(own)
        restore_random_state(first)
        mesh = self.device_mesh["data_parallel"]
        if self._offloads_from_gpu:
            mesh = init_device_mesh("cpu", (mesh.size(),))
        with ShardedLoad(mesh, self.root_device).watching():
            yield
        if not torch.equal(own["torch"], first["torch"]):  # seeded rank by rank, for dropout of its own
            restore_random_state(own)

    def shard(self, model: PeftModel) -> None:
        """Cut up each decoder layer, then the rest; what is called from outside is the transformers model."""
        mesh = self.device_mesh["data_parallel"]
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if self.cpu_offload else OffloadPolicy()
        device = torch.device("cpu") if self.cpu_offload else self.root_device
        head = head_alone(model)
        with laid_out(model, device), integer_parameters():
            for part in (embedding_alone(model), *decoder_layers(model)):
                if part is not None:
                    fully_shard(part, mesh=mesh, offload_policy=offload)
            # Not the PeftModel: generate() calls the model inside it, and hooks would not run. The rest stays gathered
            # until the backward pass is done, since the loss calls a trained head after the forward pass is.
            fully_shard(
                base_model(model),
                mesh=mesh,
                reshard_after_forward=False,
                offload_policy=offload,
                ignored_params=None if head is None else {*head.parameters()},
            )
        if head is not None:
            # No group of FSDP2's: the loss calls the head chunk by chunk, each with a backward pass of its own, which
            # FSDP2's hooks would take for that of the step.
            cut_until_used(head, mesh, device)
        self._sharded = model

    @override
    def setup(self, trainer: L.Trainer) -> None:
        super().setup(trainer)
        if self._sharded is not None:
            self._gather_once(self._sharded)

    @override
    def setup_optimizers(self, trainer: L.Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if isinstance(optimizer, Optimizer8bit):  # what all of bitsandbytes' are made from
                raise MisconfigurationException(
                    f"{type(optimizer).__name__} of bitsandbytes takes no parameters that are in parts. Write "
                    "torch.optim.AdamW, whose state is in parts as well, or --trainer.strategy=ddp."
                )

    @torch.no_grad()
    def _gather_once(self, model: PeftModel) -> None:
        """Run two tokens through the model.

        FSDP2 makes the gathered parameters when they are first needed, for good, and trainable if they are so at that
        moment. A preference module's first pass is that of its reference, with adapters switched off.
        """
        base: Any = base_model(model)
        training = [module for module in model.modules() if module.training]
        model.eval()
        base(input_ids=torch.tensor([[0, 1]], device=self.root_device), use_cache=False)
        self._let_go()
        for module in training:
            module.training = True

    def _let_go(self) -> None:
        """Drop what a forward pass without a backward pass has left gathered, such as the head."""
        if self._sharded is not None:
            base: Any = base_model(self._sharded)
            assert isinstance(base, FSDPModule)
            base.reshard()

    @override
    def on_validation_end(self) -> None:
        self._let_go()

    @override
    def model_to_device(self) -> None:
        if not self.cpu_offload:
            super().model_to_device()
            return
        module: Any = self.lightning_module
        if module.model is not self._sharded:
            raise MisconfigurationException("cpu_offload needs a module that keeps its model as CausalLMModule does.")
        model, module.model = module.model, None  # metrics and the module itself go to the device, the parts do not
        module.to(self.root_device)
        module.model = model


StrategyRegistry.register(
    "fsdp_qlora", FSDP2Strategy, "FSDP2: a 4-bit base in parts, one on each device", override=True
)
