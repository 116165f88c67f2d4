"""What a checkpoint says of the module that made it besides its tensors, and whether another module may take it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import lightning as L
from lightning.fabric.utilities.cloud_io import _load
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import BitsAndBytesConfig

from lightning_qlora.checkpoints.identity import changes_base
from lightning_qlora.model import Quantization, resolve_quantization

__all__ = [
    "allowed_by_callbacks",
    "arguments_for",
    "check_adapter_keys",
    "check_lora",
    "check_optimizer",
    "check_quantization",
    "name_optimizer",
    "plain_lora",
    "plain_quantization",
    "read_record",
]

# What the same tensors compute depends on these; what is missing of the others shows in the tensors' names.
_LORA_OPTIONS = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
_QUANTIZATION_OPTIONS = ("load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")


# Plain values, since checkpoints are read without pickle


def plain_lora(lora: PeftConfig) -> dict[str, Any]:
    """Return PEFT's configuration as JSON has it: sets as sorted lists, enumerations as their values."""
    return dict(_plain(lora.to_dict()))


def plain_quantization(quantization: Quantization) -> str | dict[str, Any] | None:
    """Return a quantization as its name or its options."""
    return _plain(quantization.to_dict()) if isinstance(quantization, BitsAndBytesConfig) else quantization


def name_optimizer(optimizer: Optimizer, scheduler: LRScheduler | None) -> dict[str, str | None]:
    """Return the classes whose states a checkpoint holds."""
    return {
        "optimizer": _class_name(optimizer),
        "lr_scheduler": None if scheduler is None else _class_name(scheduler),
    }


def _recorded_arguments(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a module that the record of a checkpoint holds; older ones hold none."""
    arguments: dict[str, Any] = {}
    if record.get("lora") is not None:
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[record["lora"]["peft_type"]]
        known = {field.name for field in fields(kind) if field.init} - {"peft_type"}
        arguments["lora"] = kind(**{name: value for name, value in record["lora"].items() if name in known})
    if "quantization" in record:
        saved = record["quantization"]
        arguments["quantization"] = BitsAndBytesConfig.from_dict(dict(saved)) if isinstance(saved, Mapping) else saved
    return arguments


def arguments_for(kind: type, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded arguments that a module's class can be given.

    A subclass of somebody else that does not name them may hand on its own in their place.
    """
    is_own = kind.__init__.__module__.startswith(__name__.partition(".")[0] + ".")  # type: ignore[misc]
    named = inspect.signature(kind).parameters
    return {name: value for name, value in _recorded_arguments(record).items() if is_own or name in named}


def read_record(path: Any, key: str, *, weights_only: bool | None) -> dict[str, Any]:
    """Read what a file or an open stream holds under a key, nothing if it lacks it; a stream is wound back."""
    checkpoint = _load(path, map_location="cpu", weights_only=weights_only)
    if hasattr(path, "seek"):
        path.seek(0)
    return checkpoint.get(key) or {}


def _plain(options: Any) -> Any:
    return json.loads(json.dumps(options, default=_plain_object))


def _plain_object(value: object) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _class_name(made: object) -> str:
    kind = type(made)
    return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"


# Whether they agree; what a record does not hold is passed over


def allowed_by_callbacks(trainer: L.Trainer | None) -> set[str]:
    """Return what the trainer's callbacks let a checkpoint differ in, as AdapterCheckpoint does."""
    callbacks = trainer.callbacks if trainer is not None else ()  # type: ignore[attr-defined]
    return {name for callback in callbacks for name in getattr(callback, "allow_mismatch", ())}


def check_adapter_keys(record: Mapping[str, Any], here: frozenset[str]) -> None:
    """Refuse a checkpoint of other adapters; non-strict loading alone would accept one without a single match."""
    saved = frozenset(record["adapter_keys"])
    if saved != here:
        missing, extra = sorted(here - saved), sorted(saved - here)
        raise ValueError(
            f"The checkpoint's adapters are not this run's: {len(missing)} tensors are missing in it"
            f"{_example(missing)}, {len(extra)} are left over{_example(extra)}. Use the lora options and the base "
            f"({record['model_name']!r}) that it was trained with."
        )


def check_lora(record: Mapping[str, Any], lora: PeftConfig) -> None:
    """Refuse adapters of the same names that another configuration made."""
    if record.get("lora") is None:
        return
    saved, here = (_meaning(options) for options in (record["lora"], plain_lora(lora)))
    changed = [name for name in saved if name in here and saved[name] != here[name]]
    if changed:
        raise MisconfigurationException(
            f"The checkpoint's adapters were trained with {_listed(saved, changed)}; this run's have "
            f"{_listed(here, changed)}. They would compute something else. Write the lora options of the checkpoint."
        )


def check_quantization(record: Mapping[str, Any], quantization: Quantization) -> None:
    """Refuse a base that is stored otherwise than the one that the adapters were trained on."""
    if "quantization" not in record:
        return
    saved = _recorded_arguments({"quantization": record["quantization"]})["quantization"]
    if _storage(saved) != _storage(quantization):
        raise MisconfigurationException(
            f"The checkpoint was trained on a base with quantization={record['quantization']}; this run has "
            f"quantization={plain_quantization(quantization)}. Write that of the checkpoint, or "
            "allow_mismatch: [quantization] to go on all the same."
        )


def check_optimizer(saved: Mapping[str, str | None] | None, here: Mapping[str, str | None] | None) -> None:
    """Refuse to go on with an optimizer or a schedule that cannot take up the checkpoint's state."""
    if saved is None or here is None or saved == here:
        return
    changed = [name for name in here if saved.get(name) != here[name]]
    raise MisconfigurationException(
        f"The checkpoint was made with {_listed(saved, changed)}; this run has {_listed(here, changed)}, which cannot "
        "go on from its state. Write those of the checkpoint. To train its adapters on with another optimizer or "
        "schedule, start a run without ckpt_path and with model.adapter=FOLDER, what AdapterCheckpoint has published."
    )


def _meaning(lora: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that decide what adapters compute, and how the base was changed to begin with."""
    options = {name: lora[name] for name in _LORA_OPTIONS if name in lora}
    start = str(lora.get("init_lora_weights")).lower() if changes_base(lora) else True
    return options | ({"init_lora_weights": start} if "init_lora_weights" in lora else {})


def _storage(quantization: Quantization) -> dict[str, Any] | None:
    config = resolve_quantization(quantization)
    return None if config is None else {name: getattr(config, name) for name in _QUANTIZATION_OPTIONS}


def _listed(options: Mapping[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name}={options.get(name)}" for name in names)


def _example(names: list[str]) -> str:
    return f" (for instance {names[0]})" if names else ""
