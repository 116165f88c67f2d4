"""The tensors of a base, read one at a time, as the checkpoint has them or as 4-bit training saw them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn import Params4bit
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor
from transformers import BitsAndBytesConfig

from lightning_qlora.pretrained import resolve_pretrained

__all__ = ["BaseWeights", "TensorInfo", "local_base", "quantized"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PACKED = ".quant_state.bitsandbytes__"  # what bitsandbytes stores beside a 4-bit weight
_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py", "LICENSE*", "README.md"]
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorInfo(NamedTuple):
    """What a safetensors header says of a tensor, a packed one counted as what it stands for.

    Attributes:
        shape: Its shape.
        is_float: Whether it holds floating point numbers.
    """

    shape: tuple[int, ...]
    is_float: bool


def local_base(name: str, revision: str | None = None) -> Path:
    """Return the folder of a base, downloaded from the hub first if it is not here.

    Raises:
        ValueError: If it cannot be had.
    """
    source = resolve_pretrained(name)
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ValueError(
            f"The base {name!r} cannot be read: {str(error).strip().splitlines()[0]} Write --base with the folder of "
            "the model, or run this where the hub can be reached."
        ) from error


class BaseWeights:
    """The safetensors files of a model folder.

    A file is opened anew for each tensor, so that no more of it stays in memory than the tensor in hand.

    Args:
        folder: The model's folder.

    Raises:
        ValueError: If it holds no safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = _file_of_each_tensor(folder)
        self._packed = {
            name.partition(_PACKED)[0]: [
                other for other in self._files if other.startswith(f"{name.partition('.quant_state')[0]}.")
            ]
            for name in self._files
            if _PACKED in name
        }
        parts = {part for parts in self._packed.values() for part in parts}
        self.names: tuple[str, ...] = tuple(name for name in self._files if name not in parts)
        """Every tensor of the checkpoint, in the order of its files; what belongs to a packed one is not listed."""

    @property
    def is_packed(self) -> bool:
        """Whether the folder holds weights that bitsandbytes packed into 4 bits."""
        return bool(self._packed)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def info(self, name: str) -> TensorInfo:
        """Read a tensor's shape and kind without reading it."""
        if name in self._packed:
            return TensorInfo(tuple(self._quant_state(name).shape), True)
        with safe_open(self.folder / self._files[name], framework="pt") as file:
            part = file.get_slice(name)
            return TensorInfo(tuple(part.get_shape()), part.get_dtype() in _DTYPES)

    def read(self, name: str) -> Tensor:
        """Read one tensor; a packed one is unpacked as training saw it."""
        if name in self._packed:
            weight: Tensor = dequantize_4bit(self._raw(name), self._quant_state(name))
            return weight
        return self._raw(name)

    def _raw(self, name: str) -> Tensor:
        with safe_open(self.folder / self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def _quant_state(self, name: str) -> QuantState:
        parts = {part: self._raw(part) for part in self._packed[name]}
        return QuantState.from_dict(parts, device=torch.device("cpu"))


def _file_of_each_tensor(folder: Path) -> dict[str, str]:
    if (folder / _INDEX).is_file():
        index: Mapping[str, str] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        return dict(sorted(index.items(), key=lambda item: item[1]))
    if not (folder / _SINGLE).is_file():
        raise ValueError(
            f"{str(folder)!r} holds neither {_SINGLE} nor {_INDEX}. Only safetensors are read: save the base with "
            "transformers' save_pretrained and name that folder by --base."
        )
    with safe_open(folder / _SINGLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), _SINGLE)


def quantized(weight: Tensor, config: BitsAndBytesConfig, dtype: torch.dtype) -> Params4bit:
    """Pack a weight into 4 bits as transformers does when it loads a base for training.

    Args:
        weight: Of a linear layer, rows first.
        config: The quantisation that training used.
        dtype: That the base was loaded in; the scales are computed from weights of this precision.
    """
    options: dict[str, Any] = {
        "compress_statistics": config.bnb_4bit_use_double_quant,
        "quant_type": config.bnb_4bit_quant_type,
        "quant_storage": config.bnb_4bit_quant_storage,
    }
    packed: Any = Params4bit(weight.to(dtype).contiguous(), requires_grad=False, **options)
    return cast(Params4bit, packed.to("cpu"))
