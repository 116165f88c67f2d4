"""In no step does the host wait for its GPU: it has the next kernels ready while the last ones run."""

import lightning as L
import pytest
import torch
from tiny_run import make_jobs, tiny_trainer

from lightning_qlora.callbacks import AdapterCheckpoint, PerformanceMonitor, RunGuard

FIRST, LAST = 5, 11  # by then graphs are recorded


class WaitIsAnError(L.Callback):
    """Lets torch refuse what would wait, from one step to another."""

    def __init__(self):
        self.losses, self.shown, self.replays = [], [], 0

    def on_train_batch_start(self, trainer, module, batch, index):
        if index == FIRST:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.replays = module.graph_replays
        if FIRST <= index < LAST:
            self.losses.append(trainer.callback_metrics["train_loss"])
            self.shown.append(trainer.progress_bar_metrics["loss"])
        if index == LAST:
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return make_jobs(tmp_path_factory.mktemp("jobs"))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("kind", "graphs"), [("SFT", False), ("SFT", True), ("DPO", False), ("ORPO", False)])
def test_no_step_waits_for_the_gpu(jobs, tmp_path, kind, graphs, accumulate):
    watch, data = WaitIsAnError(), jobs[kind].data(batches=LAST + 3)
    options = {"accelerator": "gpu", "precision": "bf16-mixed", "log_every_n_steps": 1000, "enable_progress_bar": True}
    callbacks = RunGuard(), PerformanceMonitor(), AdapterCheckpoint(tmp_path / "checkpoints", every_n_train_steps=100)
    trainer = tiny_trainer(tmp_path, *callbacks, watch, max_epochs=1, accumulate_grad_batches=accumulate, **options)
    try:
        trainer.fit(jobs[kind].module(dropout=0.0, cuda_graphs=graphs), datamodule=data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(watch.losses) == LAST - FIRST
    assert (watch.replays >= LAST - FIRST) == graphs
    losses = [loss.item() for loss in watch.losses][accumulate - 1 :: accumulate]
    shown = watch.shown[accumulate - 1 :: accumulate]
    assert shown[1:] == pytest.approx(losses[:-1], rel=1e-6)  # one step later
