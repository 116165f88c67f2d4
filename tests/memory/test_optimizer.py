from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from torch import nn, optim

from lightning_qlora.memory import OptimizerMemory, build_optimizer, optimizer_memory

SHAPES = ((16, 512), (100, 8), (700,))
NUMEL = sum(torch.Size(shape).numel() for shape in SHAPES)

OPTIMIZERS = {
    "AdamW": optim.AdamW,
    "AdamW fused": lambda params: optim.AdamW(params, fused=True),
    "AdamW amsgrad": lambda params: optim.AdamW(params, amsgrad=True),
    "SGD": optim.SGD,
    "SGD momentum": lambda params: optim.SGD(params, momentum=0.9),
    "RMSprop": lambda params: optim.RMSprop(params, centered=True, momentum=0.9),
    "Adagrad": optim.Adagrad,
    "NAdam": optim.NAdam,
    "RAdam": optim.RAdam,
    "AdamW8bit": bnb.optim.AdamW8bit,
    "PagedAdamW8bit": bnb.optim.PagedAdamW8bit,
    "AdamW 32 bits": bnb.optim.AdamW,
    "Lion8bit": bnb.optim.Lion8bit,
    "AdEMAMix8bit": bnb.optim.AdEMAMix8bit,
}


class Parameters(nn.Module):
    def __init__(self):
        super().__init__()
        self.list = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in SHAPES)
        self.frozen = nn.Parameter(torch.zeros(1000), requires_grad=False)


def real_state_bytes(optimizer):
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_what_a_real_step_leaves(name):
    model = Parameters()
    built = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
    planned = optimizer_memory(build_optimizer(OPTIMIZERS[name], model), on_gpu=False)
    before = optimizer_memory(built, on_gpu=False)
    assert "step" not in built.state.get(model.list[0], {}) or name == "Adagrad"

    for parameter in model.list:
        parameter.grad = torch.randn_like(parameter)
    built.step()

    assert planned.state == before.state == real_state_bytes(built)
    assert optimizer_memory(built).state == planned.state  # one that is restored holds it already


def test_paged_state_is_told_apart():
    model = nn.Linear(1000, 200)

    memory = optimizer_memory(build_optimizer(bnb.optim.PagedAdamW8bit, model))

    absmax = 2 * 4 * -(200_000 // -256)
    assert memory.paged == 2 * 200_000 + absmax + 2 * 4 * 256
    assert memory.state == 8 * 200  # the bias is too small to be paged, and to be quantised


def test_scratch_of_a_step_over_all_parameters_at_once():
    model = Parameters()
    assert optimizer_memory(build_optimizer(optim.AdamW, model)).scratch == 4 * NUMEL
    assert optimizer_memory(build_optimizer(OPTIMIZERS["AdamW fused"], model)).scratch == 0


def test_an_optimizer_that_needs_numbers_is_taken_for_two_moments():
    assert optimizer_memory(build_optimizer(optim.Adafactor, Parameters())) == OptimizerMemory(8 * NUMEL)


def test_a_schedule_on_the_optimizer_changes_nothing_and_is_not_stepped():
    optimizer = optim.AdamW([nn.Parameter(torch.zeros(100, 10))], lr=1e-3)
    plain = optimizer_memory(optimizer)
    schedule = optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    assert optimizer_memory(optimizer) == plain
    assert plain.state > 8 * 1000
    assert not getattr(schedule.optimizer, "_opt_called", False)
    assert not optimizer.state
