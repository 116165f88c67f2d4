import lightning as L
import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_models import save_tiny_model
from tiny_run import TinyData, assert_equal, final_state, tiny_module, tiny_trainer
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR, StepLR

from lightning_qlora.modules import SFTModule, WarmupCosine, WarmupLinear

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # the saving callback is left out
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"))


class Rates(L.Callback):
    """The rate of each optimizer step, and how many micro-batches it took."""

    def __init__(self):
        self.used, self.accumulated = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.used.append(optimizer.param_groups[0]["lr"])
        self.accumulated.append(trainer.accumulate_grad_batches)


class Sized(TinyData):
    batch_size = 1

    def train_dataloader(self):
        self.batches = 8 // self.batch_size
        return super().train_dataloader()


def fit(base, root, *callbacks, ckpt_path=None, lr=1e-2, batches=6, max_epochs=2, trainer=None, data=None, **options):
    L.seed_everything(0, verbose=False)
    rates, module = Rates(), tiny_module(base, lr=lr, dropout=0.0, **options)
    run = tiny_trainer(root, *callbacks, rates, **{"max_epochs": max_epochs, **(trainer or {})})
    run.fit(module, data or TinyData(batches=batches), ckpt_path=ckpt_path)
    return run, rates, module


def expected(schedule, lr, steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler, rates = schedule(optimizer, steps), []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return pytest.approx(rates)


@pytest.mark.filterwarnings("ignore:.*lr_find.*:UserWarning")
def test_the_rate_that_the_finder_found_is_that_of_the_whole_run(base, tmp_path):
    finder = LearningRateFinder(num_training_steps=14, early_stop_threshold=None, min_lr=1e-4, max_lr=1e-1)
    _, rates, module = fit(base, tmp_path, finder, lr=1e-6, batches=8, lr_scheduler=WarmupLinear)
    assert module.lr > 1e-5
    assert rates.used == expected(WarmupLinear, module.lr, 16)


def test_the_schedule_ends_with_the_run_whose_batch_size_was_found(base, tmp_path):
    data = Sized()
    _, rates, _ = fit(base, tmp_path, BatchSizeFinder(max_trials=3, steps_per_trial=1, init_val=1), data=data)
    assert data.batch_size == 4
    assert rates.used == expected(WarmupCosine, 1e-2, 4)


def test_a_resumed_run_goes_on_with_the_rate_of_its_checkpoint(base, tmp_path):
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    _, whole, _ = fit(base, tmp_path, saving)
    _, resumed, _ = fit(base, tmp_path, lr=1.0, ckpt_path=tmp_path / "step=4.ckpt")
    assert resumed.used == whole.used[4:] == expected(WarmupCosine, 1e-2, 12).expected[4:]


@pytest.mark.parametrize(("scheduling", "steps"), [({0: 4}, [4] * 4), ({0: 4, 1: 1}, [4, 4, 1, 1, 1, 1, 1, 1])])
def test_the_schedule_counts_the_steps_of_an_accumulation_that_changes(base, tmp_path, scheduling, steps):
    run, rates, _ = fit(base, tmp_path, GradientAccumulationScheduler(scheduling))
    assert rates.accumulated == steps
    assert rates.used == expected(WarmupCosine, 1e-2, len(steps))
    assert run.lr_scheduler_configs[0].scheduler.get_last_lr() == [0.0]


def test_an_accumulation_that_changes_is_resumed_within_an_epoch(base, tmp_path):
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole, rates, _ = fit(base, tmp_path, GradientAccumulationScheduler({0: 4, 1: 2}), saving)
    resumed, again, _ = fit(
        base, tmp_path, GradientAccumulationScheduler({0: 4, 1: 2}), ckpt_path=tmp_path / "step=3.ckpt"
    )
    assert again.accumulated == rates.accumulated[3:] == [2, 2]
    assert_equal(final_state(resumed), final_state(whole))


def parse(*arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SFTModule, "model", skip={"lora", "quantization", "optimizer"})
    config = parser.parse_args(["--model.model_name=x", *(f"--model.lr_scheduler{a}" for a in arguments)])
    return parser.instantiate_classes(config).model.lr_scheduler


TORCH = "torch.optim.lr_scheduler."


@pytest.mark.parametrize(
    ("written", "made"),
    [
        (["=WarmupLinear", ".warmup_ratio=0.5"], lambda o, n: WarmupLinear(o, n, warmup_ratio=0.5)),
        ([f"={TORCH}CosineAnnealingLR"], lambda o, n: torch.optim.lr_scheduler.CosineAnnealingLR(o, n)),
        ([".warmup_ratio=0.5"], lambda o, n: WarmupCosine(o, n, warmup_ratio=0.5)),
        ([f"={TORCH}StepLR", ".step_size=3"], lambda o, n: StepLR(o, 3)),
        ([f"={TORCH}ExponentialLR", ".gamma=0.9"], lambda o, n: ExponentialLR(o, 0.9)),
        ([f"={TORCH}OneCycleLR", ".max_lr=0.1"], lambda o, n: OneCycleLR(o, 0.1, n)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
def test_schedules_of_torch_are_stepped_at_each_optimizer_step_with_their_own_options(base, tmp_path, written, made):
    sgd = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9)}
    _, rates, _ = fit(base, tmp_path, lr_scheduler=parse(*written), **sgd)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2, momentum=0.9)
    scheduler = made(optimizer, 12)
    for rate in rates.used:
        assert rate == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    "function", [lambda optimizer: StepLR(optimizer, 4), lambda optimizer, steps: StepLR(optimizer, steps // 3)]
)
def test_functions_may_take_the_steps_or_not(base, tmp_path, function):
    _, rates, _ = fit(base, tmp_path, lr_scheduler=function)
    assert rates.used == pytest.approx([1e-2] * 4 + [1e-3] * 4 + [1e-4] * 4)


@pytest.mark.parametrize("kind", [ExponentialLR, StepLR, OneCycleLR])
def test_a_schedule_is_not_given_the_steps_as_another_option(base, tmp_path, kind):
    with pytest.raises(MisconfigurationException, match=r"needs .*init_args: \{(gamma|step_size|max_lr)"):
        fit(base, tmp_path, lr_scheduler=kind)
    with pytest.raises(ArgumentError, match="gamma|step_size|max_lr"):
        parse(f"={TORCH}{kind.__name__}")


def test_a_run_without_an_end_may_have_a_schedule_that_asks_for_none(base, tmp_path):
    endless = {"trainer": {"max_time": {"seconds": 2}}, "max_epochs": -1}
    _, rates, _ = fit(base, tmp_path, lr_scheduler=parse(f"={TORCH}ExponentialLR", ".gamma=0.5"), **endless)
    assert rates.used[:3] == pytest.approx([1e-2, 5e-3, 2.5e-3])


def test_a_plateau_is_followed_where_a_metric_is_named(base, tmp_path):
    options = [".monitor=val_loss", ".patience=0", ".threshold=10", ".threshold_mode=abs"]
    plateau = parse("=lightning.pytorch.cli.ReduceLROnPlateau", *options)
    every = {"trainer": {"check_val_every_n_epoch": 2}, "max_epochs": 6, "batches": 2}
    run, rates, _ = fit(base, tmp_path, lr_scheduler=plateau, **every)
    assert isinstance(run.lr_scheduler_configs[0].scheduler, ReduceLROnPlateau)
    assert rates.used == pytest.approx([1e-2] * 8 + [1e-3] * 4)
    with pytest.raises(MisconfigurationException, match="monitor: val_loss"):
        fit(base, tmp_path, lr_scheduler=parse(f"={TORCH}ReduceLROnPlateau"))
