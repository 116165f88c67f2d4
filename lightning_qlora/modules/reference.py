"""The reference of a preference loss: the same weights without, or with other, adapters; and its cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_qlora.pretrained import cache_dir

__all__ = ["REFERENCE_ADAPTER", "ReferenceTable", "adapter_digest", "use_adapter"]

REFERENCE_ADAPTER = "reference"
"""PEFT's name of the frozen copy of the adapter that training continues from."""

_CACHE_FORMAT = 1


@contextmanager
def use_adapter(model: PeftModel, name: str | None) -> Iterator[None]:
    """Let a model compute with another adapter, or with none, in evaluation mode.

    PEFT makes an adapter trainable when it is switched on and freezes it when it is switched off; which parameters
    are trained, which modules train and which adapter is active are given back as they were.

    Args:
        model: The model with adapters.
        name: Of the adapter; ``None`` for the base alone.
    """
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = [module for module in model.modules() if module.training]
    active = model.active_adapter
    tuner: Any = model.base_model
    model.eval()
    try:
        if name is None:
            tuner.disable_adapter_layers()
        elif name != active:
            model.set_adapter(name, inference_mode=True)
        yield
    finally:
        if name is None:
            tuner.enable_adapter_layers()
        elif name != active:
            model.set_adapter(active)
        for module in training:
            module.training = True
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


class ReferenceTable:
    """Reference log-probabilities of a data set's documents in a file that is found by what they depend on.

    Args:
        made_of: What the log-probabilities depend on, as plain JSON values.
        folder: Where the files are; by default ``reference`` in the cache.
    """

    def __init__(self, made_of: dict[str, Any], folder: Path | None = None) -> None:
        text = json.dumps({**made_of, "format": _CACHE_FORMAT}, sort_keys=True)
        folder = cache_dir() / "reference" if folder is None else folder
        self.path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"

    def read(self) -> Tensor | None:
        """Return the log-probabilities, if they were computed before."""
        return load_file(self.path)["log_probs"] if self.path.is_file() else None

    def write(self, log_probs: Tensor) -> None:
        """Keep log-probabilities; a reader sees the whole file or none."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        save_file({"log_probs": log_probs}, unfinished)
        os.replace(unfinished, self.path)


def adapter_digest(folder: str | Path) -> str:
    """Digest a PEFT folder's tensors and configuration."""
    digest = hashlib.sha256()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        with (Path(folder) / name).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
