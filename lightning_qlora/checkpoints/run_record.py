"""What a checkpoint says of the run that made it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.cli import SaveConfigCallback

from lightning_qlora.checkpoints.adapter_folder import find_peft_model
from lightning_qlora.checkpoints.identity import identify, package_versions
from lightning_qlora.redaction import scrub
from lightning_qlora.schema import ChatDataModule

__all__ = ["describe_run", "identify_run", "plain_values", "stop_tokens_of", "tokenizer_of"]


def tokenizer_of(trainer: L.Trainer) -> Any:
    """Return the tokenizer of the data module or of the module; ``None`` where neither has one."""
    for owner in (_data_module(trainer), trainer.lightning_module):
        tokenizer = getattr(owner, "tokenizer", None)
        if hasattr(tokenizer, "save_pretrained"):
            return tokenizer
    return None


def stop_tokens_of(trainer: L.Trainer) -> tuple[int, ...]:
    """Return the terminators that the data supervises."""
    data = _data_module(trainer)
    return tuple(data.stop_token_ids) if isinstance(data, ChatDataModule) else ()


def identify_run(trainer: L.Trainer) -> dict[str, Any]:
    """Describe what the run's adapter belongs to (:mod:`lightning_qlora.checkpoints.identity`)."""
    _, model = find_peft_model(trainer.lightning_module)
    return identify(model, tokenizer_of(trainer), getattr(_data_module(trainer), "fingerprint", None))


def describe_run(trainer: L.Trainer) -> dict[str, Any]:
    """Return step, metrics, versions, configuration and data, without secrets, as plain JSON values."""
    continued_from = getattr(trainer.lightning_module, "adapter_folder", None)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
    return {
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
        "world_size": trainer.world_size,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": package_versions(),
        "config": scrub(plain_values(_configuration(trainer))),
        "continued_from": None if continued_from is None else str(continued_from),  # which of a run's checkpoints
        "data": scrub(_data_counts(_data_module(trainer))),
    }


def _configuration(trainer: L.Trainer) -> dict[str, Any]:
    """Return the options of module and data, and all that LightningCLI was given where it began the run."""
    config = {
        "module": trainer.lightning_module.hparams,
        "data": getattr(_data_module(trainer), "hparams", {}),
    }
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    saver = next((c for c in callbacks if isinstance(c, SaveConfigCallback)), None)
    return config if saver is None else {**config, "command_line": saver.config}


def _data_counts(data_module: Any) -> dict[str, Any]:
    """Count the rows and tokens of each stage, by the reports that the package's data modules keep."""
    return {
        stage: {
            "rows": report.rows_kept,
            "refused": report.rows_read - report.rows_kept,
            "tokens": report.num_tokens,
            "supervised_tokens": report.num_supervised_tokens,
            "sources": [source.name for source in report.sources],
        }
        for stage, report in getattr(data_module, "reports", {}).items()
    }


def _data_module(trainer: L.Trainer) -> Any:
    return getattr(trainer, "datamodule", None)


def plain_values(value: Any) -> Any:
    """Turn options into what JSON and pickle-free checkpoints hold; objects into their text."""
    if isinstance(value, Namespace):
        value = value.as_dict()
    elif is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain_values(item) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    return str(value)
