"""A run whose passes are recorded is the run that it is without, whatever else goes on in it."""

import functools

import lightning as L
import pytest
import torch
from graph_tape import attend_by_starts, record_on_tape
from lightning.pytorch.callbacks import EMAWeightAveraging, GradientAccumulationScheduler, LearningRateFinder
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from tiny_run import Record, make_jobs, tiny_module, tiny_trainer, trained_tensors

from lightning_qlora.callbacks import RunGuard
from lightning_qlora.modules import SFTModule
from lightning_qlora.modules.forward import SupervisedForward

BATCHES = 12


class Replays(L.Callback):
    count = 0

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.count = module.graph_replays


class Unfreeze(L.Callback):
    """Trains half of the adapters from a later batch on."""

    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.current_epoch == 0 and index in (0, 6):
            for name, parameter in module.named_parameters():
                if "lora_A" in name:
                    parameter.requires_grad_(index == 6)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return make_jobs(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(autouse=True)
def tape(monkeypatch):
    attend_by_starts(monkeypatch)
    record = SupervisedForward.record
    recorded = functools.partialmethod(record, recorder=record_on_tape)
    monkeypatch.setattr(SupervisedForward, "record", recorded)


def run(job, root, graphs, callbacks=lambda: (), kind=None, **options):
    L.seed_everything(0)
    exact = {"dropout": 0.0, "cuda_graphs": graphs, "dtype": "float32"}
    record, replays, module = (
        Record(),
        Replays(),
        tiny_module(job.base, kind=kind, **exact) if kind else job.module(**exact),
    )
    trainer = tiny_trainer(root, record, replays, *callbacks(), **{"max_epochs": 2, "val_check_interval": 4, **options})
    trainer.fit(module, datamodule=job.data(batches=BATCHES))
    return record.losses, trained_tensors(module), replays.count


CASES = {
    "plain": {},
    "three batches a step": {"accumulate_grad_batches": 3},
    "more batches a step later": {"callbacks": lambda: (GradientAccumulationScheduler({0: 1, 1: 4}),)},
    "averaged weights": {"callbacks": lambda: (EMAWeightAveraging(decay=0.9),)},
    "guarded": {"callbacks": lambda: (RunGuard(),)},
    "unfrozen": {"callbacks": lambda: (Unfreeze(),)},
    "learning rate finder": {"callbacks": lambda: (LearningRateFinder(num_training_steps=6),)},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_a_recorded_run_is_the_run_without(jobs, tmp_path, case):
    losses, weights, replays = run(jobs["SFT"], tmp_path / "with", True, **CASES[case])
    plain_losses, plain_weights, none = run(jobs["SFT"], tmp_path / "without", False, **CASES[case])
    assert none == 0
    assert replays >= 2 * BATCHES - 9
    assert losses == pytest.approx(plain_losses, rel=1e-4)
    for name, weight in plain_weights.items():
        assert float((weights[name] - weight).norm()) <= 1e-3 * float(weight.norm()) + 1e-6, name


class Rescaled(SFTModule):
    """Takes each step with the adapters at another scale."""

    def training_step(self, batch, index):
        with rescale_adapter_scale(self.model, 0.1 + self.trainer.global_step / 10):
            return super().training_step(batch, index)


class RescaledInValidation(L.Callback):
    """After which the modules keep their scales elsewhere, where they are changed later."""

    def on_validation_start(self, trainer, module):
        self.scaled = rescale_adapter_scale(module.model, 0.5)
        self.scaled.__enter__()

    def on_validation_end(self, trainer, module):
        self.scaled.__exit__(None, None, None)

    def on_train_batch_start(self, trainer, module, batch, index):
        for each in module.model.modules():
            if isinstance(each, LoraLayer):
                each.set_scale("default", 0.2 + trainer.global_step / 10)


class OtherNumbers(L.Callback):
    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            for layer in module.model.get_base_model().get_decoder().layers:
                layer.input_layernorm.variance_epsilon = 0.1


class OtherConstants(L.Callback):
    """Has the weights decoded otherwise, at the same places."""

    def on_train_batch_start(self, trainer, module, batch, index):
        if index == 8:
            for each in module.parameters():
                if hasattr(each, "quant_state"):
                    each.quant_state.absmax = each.quant_state.absmax.flip(0)


class OwnHead(SFTModule):
    """Trains a head of its own alone at first."""

    def on_model_built(self):
        self.extra = torch.nn.Linear(64, 1)

    def on_train_start(self):
        self.train_adapters(False)
        super().on_train_start()

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.train_adapters(self.current_epoch == 1)

    def train_adapters(self, are_trained):
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(are_trained)

    def training_step(self, batch, index):
        hidden, _ = self.supervised_forward(batch)
        loss = self.extra(hidden.float()).square().sum()
        self.count_terms(loss, len(hidden))
        return loss


class SoftPrompt(SFTModule):
    """Trains what is no parameter of the decoder."""

    def on_model_built(self):
        self.prompt = torch.nn.Parameter(torch.zeros(64))
        embedding = self.model.get_input_embeddings()
        plain = embedding.forward
        embedding.forward = lambda ids: plain(ids) + self.prompt


CHANGES = {
    "scales in each step": {"kind": Rescaled},
    "scales in validation": {"callbacks": lambda: (RescaledInValidation(),)},
    "numbers": {"callbacks": lambda: (OtherNumbers(),)},
    "constants": {"callbacks": lambda: (OtherConstants(),)},
    "what is trained": {"kind": OwnHead},
    "not its own": {"kind": SoftPrompt},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_in_a_run_is_noticed(jobs, tmp_path, change):
    losses, weights, _ = run(jobs["SFT"], tmp_path / "with", True, **CHANGES[change])
    plain_losses, plain_weights, _ = run(jobs["SFT"], tmp_path / "without", False, **CHANGES[change])
    assert losses == pytest.approx(plain_losses, rel=1e-4)
    for name, weight in plain_weights.items():
        assert float((weights[name] - weight).norm()) <= 1e-3 * float(weight.norm()) + 1e-6, name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["DPO", "ORPO"])
def test_preferences_are_trained_as_without(jobs, tmp_path, kind):
    losses, _, _ = run(jobs[kind], tmp_path / "with", True)
    plain_losses, _, _ = run(jobs[kind], tmp_path / "without", False)
    assert losses == pytest.approx(plain_losses, rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_what_is_detected_or_to_be_deterministic_is_not_recorded(jobs, tmp_path):
    for options in ({"detect_anomaly": True}, {"deterministic": True}):
        assert run(jobs["SFT"], tmp_path, "auto", **options)[2] == 0


@pytest.mark.filterwarnings("ignore")
def test_a_fit_after_one_that_failed_begins_anew(jobs, tmp_path):
    class Fail(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if index == 6:
                raise RuntimeError("on purpose")

    job = jobs["SFT"]
    module = job.module(dropout=0.0, cuda_graphs=True, dtype="float32")
    with pytest.raises(RuntimeError, match="on purpose"):
        tiny_trainer(tmp_path, Fail()).fit(module, datamodule=job.data(batches=BATCHES))
    assert module.graph_replays == 5
    module.cuda_graphs, replays = False, Replays()
    tiny_trainer(tmp_path, replays).fit(module, datamodule=job.data(batches=BATCHES))
    assert replays.count == 0
