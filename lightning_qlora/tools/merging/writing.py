"""A merged model's folder: written shard by shard under a hidden name, renamed when it is whole."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor

from lightning_qlora.tools.merging.adapted_model import AdaptedModel

__all__ = ["ShardPlan", "new_folder", "plan_shards", "write_shards"]


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a hidden folder beside ``target`` and rename it to that when all went well; else remove it.

    Raises:
        ValueError: If ``target`` exists and is not an empty folder.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{str(target)!r} exists and is not an empty folder. Write a new one; nothing is overwritten.")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    staging.mkdir()
    try:
        yield staging
        if target.is_dir():
            target.rmdir()
        os.rename(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


class _Planned(NamedTuple):
    """One tensor to be written."""

    parameter: str | None
    dtype: torch.dtype | None
    """``None`` leaves it as it is."""
    num_bytes: int


class ShardPlan(NamedTuple):
    """Which tensors go into which file.

    Attributes:
        tensors: By their names in the files.
        shards: The names by file.
        num_bytes: Of all tensors.
    """

    tensors: dict[str, _Planned]
    shards: dict[str, list[str]]
    num_bytes: int


def plan_shards(model: AdaptedModel, dtype: torch.dtype, max_shard_size: str) -> ShardPlan:
    """Distribute the tensors before any is made."""
    tensors = {}
    for file_name, parameter in model.names_to_write().items():
        shape = model.shape(file_name, parameter)
        if parameter is None and not model.base.info(file_name).is_float:
            tensors[file_name] = _Planned(None, None, model.base.read(file_name).nbytes)
            continue
        kept = torch.float32 if model.keeps_float32(parameter) else dtype
        tensors[file_name] = _Planned(parameter, kept, torch.Size(shape).numel() * kept.itemsize)
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    return ShardPlan(tensors, split.filename_to_tensors, sum(tensor.num_bytes for tensor in tensors.values()))


def write_shards(
    folder: Path, model: AdaptedModel, plan: ShardPlan, progress: Callable[[str], None] = lambda _: None
) -> None:
    """Make the tensors one after the other and write each file as soon as its last one is made.

    Args:
        folder: Exists already.
        model: Makes the tensors.
        plan: From :func:`plan_shards`.
        progress: Is told of each file before it is begun.
    """
    for number, (file, names) in enumerate(plan.shards.items(), start=1):
        progress(f"{file} ({number} of {len(plan.shards)})")
        shard: dict[str, Tensor] = {}
        for name in names:
            planned = plan.tensors[name]
            tensor = model.read(name, planned.parameter)
            # A copy in any case: a tensor as the file has it would keep that file's pages.
            shard[name] = tensor.to(planned.dtype or tensor.dtype, copy=True).contiguous()
            del tensor
        save_file(shard, folder / file, metadata={"format": "pt"})
        _flush(folder / file)
    if len(plan.shards) > 1:
        index = {
            "metadata": {"total_size": plan.num_bytes},
            "weight_map": {name: file for file, names in plan.shards.items() for name in names},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _flush(path: Path) -> None:
    with open(path, "rb+") as stream:
        os.fsync(stream.fileno())
    path.chmod(0o644)  # safetensors lets only its owner read, and servers often run as another user
