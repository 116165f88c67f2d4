"""What an adapter belongs to: its base, quantisation, tokenizer, template and data, and whether two agree.

An adapter is a difference. Added to another base, to the same base quantised otherwise, or fed by another template,
it loads without complaint and answers worse. Its identity is recorded when it is published and compared whenever it
is loaded: what differs is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Collection, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from lightning_qlora.checkpoints.publishing import Published, read_manifest, verify
from lightning_qlora.ranks import agree

__all__ = [
    "FIELDS",
    "Difference",
    "IdentityMismatchError",
    "TensorDigest",
    "changes_base",
    "check_adapter",
    "differences",
    "identify",
    "identify_base",
    "identify_tokenizer",
    "package_versions",
    "refuse_differences",
]

FIELDS = ("base", "quantization", "adapter", "tokenizer", "chat_template", "data")
"""The parts of an identity, by the names that an override takes."""

_PACKAGES = ("lightning_qlora", "torch", "transformers", "peft", "bitsandbytes", "lightning", "datasets")
_ARCHITECTURE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# What says where an adapter's file came from rather than what it does to the base.
_VOLATILE_ADAPTER_OPTIONS = frozenset(
    {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "init_lora_weights"}
    | {"loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config", "megatron_core"}
)
# The compute dtype follows the hardware; the rest of these are not about weights.
_VOLATILE_QUANTIZATION_OPTIONS = frozenset(
    {"bnb_4bit_compute_dtype", "_load_in_4bit", "_load_in_8bit", "llm_int8_enable_fp32_cpu_offload"}
)
_CHECKSUM_WORDS = 1 << 22  # 32 MiB at a time


class Difference(NamedTuple):
    """One thing that two identities disagree on.

    Attributes:
        field: Its dotted name; the part before the first dot is one of :data:`FIELDS`.
        recorded: What the checkpoint was made with.
        found: What is here now.
    """

    field: str
    recorded: Any
    found: Any

    def __str__(self) -> str:
        return f"{self.field}: published with {_short(self.recorded)}, found {_short(self.found)}"


class IdentityMismatchError(ValueError):
    """An adapter was about to be loaded where it does not belong."""


# Recording


def identify(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data_fingerprint: str | None = None,
    *,
    gather: bool = False,
) -> dict[str, Any]:
    """Describe what a model with adapters is made of, as plain JSON values.

    Args:
        model: The ``PeftModel``, or the base alone.
        tokenizer: The tokenizer with its chat template.
        data_fingerprint: Names the prepared training data.
        gather: Whether every rank is here, so that tensors they share can be made whole, one at a time.
    """
    return {
        **identify_base(model, gather=gather),
        "adapter": _adapter_options(model) if isinstance(model, PeftModel) else None,
        **identify_tokenizer(tokenizer),
        "data": data_fingerprint,
    }


def identify_base(model: nn.Module, *, gather: bool = False) -> dict[str, Any]:
    """Describe the base under a model: its name, the commit it came from, digests of its tensors, its quantisation.

    The tensors are read once, on their device, as they lie there; nothing is copied to the host but 8 bytes each.
    Those that are not quantised are compared as bfloat16, so that a base loaded in another dtype is the same base.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config = getattr(base, "config", None)
    quantization = getattr(config, "quantization_config", None)
    plain, quantized, device = _digest_tensors(model, gather)
    return {
        "base": {
            "name": getattr(config, "_name_or_path", None) or None,
            "revision": getattr(config, "_commit_hash", None),
            **{name: getattr(config, name, None) for name in _ARCHITECTURE},
            "tensors": plain,
            "quantized_tensors": quantized,
            "quantizer": f"{_version('bitsandbytes')} on {device}" if quantized else None,
        },
        "quantization": _quantization_options(quantization),
    }


def identify_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """Digest a tokenizer's vocabulary and rules, and its chat template."""
    if tokenizer is None:
        return {"tokenizer": None, "chat_template": None}
    template = tokenizer.chat_template
    return {
        "tokenizer": _sha256(_tokenizer_rules(tokenizer)),
        "chat_template": None if template is None else _sha256(template),
    }


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _quantization_options(config: Any) -> dict[str, Any] | None:
    if config is None:
        return None
    options = config if isinstance(config, Mapping) else config.to_dict()
    return {key: _plain(value) for key, value in options.items() if key not in _VOLATILE_QUANTIZATION_OPTIONS}


def _adapter_options(model: PeftModel) -> dict[str, Any]:
    name = "default" if "default" in model.peft_config else next(iter(model.peft_config))
    options: dict[str, Any] = model.peft_config[name].to_dict()
    return {key: _plain(value) for key, value in options.items() if key not in _VOLATILE_ADAPTER_OPTIONS}


def _tokenizer_rules(tokenizer: PreTrainedTokenizerBase) -> Any:
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # Calls that pad or cut leave their settings behind.
        return {name: value for name, value in rules.items() if name not in ("padding", "truncation")}
    return {"vocabulary": tokenizer.get_vocab(), "special": tokenizer.all_special_tokens}


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Turn option objects into what JSON holds, sets in order."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    return str(getattr(value, "value", value))


# Tensors


def _digest_tensors(model: nn.Module, gather: bool) -> tuple[str | None, str | None, str]:
    """Digest the base's tensors: those kept as numbers, those packed by quantisation; and name their device."""
    digest = TensorDigest()
    for name, parameter in _base_parameters(model):
        if isinstance(parameter, DTensor):
            if not gather:
                return None, None, digest.device  # a shard says nothing about the whole; names and options still do
            constants = {key: value for key, value in vars(parameter).items() if key == "quant_state"}
            agree()
            parameter = parameter.full_tensor()
            vars(parameter).update(constants)
        digest.add(name, parameter)
    return digest.plain, digest.packed, digest.device


class TensorDigest:
    """Digests of a base whose tensors come one at a time, in any order.

    Attributes:
        device: Where the last tensor was.
    """

    def __init__(self) -> None:
        self.device = "cpu"
        self._lines: tuple[dict[str, bytes], dict[str, bytes]] = ({}, {})

    def add(self, name: str, parameter: Tensor) -> None:
        """Take one parameter, by the name that it has without adapters."""
        self.device = parameter.device.type
        is_packed = hasattr(parameter, "quant_state") or not parameter.is_floating_point()
        tensors = _packed_tensors(parameter) if is_packed else [parameter.detach().to(torch.bfloat16)]
        checksums = [_checksum(tensor) for tensor in tensors]
        self._lines[is_packed][name] = f"{name} {_logical_shape(parameter)} {checksums}\n".encode()

    @property
    def plain(self) -> str:
        """Of those that are kept as numbers."""
        return self._hexdigest(self._lines[False])

    @property
    def packed(self) -> str | None:
        """Of those that quantisation packed; ``None`` if there are none."""
        return self._hexdigest(self._lines[True]) if self._lines[True] else None

    @staticmethod
    def _hexdigest(lines: Mapping[str, bytes]) -> str:
        return hashlib.sha256(b"".join(lines[name] for name in sorted(lines))).hexdigest()


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the base's own parameters by the names they have without adapters."""
    markers: tuple[str, ...] = ()
    trained_biases = False
    if isinstance(model, PeftModel):
        markers = (f".{model.base_model.prefix}", ".modules_to_save.", ".trainable_tokens_")
        trained_biases = any(getattr(config, "bias", "none") != "none" for config in model.peft_config.values())
    found = {}
    for name, parameter in model.named_parameters():
        if any(marker in name for marker in markers) or (trained_biases and name.endswith(".bias")):
            continue
        name = name.removeprefix("base_model.model.") if isinstance(model, PeftModel) else name
        found[re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.)", "", name)] = parameter
    yield from sorted(found.items())


def _packed_tensors(parameter: Tensor) -> list[Tensor]:
    """The bytes of a quantised weight and the scales that give them their meaning."""
    tensors = [parameter.detach()]
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        tensors.append(state.absmax)
        state = getattr(state, "state2", None)
    scales = getattr(parameter, "SCB", None)
    return tensors if scales is None else [*tensors, scales]


def _logical_shape(parameter: Tensor) -> list[int]:
    state = getattr(parameter, "quant_state", None)
    return list(parameter.shape if state is None else state.shape)


def _checksum(tensor: Tensor) -> int:
    """Sum the 64-bit words of a tensor, each weighted by its place, modulo 2**64.

    It runs where the tensor is, at the speed of its memory, and comes out the same on every device, since integer
    addition has no order. It tells any accidental change; it is no defence against a forger, whom the SHA-256 digests
    of the adapter's files do not stop either.
    """
    data = tensor.contiguous().view(-1).view(torch.uint8)
    if data.numel() % 8:
        data = nn.functional.pad(data, (0, 8 - data.numel() % 8))
    words, total = data.view(torch.int64), torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), _CHECKSUM_WORDS):
        part = words[start : start + _CHECKSUM_WORDS] * 0x1E3779B97F4A7C15
        place = torch.arange(start, start + part.numel(), device=tensor.device)
        total += ((part ^ (part >> 32)) * (2 * place + 1)).sum()
    return int(total) & (2**64 - 1)


# Comparing


def differences(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[Difference]:
    """List what two identities disagree on; what either does not know is passed over.

    The base's name and commit count only where there are no tensor digests to compare: the same base may lie in
    another folder. Quantised bytes are compared only if the same quantiser made them: bitsandbytes rounds a few
    values otherwise on another device.
    """
    result: list[Difference] = []
    for field in FIELDS:
        result += _compare(field, recorded.get(field), found.get(field))
    here = {difference.field for difference in result}
    digests = [side.get("base", {}).get("tensors") for side in (recorded, found)]
    passed_over = {"base.quantizer"}
    if None not in digests:
        passed_over |= {"base.name", "base.revision"}
    if "base.quantizer" in here:
        passed_over |= {"base.quantized_tensors"}
    return [difference for difference in result if difference.field not in passed_over]


def _compare(field: str, recorded: Any, found: Any) -> list[Difference]:
    if recorded is None or found is None:
        # Quantised or not is itself a difference; the rest may simply not be known on one side.
        return [Difference(field, recorded, found)] if field == "quantization" and recorded != found else []
    if isinstance(recorded, Mapping) and isinstance(found, Mapping):
        keys = dict.fromkeys([*recorded, *found])
        return [
            difference
            for key in keys
            if key in recorded and key in found
            for difference in _compare_option(f"{field}.{key}", recorded[key], found[key])
        ]
    return [] if recorded == found else [Difference(field, recorded, found)]


def _compare_option(field: str, recorded: Any, found: Any) -> list[Difference]:
    if field.startswith("base.") and (recorded is None or found is None):
        return []
    return [] if recorded == found else [Difference(field, recorded, found)]


def refuse_differences(
    what: str, recorded: Mapping[str, Any], found: Mapping[str, Any], allow: Collection[str] = ()
) -> None:
    """Refuse an adapter that belongs elsewhere.

    Args:
        what: The folder, for the message.
        recorded: The identity in its manifest.
        found: The identity of what it is about to be loaded into.
        allow: Those of :data:`FIELDS` that may differ.

    Raises:
        IdentityMismatchError: With every field that differs, and how to override.
        ValueError: If ``allow`` names something else.
    """
    unknown = sorted(set(allow).difference(FIELDS))
    if unknown:
        raise ValueError(f"allow_mismatch names {', '.join(unknown)}; allowed are {', '.join(FIELDS)}.")
    refused = [item for item in differences(recorded, found) if item.field.partition(".")[0] not in allow]
    if refused:
        fields = sorted({item.field.partition(".")[0] for item in refused})
        raise IdentityMismatchError(
            f"{what} does not belong here:\n"
            + "\n".join(f"  {item}" for item in refused)
            + f"\nUse what it was made with. To load it all the same, write allow_mismatch: [{', '.join(fields)}]."
        )


def check_adapter(
    folder: str | Path,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    allow: Collection[str] = (),
) -> Published | None:
    """Verify a published adapter folder and refuse it if it belongs to another base, tokenizer or template.

    Where ranks share the base, all of them call this.

    An adapter that :func:`changes_base` was published with the base as it had left it. Loading it does the same again,
    so the tensors that it moves can only be compared afterwards: check such a one once more on the loaded model.

    Args:
        folder: What ``AdapterCheckpoint`` published, or any PEFT folder.
        model: The base that it is to be loaded into, or the model that it has been loaded into.
        tokenizer: The tokenizer in use.
        allow: Those of :data:`FIELDS` that may differ.

    Returns:
        Its manifest, or ``None`` for a PEFT folder that others wrote, of which nothing can be proved.

    Raises:
        DamagedCheckpointError: If a file is missing, cut or changed.
        IdentityMismatchError: If it belongs elsewhere.
    """
    if read_manifest(folder) is None:
        return None
    published = verify(folder)
    recorded = published.metadata.get("identity")
    if recorded is not None:
        found = identify(model, tokenizer, gather=True)
        if not isinstance(model, PeftModel) and changes_base(PeftConfig.from_pretrained(str(folder))):
            found["base"]["tensors" if found["quantization"] is None else "quantized_tensors"] = None
        refuse_differences(f"The adapter in {str(folder)!r}", recorded, found, allow)
    return published


def changes_base(adapter: PeftConfig | Mapping[str, Any]) -> bool:
    """Whether an adapter's initialisation moves a part of the base into it, so that without it there is no base.

    Args:
        adapter: Its configuration, or the options of ``adapter_config.json``.
    """
    options = adapter if isinstance(adapter, Mapping) else vars(adapter)
    init = options.get("init_lora_weights")
    return isinstance(init, str) and init.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    if re.fullmatch(r"[0-9a-f]{64}", text):
        return text[:12]
    return text if len(text) <= 80 else text[:77] + "..."
