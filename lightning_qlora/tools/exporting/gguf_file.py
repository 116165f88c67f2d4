"""GGUF files: a whole model, or the LoRA alone, written tensor by tensor."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from gguf import (
    GGML_QUANT_VERSION,
    MODEL_TENSOR,
    TENSOR_NAMES,
    GGMLQuantizationType,
    GGUFType,
    GGUFWriter,
    Keys,
    LlamaFileType,
)
from gguf.quants import quant_shape_to_byte_shape, quantize
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_qlora.tools.exporting.architectures import Architecture, TensorTarget
from lightning_qlora.tools.exporting.vocabulary import Vocabulary, write_vocabulary
from lightning_qlora.tools.merging.base_weights import BaseWeights

__all__ = ["OutputType", "write_adapter", "write_model"]

OutputType = Literal["f32", "f16", "bf16", "q8_0"]

_KINDS: dict[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_BLOCK = 32  # values of a row that Q8_0 rounds together


class _Tensor(NamedTuple):
    """A tensor to be written, not made yet."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    make: Callable[[], Tensor]


def write_model(
    path: Path,
    weights: BaseWeights,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    outtype: OutputType,
    about: Mapping[str, str],
) -> None:
    """Write a model as one GGUF file.

    Args:
        path: The file, written under a hidden name first.
        weights: The model's files.
        architecture: Its place in llama.cpp.
        tokenizer: For the chat template.
        vocabulary: The tokenizer, translated.
        outtype: Of the matrices; vectors are float32.
        about: Fields of ``general.``: name, description, license, ...
    """
    kind, file_type = _KINDS[outtype]
    tied = bool(getattr(architecture.config, "tie_word_embeddings", False))
    tensors = []
    for name in weights.names:
        if tied and name == "lm_head.weight":
            continue
        target = architecture.target(name)
        if target is not None:
            shape = weights.info(name).shape
            tensors.append(_Tensor(target.name, shape, _kind_of(shape, kind), _reader(weights, name, target)))
    factors = architecture.rope_factors()
    if factors is not None:
        name = f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.weight"
        tensors.append(_Tensor(name, tuple(factors.shape), GGMLQuantizationType.F32, lambda: factors))
    with _new_file(path) as staging:
        writer = GGUFWriter(None, architecture.name)
        writer.add_type(GGUFType.MODEL)
        _describe(writer, about)
        architecture.write_sizes(writer)
        writer.add_vocab_size(len(vocabulary.tokens))
        writer.add_file_type(file_type)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        write_vocabulary(writer, vocabulary, tokenizer)
        _write(writer, staging, tensors)


def write_adapter(
    path: Path,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    alpha: float,
    architecture: Architecture,
    outtype: OutputType,
    about: Mapping[str, str],
) -> None:
    """Write a LoRA as a GGUF file that llama.cpp loads beside its base.

    Args:
        path: The file.
        pairs: A of shape (r, in) and B of shape (out, r) by the name of the weight that they change, scaled so that
            ``alpha / r`` is what remains.
        alpha: The LoRA's alpha.
        architecture: The base's place in llama.cpp.
        outtype: Of A and B.
        about: Fields of ``general.``.
    """
    kind, file_type = _KINDS[outtype]
    tensors = []
    for name, (a, b) in pairs.items():
        target = architecture.target(name)
        assert target is not None, name
        b = target.apply(b)
        for end, tensor in ((".lora_a", a), (".lora_b", b)):
            shape = tuple(tensor.shape)
            tensors.append(_Tensor(target.name + end, shape, _kind_of(shape, kind), partial(torch.clone, tensor)))
    with _new_file(path) as staging:
        writer = GGUFWriter(None, architecture.name)
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
        _describe(writer, about)
        writer.add_file_type(file_type)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        _write(writer, staging, tensors)


def _describe(writer: GGUFWriter, about: Mapping[str, str]) -> None:
    for field, text in about.items():
        writer.add_string(f"general.{field}", text)


def _kind_of(shape: tuple[int, ...], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    if kind == GGMLQuantizationType.Q8_0 and shape[-1] % _BLOCK:
        return GGMLQuantizationType.F16
    return kind


def _reader(weights: BaseWeights, name: str, target: TensorTarget) -> Callable[[], Tensor]:
    return lambda: target.apply(weights.read(name).float())


def _write(writer: GGUFWriter, path: Path, tensors: list[_Tensor]) -> None:
    """Write the header, for which shapes are enough, and then one tensor after the other."""
    for tensor in tensors:
        rows = quant_shape_to_byte_shape(tensor.shape, tensor.kind)
        writer.add_tensor_info(tensor.name, rows, np.dtype(np.uint8), math.prod(rows), raw_dtype=tensor.kind)
    with closing(writer):
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            data = tensor.make().float().contiguous().numpy()
            if not np.isfinite(data).all():
                raise ValueError(f"{tensor.name} is not finite.")
            packed: np.ndarray[Any, Any] = quantize(data, tensor.kind)
            if tensor.kind == GGMLQuantizationType.F16 and not np.isfinite(packed).all():
                raise ValueError(f"{tensor.name} holds values beyond float16's range. Write --outtype=bf16 or f32.")
            writer.write_tensor_data(packed)


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """Give a hidden file beside ``path`` and rename it when it is whole.

    Raises:
        ValueError: If ``path`` exists.
    """
    if path.exists():
        raise ValueError(f"{str(path)!r} exists already. Write another name; nothing is overwritten.")
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        yield staging
        with open(staging, "rb+") as stream:
            os.fsync(stream.fileno())
        os.rename(staging, path)
    finally:
        staging.unlink(missing_ok=True)
