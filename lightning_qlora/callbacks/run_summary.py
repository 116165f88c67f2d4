"""What a run is about to do, before it does it."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from typing_extensions import override

from lightning_qlora.accounting import Storage, count_storage
from lightning_qlora.data.report import PreparationReport
from lightning_qlora.memory import SimulationError, free_memory, memory_of_run
from lightning_qlora.modules.steps import accumulations, count_steps

__all__ = ["RunSummary"]

_MIB, _GIB = 2**20, 2**30
_TITLE_WIDTH = 14

_MOMENTS = {
    "loading": "while the base is loaded",
    "forward": "in the forward pass",
    "head": "at the head and the loss",
    "backward": "in the backward pass",
    "optimizer": "in the optimizer's step",
}


class RunSummary(ModelSummary):
    """Prints at the start of fit what will be trained, on what, and what it will take.

    The base and its revision, parameters and bytes by how they are stored (4-bit ones counted unpacked), quantisation,
    adapters, the data with every refused row's reason, and an estimate of the memory, with a warning where activations
    are to wait in host memory that is not there; then, once the loaders are there, the optimizer steps. It takes the
    place of Lightning's ModelSummary, which counts two 4-bit weights as one.

    Args:
        max_depth: Depth of a table of layers printed besides, as in Lightning's ModelSummary; 0 for none.
    """

    def __init__(self, max_depth: int = 0) -> None:
        super().__init__(max_depth=max_depth)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        model = getattr(pl_module, "model", None)
        model = model if isinstance(model, nn.Module) else pl_module
        rows = [*_describe_model(pl_module, model, count_storage(model)), ("Precision", str(trainer.precision))]
        reports = _reports(trainer)
        for stage, report in reports.items():
            rows += _describe_data(report) if stage == "train" else [(stage.capitalize(), _describe_rows(report))]
        if "train" in reports and isinstance(model, PeftModel):
            rows.append(
                ("Memory", _describe_memory(trainer, pl_module, model, _tokens_per_batch(trainer, reports["train"])))
            )
        print("\n".join(_lay_out(title, text) for title, text in rows), flush=True)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the plan of steps.

        Only now: asked before the loaders exist, Lightning would build them, and a resumed run would lose its place in
        the data (Lightning-AI/pytorch-lightning#20550).
        """
        if not trainer.is_global_zero:
            return
        report = _reports(trainer).get("train")
        if report is not None and report.packing:
            batches, tokens = report.packing["batches"], report.packing["tokens_per_batch"]
            full = 100 * report.packing["efficiency"]
            print(_lay_out("Batches", f"{batches:,.0f} of about {tokens:,.0f} tokens, {full:.1f} % full"))
        print(_lay_out("Steps", _describe_steps(trainer)), flush=True)


def _reports(trainer: L.Trainer) -> dict[str, PreparationReport]:
    """Return what the data module says of each stage's rows; nothing where it is not ours."""
    reports = getattr(getattr(trainer, "datamodule", None), "reports", None) or {}
    return {stage: report for stage, report in reports.items() if isinstance(report, PreparationReport)}


def _describe_model(pl_module: L.LightningModule, model: nn.Module, storages: list[Storage]) -> list[tuple[str, str]]:
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    rows = []
    if (name := getattr(pl_module, "model_name", None)) is not None:
        revision = getattr(pl_module, "revision", None) or getattr(getattr(base, "config", None), "_commit_hash", None)
        kind = next(cls for cls in type(base).__mro__ if not issubclass(cls, FSDPModule))  # what FSDP2 has made it from
        rows.append(("Base", f"{name} ({kind.__name__}{f', revision {revision}' if revision else ''})"))
    numel, nbytes = sum(s.numel for s in storages), sum(s.nbytes for s in storages)
    rows.append(("Parameters", f"{numel:,} in {_size(nbytes)}: {', '.join(map(_storage, storages))}"))
    trainable = sum(s.numel for s in storages if s.trainable)
    rows.append(("Trainable", f"{trainable:,} of {numel:,} ({100 * trainable / max(1, numel):.3g} %)"))
    rows.append(("Quantisation", _describe_quantization(base)))
    if isinstance(model, PeftModel):
        rows.append(("Adapters", _describe_adapters(model.active_peft_config)))
    return rows


def _describe_quantization(base: Any) -> str:
    config = getattr(getattr(base, "config", None), "quantization_config", None)
    if config is None:
        return "none"
    if getattr(config, "load_in_8bit", False):
        return "8-bit (LLM.int8())"
    if not getattr(config, "load_in_4bit", False):
        return type(config).__name__
    double = ", constants quantised too" if config.bnb_4bit_use_double_quant else ""
    dtype = str(config.bnb_4bit_compute_dtype).removeprefix("torch.")
    return f"4-bit {config.bnb_4bit_quant_type.upper()}{double}, computed in {dtype}"


def _describe_adapters(config: PeftConfig) -> str:
    if not isinstance(config, LoraConfig):
        return getattr(config.peft_type, "value", type(config).__name__)
    kind = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    targets = config.target_modules
    # PEFT spells all-linear out, layer by layer.
    named = targets if isinstance(targets, str) else ", ".join(sorted({t.rsplit(".", 1)[-1] for t in targets or ()}))
    parts = [f"{kind} r={config.r} alpha={config.lora_alpha} dropout={config.lora_dropout:g} on {named}"]
    if config.init_lora_weights is not True:
        parts.append(f"initialised by {config.init_lora_weights}")
    if config.modules_to_save:
        parts.append(f"trained in full: {', '.join(config.modules_to_save)}")
    if config.trainable_token_indices:
        parts.append(f"embedding rows trained: {config.trainable_token_indices}")
    return "; ".join(parts)


def _describe_data(report: PreparationReport) -> list[tuple[str, str]]:
    rows = [("Rows", _describe_rows(report))]
    if report.length_percentiles:
        lengths = ", ".join(f"p{p} {tokens:,}" for p, tokens in report.length_percentiles.items())
        rows.append(("Lengths", f"{lengths} tokens"))
    outcomes = {outcome: count for outcome, count in report.truncation.items() if outcome != "fits" and count}
    concerned = ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.items())
    over = f"{sum(outcomes.values()):,} rows above ({concerned})" if outcomes else "no row above"
    rows.append(("Limit", f"{report.max_length:,} tokens: {over}"))
    share = 100 * report.num_supervised_tokens / max(1, report.num_tokens)
    rows.append(("Tokens", f"{report.num_tokens:,}, {report.num_supervised_tokens:,} supervised ({share:.1f} %)"))
    return rows


def _describe_rows(report: PreparationReport) -> str:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.refused.items())
    refused = f"refused: {reasons}" if reasons else "none refused"
    return f"{report.rows_kept:,} kept of {report.rows_read:,} read ({refused})"


def _describe_memory(trainer: L.Trainer, pl_module: L.LightningModule, model: PeftModel, num_tokens: int) -> str:
    """Estimate the peak of a step without running one on the device."""
    plan: Any = getattr(pl_module, "layer_plan", None) or "none"
    recorded = getattr(pl_module, "cuda_graphs", None) is True
    try:
        memory = memory_of_run(trainer, model, trainer.optimizers, recorded=recorded)
        estimate = memory.estimate(num_tokens, plan=plan)
    except SimulationError as error:
        return f"not estimated. {error}"
    names = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "scratch", "workspaces")
    items = ", ".join(f"{name} {_size(getattr(estimate, name))}" for name in names if getattr(estimate, name))
    moves = estimate.host and trainer.strategy.root_device.type == "cuda"
    waiting = _describe_host(estimate.host * trainer.num_devices) if moves else ""
    return (
        f"about {_size(estimate.peak)} at its peak ({_MOMENTS[estimate.moment]}) by estimate, the libraries themselves "
        f"not counted: {items}; activation checkpointing: {plan}{waiting}"
    )


def _describe_host(nbytes: int) -> str:
    """Say what waits on this host, and warn where it has not as much: systems end such a process without a word."""
    free = free_memory(torch.device("cpu"))
    if nbytes > free:
        rank_zero_warn(
            f"Activations of a batch are estimated to take {_size(nbytes)} in this host's memory, of which "
            f"{_size(free)} are free. Where that runs out, the system ends the process. Write fewer tokens per batch "
            "(data.tokens_per_batch or data.max_length), or model.activation_checkpointing: full or selective."
        )
    return f"; {_size(nbytes)} of activations wait in this host's memory, of {_size(free)} free"


def _tokens_per_batch(trainer: L.Trainer, report: PreparationReport) -> int:
    """Return the tokens of one micro-batch, or the most it may have while the batches are not planned yet."""
    if report.packing:
        return int(report.packing["tokens_per_batch"])
    data: Any = getattr(trainer, "datamodule", None)
    return int(getattr(data, "tokens_per_batch", None) or report.max_length)


def _describe_steps(trainer: L.Trainer) -> str:
    total, sizes = count_steps(trainer), " then ".join(map(str, accumulations(trainer)))
    planned = f"{total:,}" if math.isfinite(total) else "until stopped"
    ranks = f" x {trainer.world_size} ranks" if trainer.world_size > 1 else ""
    parts = [f"{planned} optimizer steps of {sizes} micro-batches{ranks}"]
    if math.isfinite(trainer.num_training_batches):
        parts.append(f"{trainer.num_training_batches:,.0f} micro-batches an epoch")
    if trainer.global_step:
        parts.append(f"going on after step {trainer.global_step:,}")
    return ", ".join(parts)


def _storage(storage: Storage) -> str:
    trained = ", trained" if storage.trainable else ""
    return f"{storage.kind}{trained} {storage.numel:,} in {_size(storage.nbytes)}"


def _size(nbytes: float) -> str:
    return f"{nbytes / _GIB:.2f} GiB" if nbytes >= _GIB else f"{nbytes / _MIB:.1f} MiB"


def _lay_out(title: str, text: str) -> str:
    return f"{title.ljust(_TITLE_WIDTH)}{text}"
