"""Checkpoints are published beside training: same files, nothing lost at any end, failures told."""

import copy
import logging
import os
import pickle
import signal
import threading
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import save_tiny_model
from tiny_run import TinyData, tiny_module, tiny_trainer

from lightning_qlora.callbacks import AdapterCheckpoint, RunGuard
from lightning_qlora.checkpoints.publishing import LocalStore, verify
from lightning_qlora.model import load_base_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"))


def fit(base, root, *callbacks, **options):
    L.seed_everything(0)
    trainer = tiny_trainer(root, *callbacks, **{"max_epochs": 1, **options})
    trainer.fit(tiny_module(base), datamodule=TinyData())


def names(root):
    return [p.name for p in reversed(LocalStore(root).published())]


class SlowStore(LocalStore):
    """Takes its time to publish, or fails at it, sends this process a signal meanwhile, and notes when."""

    def __init__(self, root, seconds=0.3, fails_at=None, sends=None):
        super().__init__(root)
        self.seconds, self.fails_at, self.sends, self.threads = seconds, fails_at, sends, []

    def commit(self, staging, name, metadata, required=()):
        self.threads.append(threading.current_thread().name)
        time.sleep(self.seconds / 2)
        if self.sends is not None:
            os.kill(os.getpid(), self.sends)
        time.sleep(self.seconds / 2)
        if metadata["step"] == self.fails_at:
            raise OSError(28, "No space left on device")
        return super().commit(staging, name, metadata, required)


class UsesStore(AdapterCheckpoint):
    def __init__(self, store, **options):
        super().__init__(store.root, **options)
        self.store = store

    def setup(self, trainer, module, stage):
        super().setup(trainer, module, stage)
        self._publisher.store = self.store


class Watch(L.Callback):
    """What was published when each batch began."""

    def __init__(self, root):
        self.root, self.seen = root, []

    def on_train_batch_start(self, trainer, *args):
        self.seen.append((trainer.global_step, len(names(self.root))))


@pytest.mark.parametrize("background", [True, False])
def test_training_goes_on_while_a_checkpoint_is_published(base, tmp_path, background, caplog):
    store, watch = SlowStore(tmp_path / "c", seconds=1.0), Watch(tmp_path / "c")
    checkpoint = UsesStore(store, every_n_train_steps=4, background=background)
    with caplog.at_level(logging.INFO):
        fit(base, tmp_path, checkpoint, watch)
    assert dict(watch.seen)[4] == (0 if background else 1)
    assert names(tmp_path / "c") == ["epoch=0-step=4", "epoch=0-step=6"]
    assert "MainThread" not in store.threads
    assert checkpoint.seconds_waited >= (1.0 if background else 2.0)  # the end waits for the last one in any case
    assert "Published 2 checkpoints in" in caplog.text
    assert f"the last of {checkpoint.last_save_bytes / 1e6:.1f} MB. Training waited" in caplog.text


def test_the_snapshot_is_that_of_its_step(base, tmp_path):
    fit(base, tmp_path, AdapterCheckpoint(tmp_path / "a", every_n_train_steps=2, save_top_k=-1, background=False))
    fit(base, tmp_path, UsesStore(SlowStore(tmp_path / "b"), every_n_train_steps=2, save_top_k=-1))
    for name in ("epoch=0-step=2", "epoch=0-step=4", "epoch=0-step=6"):
        one, other = (verify(tmp_path / folder / name).files for folder in "ab")
        assert one["adapter_model.safetensors"] == other["adapter_model.safetensors"]


class Plain(L.LightningModule):
    """Somebody's module around a PeftModel, which saves all of it unless told otherwise."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        ids = torch.arange(5)[None]
        return self.model(input_ids=ids, labels=ids).loss

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Filtered(Plain):
    strict_loading = False

    def state_dict(self, **options):
        return {name: tensor for name, tensor in super().state_dict(**options).items() if "lora_" in name}


def test_a_module_that_saves_its_base_is_refused_at_the_start(base, tmp_path):
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_base_model(base), lora).train()
    with pytest.raises(MisconfigurationException, match=r"Plain would save \d+ tensors .*, such as .*CausalLMModule"):
        tiny_trainer(tmp_path, AdapterCheckpoint(), fast_dev_run=True).fit(Plain(model), TinyData())
    tiny_trainer(tmp_path, AdapterCheckpoint(), max_steps=1, limit_val_batches=0).fit(Filtered(model), TinyData())
    published = LocalStore(tmp_path / "checkpoints").newest_valid()
    saved = torch.load(Path(published.path) / "trainer.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == {name for name, p in Plain(model).named_parameters() if p.requires_grad}


class Values(L.Callback):
    """Keeps the last loss of validation."""

    def on_validation_end(self, trainer, module):
        self.loss = trainer.callback_metrics["val_loss"].item()


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_the_folder_holds_the_averaged_weights_that_were_validated(base, tmp_path):
    """Lightning's callback puts them into trainer.ckpt; one checkpoint is one model."""
    values = Values()
    fit(base, tmp_path, EMAWeightAveraging(decay=0.5), AdapterCheckpoint(monitor="val_loss"), values)
    published = Path(LocalStore(tmp_path / "checkpoints").newest_valid().path)

    folder = load_file(published / "adapter_model.safetensors")
    saved = torch.load(published / "trainer.ckpt", weights_only=True)
    names = {key: key.removeprefix("model.").replace(".default", "") for key in saved["state_dict"]}
    assert {*names.values()} == folder.keys()
    assert all(torch.equal(saved["state_dict"][key], folder[name]) for key, name in names.items())
    assert any(not torch.equal(saved["current_model_state"][key], folder[name]) for key, name in names.items())

    trainer, module = tiny_trainer(tmp_path), tiny_module(base, adapter=str(published))
    (found,) = trainer.validate(module, datamodule=TinyData(), verbose=False)
    assert found["val_loss"] == values.loss


@pytest.mark.parametrize("fails_at", [2, 6])
def test_a_failure_in_the_background_ends_training(base, tmp_path, fails_at):
    store = SlowStore(tmp_path / "c", seconds=0.0, fails_at=fails_at)
    trainer = tiny_trainer(tmp_path, UsesStore(store, every_n_train_steps=2), Pause(), max_epochs=1)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit(tiny_module(base), datamodule=TinyData())
    assert fails_at <= trainer.global_step <= min(fails_at + 2, 6)  # at a next batch, at the latest at the next save
    assert names(tmp_path / "c") == {2: [], 6: ["epoch=0-step=2", "epoch=0-step=4"]}[fails_at]
    assert not [p for p in (tmp_path / "c").iterdir() if p.name.startswith(".")]


class Pause(L.Callback):
    """Gives the thread time, after the callbacks of the batch's start."""

    def on_after_backward(self, *args):
        time.sleep(0.2)


@pytest.mark.parametrize("fails", [False, True])
def test_an_exception_waits_for_what_is_being_published(base, tmp_path, fails, caplog):
    class Fails(L.Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step == 4:
                raise KeyError("x")

    store = SlowStore(tmp_path / "c", seconds=0.5, fails_at=4 if fails else None)
    with pytest.raises(KeyError):
        fit(base, tmp_path, UsesStore(store, every_n_train_steps=4), Fails())
    assert names(tmp_path / "c") == ([] if fails else ["epoch=0-step=4"])
    assert ("epoch=0-step=4/trainer.ckpt was not published: [Errno 28]" in caplog.text) == fails


class Sleep(L.Callback):
    """Makes a step last until the thread is done, unless something interrupts it."""

    def on_after_backward(self, trainer, *args):
        if trainer.global_step == 4:
            time.sleep(2.0)


@pytest.fixture
def interruptible():
    """Listen to Ctrl-C, which processes ignore that a shell has started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("fails", [False, True], ids=["published", "fails"])
@pytest.mark.parametrize("step", [4, 6], ids=["while training", "while the end waits"])
def test_an_interrupt_waits_for_what_is_being_published(base, tmp_path, step, fails, caplog):
    store = SlowStore(tmp_path / "c", seconds=1.0, fails_at=step if fails else None, sends=signal.SIGINT)
    with pytest.raises(SystemExit) as exit_:
        fit(base, tmp_path, UsesStore(store, every_n_train_steps=step), Sleep())
    assert exit_.value.code == 1
    assert names(tmp_path / "c") == ([] if fails else [f"epoch=0-step={step}"])
    assert not [p for p in (tmp_path / "c").iterdir() if p.name.startswith(".")]
    assert (f"epoch=0-step={step}/trainer.ckpt was not published: [Errno 28]" in caplog.text) == fails


def test_a_preempted_run_exits_only_when_it_is_published(base, tmp_path):
    class Tell(L.Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    store = SlowStore(tmp_path / "c", seconds=0.5)
    with pytest.raises(SystemExit) as exit_:
        fit(base, tmp_path, UsesStore(store, every_n_train_steps=100), RunGuard(), Tell())
    assert exit_.value.code == 143
    assert names(tmp_path / "c") == ["epoch=0-step=4"]


def test_signals_while_a_checkpoint_is_published_do_not_disturb_it(base, tmp_path):
    """One while that of step 4 is published and training goes on, another while that of the last step is."""
    store = SlowStore(tmp_path / "c", seconds=0.5, sends=signal.SIGTERM)
    with pytest.raises(SystemExit) as exit_:
        fit(base, tmp_path, UsesStore(store, every_n_train_steps=4), RunGuard(), Sleep())
    assert exit_.value.code == 143
    assert names(tmp_path / "c") == ["epoch=0-step=4", "epoch=0-step=5"]
    assert len(store.threads) == 2
    verify(tmp_path / "c/epoch=0-step=5")


@pytest.mark.parametrize("fails_at", [2, 4])
def test_a_preempted_run_that_cannot_be_published_fails(base, tmp_path, fails_at):
    """Neither with the last checkpoint under way when the signal comes, nor with the one that is made for it."""

    class Tell(L.Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step == fails_at - (fails_at == 4):
                os.kill(os.getpid(), signal.SIGTERM)

    store = SlowStore(tmp_path / "c", seconds=0.5, fails_at=fails_at)
    with pytest.raises(OSError, match="No space left"):
        fit(base, tmp_path, UsesStore(store, every_n_train_steps=2), RunGuard(), Tell())
    assert names(tmp_path / "c") == ([] if fails_at == 2 else ["epoch=0-step=2"])
    assert not [p for p in (tmp_path / "c").iterdir() if p.name.startswith(".")]


def test_loggers_are_told_of_what_is_there(base, tmp_path):
    class Logger(CSVLogger):
        told = []

        def after_save_checkpoint(self, checkpoint):
            self.told.append(Path(checkpoint.last_model_path).is_file())

    fit(base, tmp_path, AdapterCheckpoint(every_n_train_steps=2), logger=Logger(tmp_path / "logs"))
    assert Logger.told == [True, True, True]


def test_the_callback_can_be_copied_and_sent(base, tmp_path):
    checkpoint = AdapterCheckpoint(tmp_path / "c", every_n_train_steps=3)
    fit(base, tmp_path, checkpoint)
    assert copy.deepcopy(checkpoint).last_model_path == checkpoint.last_model_path
    assert pickle.loads(pickle.dumps(AdapterCheckpoint(tmp_path / "c"))).dirpath == str(tmp_path / "c")
