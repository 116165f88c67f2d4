"""Why DeepSpeed is refused, shown on two CPU processes where it is installed (DS_ACCELERATOR=cpu is set here)."""

import sys

import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy
from tiny_models import save_tiny_model
from tiny_ranks import run_ranks
from tiny_run import TinyData, tiny_module, tiny_trainer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class OnCPU(DeepSpeedStrategy):
    """DeepSpeed wants devices with an index, which Lightning's CPUs do not have."""

    @property
    def root_device(self):
        return torch.device("cpu", self.local_rank)


class Gradients(L.Callback):
    """How many there are when Lightning says that the optimizer is about to step."""

    def __init__(self):
        self.counts = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.counts.append(sum(p.grad is not None for p in module.parameters()))


@pytest.fixture
def deepspeed_on_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    monkeypatch.setattr(sys.modules["deepspeed.comm.torch"], "build_shm_op", lambda: None)  # it would be compiled
    monkeypatch.setattr("lightning.pytorch.strategies.deepspeed.CUDAAccelerator", CPUAccelerator)
    monkeypatch.setattr("lightning.pytorch.strategies.deepspeed._validate_device_index_selection", lambda _: None)
    monkeypatch.setattr("lightning_qlora.modules.base.check_strategy", lambda _: None)


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_are_gone_before_they_can_be_divided(deepspeed_on_cpu, tmp_path, stage):
    """So that a step is that of summed losses, not of their mean, and is clipped as such."""
    base = save_tiny_model(tmp_path / "base")

    def train(strategy):
        L.seed_everything(0)
        gradients, module = Gradients(), tiny_module(base, dropout=0.0, lr_scheduler=None)
        options = {"enable_checkpointing": False, "max_epochs": 1, "strategy": strategy, "devices": 2}
        tiny_trainer(tmp_path, gradients, **options).fit(module, datamodule=TinyData(batches=4))
        return {"counts": gradients.counts, "trained": sum(p.requires_grad for p in module.parameters())}

    for found in run_ranks(tmp_path / "ddp", lambda: train("ddp_qlora")):
        assert found["counts"] == [found["trained"]] * 2
    make = lambda: OnCPU(stage=stage, process_group_backend="gloo", logging_batch_size_per_gpu=1)  # noqa: E731
    for found in run_ranks(tmp_path / "deepspeed", lambda: train(make())):
        assert found["counts"] == [0, 0]
