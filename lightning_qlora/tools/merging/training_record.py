"""What an adapter folder says of the model it was trained in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import BitsAndBytesConfig

from lightning_qlora.checkpoints.publishing import read_manifest, verify
from lightning_qlora.model import compute_dtype, nf4, read_adapter_base

__all__ = ["TrainingRecord", "adapter_options", "base_of", "read_training_record"]


class TrainingRecord(NamedTuple):
    """How the base lay in memory while the adapter was trained.

    Attributes:
        quantization: The 4-bit options; ``None`` for a base that was not quantised.
        dtype: That the base was loaded in.
        is_known: Whether the folder's manifest says it, rather than the usual being assumed.
        metadata: What the manifest says of the run; empty for a folder without one.
    """

    quantization: BitsAndBytesConfig | None
    dtype: torch.dtype
    is_known: bool
    metadata: Mapping[str, Any]


def read_training_record(adapter: Path, quantization: str = "auto", base_dtype: str = "auto") -> TrainingRecord:
    """Read and verify an adapter folder's manifest, where it has one.

    Args:
        adapter: The folder.
        quantization: ``auto`` for what the manifest says (else NF4), ``nf4``, or ``none``.
        base_dtype: ``auto`` for what the manifest says (else that of the hardware which trained), or a dtype's name.

    Raises:
        DamagedCheckpointError: If a file is not as it was published.
        ValueError: If training quantised to 8 bits, which is not reproduced here.
    """
    manifest = read_manifest(adapter)
    metadata = {} if manifest is None else verify(adapter).metadata
    identity = metadata.get("identity") or {}
    dtype = _loaded_dtype(metadata) if base_dtype == "auto" else getattr(torch, base_dtype)
    is_known = "quantization" in identity
    if quantization == "none" or (quantization == "auto" and is_known and identity["quantization"] is None):
        return TrainingRecord(None, dtype, is_known, metadata)
    if quantization == "nf4" or not is_known:
        return TrainingRecord(nf4(dtype), dtype, is_known and quantization == "auto", metadata)
    config: BitsAndBytesConfig = BitsAndBytesConfig.from_dict(
        {**identity["quantization"], "bnb_4bit_compute_dtype": dtype}
    )
    if config.load_in_8bit:
        raise ValueError(
            f"{str(adapter)!r} was trained on an 8-bit base (LLM.int8()), whose rounding depends on the activations: "
            "no plain weights equal it. Write --quantization=none to merge onto the original weights."
        )
    return TrainingRecord(config, dtype, True, metadata)


def _loaded_dtype(metadata: Mapping[str, Any]) -> torch.dtype:
    """The dtype a run asked for, else the one that ``load_base_model`` chooses by hardware."""
    asked = (metadata.get("config") or {}).get("module", {}).get("dtype")
    if asked is not None:
        dtype: torch.dtype = getattr(torch, asked)
        return dtype
    quantizer = (metadata.get("identity") or {}).get("base", {}).get("quantizer") or ""
    return torch.bfloat16 if quantizer.endswith("cuda") else compute_dtype(torch.device("cpu"))


def base_of(adapter: Path, metadata: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the name and revision of the base that an adapter was trained on, as the run was given them.

    PEFT writes down the folder that the base was loaded from, which for a converted one is a cache of that machine.
    """
    module = (metadata.get("config") or {}).get("module") or {}
    if module.get("model_name"):
        return module["model_name"], module.get("revision")
    return read_adapter_base(adapter)


def adapter_options(adapter: Path) -> dict[str, Any]:
    """Return ``adapter_config.json``.

    Raises:
        ValueError: If the folder is no adapter in safetensors.
    """
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / file).is_file():
            raise ValueError(
                f"{str(adapter)!r} is no adapter folder: it holds no {file}. Write the folder that AdapterCheckpoint "
                "or PEFT's save_pretrained made."
            )
    options: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return options
