"""Whether fit computes what plain code does: its first step, and many steps one after the other.

Plain is transformers' model and PEFT's adapters as they are: a document at a time, nothing packed, fused or compiled.
"""

from __future__ import annotations

import argparse
import gc
from contextlib import nullcontext
from typing import Any, NamedTuple

import bitsandbytes
import lightning as L
import torch
from bitsandbytes.nn import Linear4bit
from cases import SHAPES, case_of, largest_distance
from fits import Batches, Clock, dtype_on, lora_of, make_module, make_trainer
from peft import PeftModel
from random_base import random_base
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from typing_extensions import override

from lightning_qlora.kernels.checkpointing import Plan
from lightning_qlora.kernels.compilation import compile_decoder
from lightning_qlora.kernels.lora import is_fused
from lightning_qlora.model import attach_adapters, checkpointed_layers, set_activation_checkpointing

Adapters = dict[str, Tensor]


class Step(NamedTuple):
    """The mean loss of a step, and the gradients of its adapters on the host, in float64."""

    loss: float
    gradients: Adapters


def gate(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the first step with float32 on the dequantised weights, and with plain code in the dtype of fit."""
    batch = _on_device(Batches(case_of(options), 1, SHAPES[options.shape]["vocab_size"]).batches[0], options.device)
    own, adapters, fused = _own_step(options, batch)
    steps = []
    for exact in (False, True):  # one model at a time: in float32 an 8B takes 30 GiB
        free_memory()
        steps.append(_plain_step(options, batch, adapters, exact))
    plain, expected = steps
    difference, cosine = abs(own.loss - expected.loss), _cosine(own, expected)
    return {
        "loss": round(expected.loss, 5),
        "loss_difference": difference,
        "gradient_cosine": cosine,
        "worst_tensor_cosine": _worst_cosine(own, expected),
        "plain_loss_difference": abs(plain.loss - expected.loss),
        "plain_gradient_cosine": _cosine(plain, expected),
        "plain_worst_tensor_cosine": _worst_cosine(plain, expected),
        "cosine_to_plain": _cosine(own, plain),
        "fused": fused,
        "passed": difference <= 1e-3 and cosine >= 0.999,  # NaN never passes
    }


def _own_step(options: argparse.Namespace, batch: Any) -> tuple[Step, Adapters, bool]:
    """Compute a step as fit does; also return the adapters, and whether they were fused."""
    module: Any = make_module(options)
    module.configure_model()
    if options.compile_layers:  # fit does so once it has chosen a plan
        base = module.model.get_base_model()
        plan, dtype = module.layer_plan or "full", dtype_on(torch.device(options.device))
        compile_decoder(base, checkpointed_layers(base), plan, dtype=dtype)
    rehearsals = 2 if options.cuda_graphs == "true" and options.device == "cuda" else 0
    if rehearsals:  # fit does so when it starts
        module._supervised_forward.record(True, module.layer_plan, is_compiled=options.compile_layers)
    for _ in range(1 + rehearsals):
        module.zero_grad()
        loss = _mean_loss(module, batch, options.device)  # whose graph nobody keeps: then it could not be recorded
    assert module.graph_replays == bool(rehearsals)
    step = Step(loss, _gradients(module.model))
    return step, _adapters(module.model), is_fused(module)


def _mean_loss(module: Any, batch: Any, device: str) -> float:
    """Compute gradients and return the loss."""
    with _autocast(device):
        loss = module.token_loss(batch)
    loss.loss_sum.backward()
    return float(loss.loss_sum.item() / loss.num_tokens)


def _plain_step(options: argparse.Namespace, batch: Any, adapters: Adapters, exact: bool) -> Step:
    model = plain_model(options, adapters, exact)
    with nullcontext() if exact else _autocast(options.device):
        loss = plain_backward(model, batch)
    return Step(loss, _gradients(model))


def _on_device(batch: Any, device: str) -> Any:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _autocast(device: str) -> Any:
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()


def _adapters(model: PeftModel) -> Adapters:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def _gradients(model: PeftModel) -> Adapters:
    return {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}


def _cosine(one: Step, two: Step) -> float:
    assert one.gradients.keys() == two.gradients.keys()
    flat = (torch.cat([step.gradients[name].flatten() for name in two.gradients]) for step in (one, two))
    return cosine_similarity(*flat, 0).item()


def _worst_cosine(one: Step, two: Step) -> float:
    each = (cosine_similarity(one.gradients[n].flatten(), g.flatten(), 0) for n, g in two.gradients.items())
    return min(each).item()


def free_memory() -> None:
    """Give back what nobody refers to any more."""
    gc.collect()  # compiled layers refer to themselves
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# Plain code


def plain_model(options: argparse.Namespace, adapters: Adapters, exact: bool = False, plan: Plan = "full") -> PeftModel:
    """Return the same base with these adapters; ``exact`` with its weights dequantised to float32."""
    device = torch.device(options.device)
    base: Any = random_base(options.shape, device, dtype_on(device))
    if exact:
        _dequantise(base)
    base.set_attn_implementation("sdpa")
    set_activation_checkpointing(base, plan)
    model = attach_adapters(base, lora_of(options))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(adapters[name])
    return model


def _dequantise(base: Any) -> None:
    for parent in list(base.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear4bit):
                weight = bitsandbytes.functional.dequantize_4bit(child.weight.data, child.weight.quant_state)
                linear = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
                linear.weight = nn.Parameter(weight.float(), requires_grad=False)
                setattr(parent, name, linear)
    del base.config.quantization_config
    base.is_quantized = base.is_loaded_in_4bit = False
    base.float()


def plain_backward(model: PeftModel, batch: Any) -> float:
    """Add up the gradients of the summed loss, a document at a time; return the mean loss."""
    start, total = 0, 0.0
    for length in batch["document_lengths"]:
        ids, labels = (batch[name][:, start : start + length] for name in ("input_ids", "labels"))
        logits = model(input_ids=ids, use_cache=False).logits.float()
        loss = nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
        loss.backward()
        total, start = total + loss.item(), start + length
    return total / batch["targets"].numel()


# Many steps

DISTINCT_TOKENS = 64


class Start(L.Callback):
    """Keeps the adapters as they are before the first step."""

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.adapters = _adapters(pl_module.model)


def curve(options: argparse.Namespace) -> dict[str, Any]:
    """Train with fit, with plain code and with float32, and compare the losses.

    Tokens are few different ones that mostly follow from one another, so that the losses fall by much. Of few batches,
    seen again and again, the others are learned by heart, which rounding sends down another path each time: how far
    plain code gets from float32 on the dequantised weights says what a distance means.
    """
    distinct = options.batches or options.steps
    data = Batches(case_of(options), distinct, DISTINCT_TOKENS, learnable=True)
    data.batches = [data.batches[step % distinct] for step in range(options.steps)]
    start, clock, module = Start(), Clock(options.device == "cuda"), make_module(options)
    make_trainer(options, options.steps, [start, clock]).fit(module, data)
    own = [loss.item() for loss in clock.losses]
    make_optimizer, plan, fused = module.optimizer, str(clock.plan), clock.fused
    del module, clock
    plain: list[float] = []
    exact: list[float] = []
    for losses, is_exact in ((plain, False), (exact, True)):
        free_memory()
        losses += _plain_losses(options, data.batches, start.adapters, make_optimizer, is_exact)
    return {
        "plan_used": plan,
        "fused": fused,
        "losses": [round(loss, 4) for loss in own],
        "plain_losses": [round(loss, 4) for loss in plain],
        "exact_losses": [round(loss, 4) for loss in exact],
        "largest_distance": largest_distance(own, plain),
    }


def _plain_losses(
    options: argparse.Namespace, batches: list[Any], adapters: Adapters, make_optimizer: Any, exact: bool
) -> list[float]:
    model = plain_model(options, adapters, exact, plan="none")  # of a small model, by default, and not twice as slow
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(trained)
    for group in optimizer.param_groups:
        group["lr"] = options.lr
    losses = []
    for batch in batches:
        with nullcontext() if exact else _autocast(options.device):
            losses.append(plain_backward(model, _on_device(batch, options.device)))
        for parameter in trained:
            parameter.grad /= batch["targets"].numel()
        optimizer.step()
        optimizer.zero_grad()
    return losses
