"""Where 4-bit meets many devices: what Lightning's strategies need to be exact, and refusals of those that are not.

Importing this room registers ``ddp_qlora`` and ``fsdp_qlora``, so that ``Trainer(strategy="fsdp_qlora")`` finds them.
"""

from __future__ import annotations

from lightning_qlora.strategies.ddp import QLoRADDPStrategy
from lightning_qlora.strategies.fsdp import FSDP2Strategy
from lightning_qlora.strategies.sharding import ShardsModel, build_sharded, shard
from lightning_qlora.strategies.support import check_is_sharded, check_strategy, default_strategy

__all__ = [
    "FSDP2Strategy",
    "QLoRADDPStrategy",
    "ShardsModel",
    "build_sharded",
    "check_is_sharded",
    "check_strategy",
    "default_strategy",
    "shard",
]
