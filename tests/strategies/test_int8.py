"""8-bit bases: whole on each rank of DDP, and refused where they would have to be cut up; on gloo processes."""

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_models import save_tiny_model
from tiny_ranks import run_ranks
from tiny_run import TinyData, tiny_module, tiny_trainer

from lightning_qlora.strategies import FSDP2Strategy

pytestmark = pytest.mark.filterwarnings("ignore")  # of the forked processes; nothing here depends on warnings


@pytest.fixture
def base(tmp_path, monkeypatch):
    """The kernels of CPUs are too slow to be offered, and right."""
    monkeypatch.setattr("lightning_qlora.model._check_kernels", lambda config: None)
    return save_tiny_model(tmp_path / "base")


def fit(base, root, strategy="auto", devices=1):
    L.seed_everything(0)
    module = tiny_module(base, quantization="int8", dtype="float32", dropout=0.0)
    options = {"max_epochs": 1, "enable_checkpointing": False, "accumulate_grad_batches": 2 // devices}
    trainer = tiny_trainer(root, strategy=strategy, devices=devices, **options)
    trainer.fit(module, datamodule=TinyData(batches=6))
    trained = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    eight_bits = sum(p.dtype == torch.int8 for p in module.parameters())
    return {"loss": float(trainer.callback_metrics["train_loss"]), "trained": trained, "eight_bits": eight_bits}


@pytest.mark.slow
def test_two_ranks_of_ddp_take_the_steps_of_one(base, tmp_path):
    alone = fit(base, tmp_path)
    assert alone["eight_bits"] == 2 * 7
    for found in run_ranks(tmp_path / "ranks", lambda: fit(base, tmp_path, "ddp_qlora", 2)):
        assert found["eight_bits"] == 2 * 7
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        for name, value in alone["trained"].items():
            torch.testing.assert_close(found["trained"][name], value, rtol=1e-2, atol=1e-4)


def test_fsdp_refuses_before_anything_is_read(base, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.modeling_utils.safe_open", lambda *_, **__: pytest.fail("read"))

    def run():
        try:
            fit(base, tmp_path, FSDP2Strategy(), 2)
        except MisconfigurationException as error:
            return str(error)

    for message in run_ranks(tmp_path / "ranks", run):
        assert "8-bit weights" in message
        assert "--model.quantization=nf4" in message
        assert "--trainer.strategy=ddp" in message
