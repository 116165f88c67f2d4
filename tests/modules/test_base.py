import csv
import json
import math
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig
from tiny import tiny_tokenizer
from tiny_models import random_batch, save_tiny_model
from tiny_training import TinyChats
from torch.utils.data import DataLoader

from lightning_qlora.callbacks import PredictionWriter
from lightning_qlora.modules import SFTModule, WarmupCosine, WarmupLinear, special_tokens
from lightning_qlora.modules import base as base_module


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"))


def build(base, **options):
    torch.manual_seed(0)
    return SFTModule(base, **{"lora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"), **options})


def loader(count=4):
    return DataLoader([random_batch((9, 5, 12), seed=i) for i in range(count)], batch_size=None)


def trainer(path, **options):
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        "default_root_dir": path,
    }
    return L.Trainer(**{**defaults, **options})


def adapters(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def test_building_the_module_loads_nothing_and_fit_trains_only_adapters(base, tmp_path):
    module = build(base)
    assert module.model is None
    trainer(tmp_path).fit(module, loader())
    trained = adapters(module)
    assert trained
    assert all("lora_" in name for name in trained)
    assert module.model.training
    assert any(p.abs().sum() > 0 for name, p in trained.items() if "lora_B" in name)


def test_a_lightning_checkpoint_holds_adapters_only_and_resumes(base, tmp_path):
    module = build(base)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(adapters(module))

    straight = build(base, lr_scheduler=None)
    resumed = build(base, lr_scheduler=None)
    full = trainer(tmp_path, max_epochs=2)
    full.fit(straight, loader())
    first = trainer(tmp_path, max_epochs=1)
    half = build(base, lr_scheduler=None)
    first.fit(half, loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path, max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
    for (name, a), b in zip(adapters(straight).items(), adapters(resumed).values(), strict=True):
        assert torch.equal(a, b), name


def test_load_from_checkpoint_restores_the_adapters(base, tmp_path):
    module = build(base)
    run = trainer(tmp_path)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    loaded = SFTModule.load_from_checkpoint(tmp_path / "x.ckpt", lora=lora)
    for (name, a), b in zip(adapters(module).items(), adapters(loaded).values(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_of_other_adapters_is_refused_by_name(base, tmp_path):
    run = trainer(tmp_path)
    run.fit(build(base), loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    other = build(base, lora=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="left over.*lora_A"):
        trainer(tmp_path).fit(other, loader(), ckpt_path=tmp_path / "x.ckpt")
    torch.save({**torch.load(tmp_path / "x.ckpt", weights_only=True), "lightning_qlora": None}, tmp_path / "y.ckpt")
    foreign = torch.load(tmp_path / "y.ckpt", weights_only=True)
    del foreign["lightning_qlora"]
    torch.save(foreign, tmp_path / "y.ckpt")
    with pytest.raises(ValueError, match="not written by lightning_qlora"):
        trainer(tmp_path).fit(build(base), loader(), ckpt_path=tmp_path / "y.ckpt")


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_precisions_that_round_the_adapters_are_refused(base, tmp_path, precision):
    with pytest.raises(MisconfigurationException, match="bf16-mixed"):
        trainer(tmp_path, precision=precision).fit(build(base), loader())


@pytest.mark.filterwarnings("ignore:precision 'bf16-mixed' on this CPU")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_the_fused_default_optimizer_clips_under_every_precision(base, tmp_path, precision, algorithm):
    norms = []

    class Watch(L.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            if gradients:
                flat = torch.cat([g.flatten() for g in gradients])
                norms.append(float(flat.norm() if algorithm == "norm" else flat.abs().max()))

    options = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": algorithm, "callbacks": [Watch()]}
    trainer(tmp_path, precision=precision, **options).fit(build(base), loader())
    assert norms
    assert max(norms) <= 1.01e-3


def test_lightnings_own_quantisation_is_refused(base, tmp_path):
    run = trainer(tmp_path)
    # On a CPU Lightning itself would refuse the plugin when the trainer is built.
    run.strategy._precision_plugin = BitsandbytesPrecision(mode="nf4", dtype=torch.float32)
    with pytest.raises(MisconfigurationException, match="Remove the plugin"):
        run.fit(build(base), loader())


def test_untrained_control_tokens_are_refused_with_the_remedy(base, tmp_path, monkeypatch):
    module = build(base)
    monkeypatch.setattr(special_tokens, "untrained_token_ids", lambda model, ids: [7, 8])
    with pytest.raises(MisconfigurationException, match=r"trainable_token_indices=\[7, 8\]"):
        trainer(tmp_path).fit(module, loader())
    module = build(base, untrained_tokens="auto")
    trainer(tmp_path).fit(module, loader())
    assert any("token_adapter" in name for name in adapters(module))
    trainer(tmp_path).fit(build(base, untrained_tokens="ignore"), loader())


@pytest.mark.parametrize("option", ["activation_checkpointing", "untrained_tokens"])
def test_unknown_choices_list_the_allowed_ones(base, option):
    with pytest.raises(ValueError, match="allowed are"):
        build(base, **{option: "sometimes"})


def test_schedule_without_an_end_is_refused(base, tmp_path):
    with pytest.raises(MisconfigurationException, match="max_steps"):
        trainer(tmp_path, max_epochs=-1, max_time={"seconds": 1}).fit(build(base), loader())


@pytest.mark.parametrize("schedule", [WarmupCosine, WarmupLinear])
def test_schedules_warm_up_and_come_down(schedule):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = schedule(optimizer, 20, warmup_ratio=0.2, min_lr_ratio=0.1)
    rates = []
    for _ in range(21):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="from 0 to 1"):
        schedule(optimizer, 20, warmup_ratio=3)


def test_lr_replaces_the_optimizers_and_the_rate_finder_sets_it(base, tmp_path):
    module = build(base, lr=0.5, lr_scheduler=None)
    run = trainer(tmp_path)
    run.fit(module, loader())
    assert run.optimizers[0].param_groups[0]["lr"] == 0.5
    module = build(base, lr=1e-3, lr_scheduler=None)
    finder = Tuner(trainer(tmp_path, max_epochs=20)).lr_find(module, loader(), num_training=12)
    assert len(finder.results["lr"]) >= 10
    assert all(math.isfinite(loss) for loss in finder.results["loss"])


@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_loggers_and_callbacks_of_lightning_work_untouched(base, tmp_path, logger):
    logger = CSVLogger(tmp_path) if logger == "csv" else TensorBoardLogger(tmp_path)
    callbacks = [
        LearningRateMonitor(),
        EarlyStopping("val_loss", patience=3),
        ModelCheckpoint(tmp_path / "ckpt", monitor="val_loss", save_last=True),
    ]
    run = trainer(tmp_path, logger=logger, callbacks=callbacks, enable_checkpointing=True, max_epochs=2)
    run.fit(build(base), loader(), loader(2))
    names = set(run.callback_metrics)
    assert {"train_loss", "train_token_accuracy", "val_loss", "val_perplexity", "val_token_accuracy"} <= names
    assert run.callback_metrics["val_perplexity"] == pytest.approx(math.exp(run.callback_metrics["val_loss"]), rel=1e-5)
    assert (tmp_path / "ckpt" / "last.ckpt").is_file()


@pytest.mark.parametrize(
    "options",
    [
        {"fast_dev_run": True},
        {"overfit_batches": 2},
        {"profiler": "simple"},
        {"detect_anomaly": True},
        {"barebones": True},
    ],
    ids=lambda o: next(iter(o)),
)
@pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")
def test_debugging_aids_of_the_trainer_work_untouched(base, tmp_path, options, capsys):
    if "barebones" in options:
        options = {**options, "logger": None, "enable_progress_bar": None, "log_every_n_steps": None}
        options |= {"enable_checkpointing": None, "enable_model_summary": None}
    run = trainer(tmp_path, **options)
    run.fit(build(base), loader(), loader(1))
    assert run.global_step >= 1


def test_hyperparameters_written_are_plain_data(base, tmp_path):
    run = trainer(tmp_path, logger=CSVLogger(tmp_path))
    module = build(base)
    run.fit(module, loader(1))
    json.dumps(dict(module.hparams))
    assert module.hparams["model_name"] == base


def test_generation_stops_at_stop_tokens_and_leaves_training_mode(base, tmp_path):
    module = build(base)
    trainer(tmp_path).fit(module, loader(1))
    ids = torch.randint(3, 500, (2, 6))
    free = module.generate(ids, torch.ones_like(ids), max_new_tokens=8)
    assert module.model.training
    assert all(1 <= len(answer) <= 8 for answer in free)
    module.stop_token_ids = (free[0][3],)
    stopped = module.generate(ids, torch.ones_like(ids), max_new_tokens=8)
    assert stopped[0] == free[0][: free[0].index(free[0][3])]


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")
def test_answers_of_several_loaders_are_written_in_their_order(tmp_path):
    tokenizer = tiny_tokenizer("chatml")
    module = build(save_tiny_model(tmp_path / "base", tokenizer=tokenizer), max_new_tokens=2)
    data = TinyChats(tokenizer)
    ids = torch.full((2, 3), 5)
    names = [[("a", "b"), ("c", "d")], [("e", "f")]]
    loaders = [
        [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "rows": [{"name": n} for n in two]} for two in one]
        for one in names
    ]
    data.predict_dataloader = lambda: [DataLoader(batches, batch_size=None) for batches in loaders]
    predictions = trainer(tmp_path, callbacks=[PredictionWriter()]).predict(module, datamodule=data)
    assert [len(of_one) for of_one in predictions] == [2, 1]
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert "".join(row["name"] for row in rows) == "abcdef"
    assert all(isinstance(row["answer"], str) for row in rows)


class _Gradients(L.Callback):
    """Reads the norm by hand, after the module's own hook and clipping."""

    def __init__(self):
        self.norms = []

    def on_before_zero_grad(self, trainer, module, optimizer):
        gradients = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        if gradients:
            self.norms.append(float(torch.cat(gradients).norm()))


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_the_norm_of_the_gradient_is_logged_as_it_is_before_clipping(base, tmp_path, clip):
    logger = CSVLogger(tmp_path)
    recorder = _Gradients()
    module = build(base, lr=0.25, lr_scheduler=WarmupLinear)
    run = trainer(tmp_path, logger=logger, callbacks=[recorder], gradient_clip_val=clip, accumulate_grad_batches=2)
    run.fit(module, loader(8))

    with open(tmp_path / "lightning_logs" / "version_0" / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["gradient_norm"]]
    norms, rates = ([float(row[name]) for row in rows] for name in ("gradient_norm", "learning_rate"))
    assert len(rows) == 4
    assert rates[-1] < rates[1] <= 0.25
    if clip is None:
        assert norms[:-1] == pytest.approx(recorder.norms, rel=1e-4)  # gradients are dropped before the next step
    else:
        assert min(norms) > 10 * clip


@pytest.mark.parametrize("has_room", [True, False])
def test_a_model_that_the_host_has_not_the_memory_for_stays_where_it_is(base, tmp_path, monkeypatch, has_room):
    """A trainer moves its module when it ends, which would be the end of the process."""
    moved = []
    monkeypatch.setattr(base_module, "host_has_room", lambda device, num_devices: has_room)
    monkeypatch.setattr(torch.nn.Module, "cpu", lambda module: moved.append(module) or module)
    module, ended = build(base), trainer(tmp_path, max_steps=1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ended.fit(module, loader())
    assert ended.state.finished
    assert (module in moved) == has_room
    assert any("stays on its GPU" in str(each.message) for each in said) != has_room
