"""What ckpt_path may name, and what is said of what it may not."""

import shutil

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from tiny_models import save_tiny_model
from tiny_run import TinyData, tiny_module, tiny_trainer

from lightning_qlora.callbacks import AdapterCheckpoint
from lightning_qlora.checkpoints.checkpoint_io import PublishedCheckpointIO
from lightning_qlora.checkpoints.identity import IdentityMismatchError
from lightning_qlora.checkpoints.publishing import NoValidCheckpointError


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """The folder of a run that published after steps 1 and 2."""
    root = tmp_path_factory.mktemp("run")
    fit(base, root, max_steps=2)
    return root


class Newest(L.Callback):
    """Asks before the first batch for a checkpoint of this state."""

    def on_train_batch_start(self, trainer, module, batch, i):
        if not hasattr(self, "path"):
            self.path = trainer.checkpoint_callback.publish(trainer)


def fit(base, root, *callbacks, ckpt_path=None, max_steps, data=None):
    options = {"max_steps": max_steps, "limit_val_batches": 0}
    trainer = tiny_trainer(root, AdapterCheckpoint(every_n_train_steps=1), *callbacks, **options)
    trainer.fit(tiny_module(base), datamodule=data or TinyData(), ckpt_path=ckpt_path)
    return trainer


@pytest.fixture
def io():
    return PublishedCheckpointIO(TorchCheckpointIO())


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/"])
def test_a_run_is_its_newest_whole_checkpoint(base, run, tmp_path, place):
    copy = shutil.copytree(run, tmp_path / "run")
    newest = Newest()
    fit(base, tmp_path / "branch", newest, ckpt_path=f"{copy}/{place}", max_steps=3)
    assert newest.path == f"{copy}/checkpoints/epoch=0-step=2"
    (copy / "checkpoints/epoch=0-step=2/trainer.ckpt").write_bytes(b"")
    assert fit(base, tmp_path / "damaged", ckpt_path=f"{copy}/{place}", max_steps=1).global_step == 1
    shutil.rmtree(copy / "checkpoints/epoch=0-step=1")
    with pytest.raises(NoValidCheckpointError, match="step=2: trainer.ckpt has 0 bytes"):
        fit(base, tmp_path / "damaged", ckpt_path=f"{copy}/{place}", max_steps=1)


def test_the_checkpoint_of_a_run_must_belong_here(base, run, tmp_path):
    with pytest.raises(IdentityMismatchError, match="data: published with"):
        fit(base, tmp_path, ckpt_path=str(run), max_steps=3, data=TinyData(fingerprint="other"))


def test_an_adapter_alone_is_told_where_it_goes(base, run, tmp_path, io):
    adapter = shutil.copytree(run / "checkpoints/epoch=0-step=2", tmp_path / "adapter")
    for name in ("trainer.ckpt", "manifest.json"):
        (adapter / name).unlink()
    with pytest.raises(ValueError, match=rf"without trainer\.ckpt.*\. Write --model\.adapter={adapter} to start"):
        io.load_checkpoint(adapter)


@pytest.mark.parametrize(
    ("name", "found"),
    [("nowhere", "it does not exist"), ("folder", "it holds a.txt, but no trainer.ckpt and no checkpoints")],
)
def test_what_is_no_checkpoint_is_told(tmp_path, io, name, found):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.txt").touch()
    with pytest.raises(ValueError, match=f"ckpt_path='{tmp_path / name}' is no checkpoint: {found}. Write the folder"):
        io.load_checkpoint(str(tmp_path / name))


def test_files_of_lightning_are_read_as_before(tmp_path, io):
    torch.save({"epoch": 1}, tmp_path / "epoch.ckpt")
    assert io.load_checkpoint(tmp_path / "epoch.ckpt") == {"epoch": 1}
