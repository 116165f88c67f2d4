import json
import logging
import math
import os
import signal

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_models import save_tiny_model
from tiny_run import Record, TinyData, assert_equal, final_state, tiny_module, tiny_trainer

from lightning_qlora.callbacks import AdapterCheckpoint, RunGuard
from lightning_qlora.callbacks.run_guard import NonFiniteError, _out_of_memory_note
from lightning_qlora.checkpoints.publishing import LocalStore
from lightning_qlora.modules.sft import SFTModule


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"))


def fit(base, root, *callbacks, module=None, data=None, ckpt_path=None, seed=0, dropout=0.1, **trainer):
    L.seed_everything(seed)
    record = Record()
    trainer = tiny_trainer(root, record, *callbacks, **{"max_epochs": 1, **trainer})
    code = None
    try:
        trainer.fit(module or tiny_module(base, dropout=dropout), datamodule=data or TinyData(), ckpt_path=ckpt_path)
    except SystemExit as exit_:
        code = exit_.code
    return trainer, record, code


def checkpoint(root, **kwargs):
    return AdapterCheckpoint(root / "checkpoints", **{"every_n_train_steps": 100, **kwargs})


# Preemption


class Tell(L.Callback):
    """Sends this process a signal the n-th time that a hook is called."""

    def __init__(self, hook, at, number=signal.SIGTERM, times=1):
        self.at, self.number, self.times = at, number, times
        setattr(self, hook, self.fire)

    def fire(self, *args, **kwargs):
        if self.at == 0:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
        self.at -= 1


def check_preemption(base, tmp_path, calm, hook, at, number=signal.SIGTERM, times=1, **options):
    """Interrupt a run, continue it, and compare it with the one that was not interrupted."""
    trainer, record, code = calm
    assert code is None
    _, first, code = fit(base, tmp_path, Tell(hook, at, number, times), RunGuard(), checkpoint(tmp_path), **options)
    assert code == 143
    resumed, second, code = fit(base, tmp_path, RunGuard(), checkpoint(tmp_path), ckpt_path="last", seed=7, **options)
    assert code is None
    assert first.rows + second.rows == record.rows  # none lost, none repeated
    assert first.losses + second.losses == record.losses
    assert_equal(final_state(trainer), final_state(resumed))


OPTIONS = {1: {"val_check_interval": 3}, 4: {"accumulate_grad_batches": 4, "val_check_interval": 3}}


@pytest.fixture(scope="module")
def calm(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("calm")
    return {a: fit(base, root, checkpoint(root / str(a)), **options) for a, options in OPTIONS.items()}


@pytest.mark.parametrize(
    ("accumulate", "hook", "at", "number", "times"),
    [
        (1, "on_train_batch_start", 0, signal.SIGTERM, 1),
        (1, "on_train_batch_end", 2, signal.SIGUSR1, 1),
        (1, "on_validation_batch_start", 1, signal.SIGTERM, 2),
        (4, "on_after_backward", 1, signal.SIGTERM, 3),
        (4, "on_validation_batch_start", 0, signal.SIGUSR1, 1),
    ],
)
def test_a_signal_loses_nothing(base, tmp_path, calm, accumulate, hook, at, number, times):
    check_preemption(base, tmp_path, calm[accumulate], hook, at, number, times, **OPTIONS[accumulate])


HOOKS = {
    "on_train_batch_start": 12,
    "on_after_backward": 12,
    "on_before_optimizer_step": 3,
    "on_train_batch_end": 11,
    "on_validation_batch_start": 7,
    "on_validation_batch_end": 7,
    "on_validation_end": 3,
}


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(("hook", "times"), HOOKS.items())
def test_a_signal_anywhere_loses_nothing(base, tmp_path, accumulate, hook, times, number):
    options = {**OPTIONS[accumulate], "max_epochs": 2}
    calm = fit(base, tmp_path / "calm", checkpoint(tmp_path / "calm"), **options)
    for at in range(times):
        check_preemption(base, tmp_path / str(at), calm, hook, at, number, times=1 + at % 2, **options)


def test_three_interruptions_in_a_row(base, tmp_path):
    options = {"max_epochs": 2, "accumulate_grad_batches": 2, "val_check_interval": 3}
    calm, record, _ = fit(base, tmp_path / "calm", checkpoint(tmp_path / "calm"), **options)
    rows = []
    for seed in range(3):
        callbacks = Tell("on_train_batch_start", 1), RunGuard(), checkpoint(tmp_path)
        _, part, code = fit(base, tmp_path, *callbacks, ckpt_path="last" if seed else None, seed=seed, **options)
        assert code == 143
        rows += part.rows
    end, part, code = fit(base, tmp_path, RunGuard(), checkpoint(tmp_path), ckpt_path="last", seed=9, **options)
    assert code is None
    assert rows + part.rows == record.rows
    assert_equal(final_state(calm), final_state(end))


def test_other_callbacks_see_the_last_batch_before_it_is_published(base, tmp_path):
    class Counts(L.Callback):
        seen = 0
        state_key = "Counts"

        def on_train_batch_end(self, *args):
            self.seen += 1

        def state_dict(self):
            return {"seen": self.seen}

    fit(base, tmp_path, Tell("on_train_batch_start", 2), RunGuard(), Counts(), checkpoint(tmp_path))
    folder = LocalStore(tmp_path / "checkpoints").newest_valid().path
    assert torch.load(f"{folder}/trainer.ckpt", weights_only=True)["callbacks"]["Counts"] == {"seen": 3}


def test_before_the_first_step_there_is_nothing_to_save(base, tmp_path):
    tell = Tell("on_sanity_check_start", 0)
    trainer, record, code = fit(base, tmp_path, RunGuard(), tell, checkpoint(tmp_path), num_sanity_val_steps=1)
    assert (code, trainer.global_step, record.rows) == (143, 0, [])
    assert not (tmp_path / "checkpoints").exists()


def test_the_handlers_from_before_are_put_back(base, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    fit(base, tmp_path, RunGuard(), checkpoint(tmp_path), max_steps=1)
    fit(base, tmp_path / "b", Tell("on_train_batch_start", 0), RunGuard(), checkpoint(tmp_path / "b"))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_without_adapter_checkpoint_it_still_ends_between_steps(base, tmp_path):
    tell = Tell("on_train_batch_start", 1)
    with pytest.warns(UserWarning, match="finds no AdapterCheckpoint"):
        trainer, record, code = fit(
            base, tmp_path, tell, RunGuard(), ModelCheckpoint(tmp_path / "c"), accumulate_grad_batches=2
        )
    assert (code, trainer.global_step, len(record.rows)) == (143, 1, 2)


def test_slurm_requeue_happens_at_the_boundary(base, tmp_path, monkeypatch):
    calls = []
    job = {"NTASKS": "1", "JOB_ID": "5", "JOB_NAME": "train", "LOCALID": "0", "NODEID": "0", "PROCID": "0"}
    for name, value in {**job, "NTASKS_PER_NODE": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    scontrol = "lightning.pytorch.trainer.connectors.signal_connector.call"
    monkeypatch.setattr(scontrol, lambda command: calls.append(command) or 0)
    tell = Tell("on_after_backward", 0, signal.SIGUSR1)
    trainer, _, code = fit(base, tmp_path, tell, RunGuard(), checkpoint(tmp_path), accumulate_grad_batches=2)
    assert (code, trainer.global_step) == (143, 1)
    assert calls == [["scontrol", "requeue", "5"]]
    assert torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 1
    assert LocalStore(tmp_path / "checkpoints").newest_valid().metadata["step"] == 1


# Non-finite numbers


class SpoilLoss(SFTModule):
    """Returns a loss that is not finite for one batch."""

    spoiled: tuple[int, ...] = (4, 5)
    value = math.nan
    how = "loss"

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if tuple(batch["row_ids"]) != self.spoiled:
            return loss
        if self.how == "loss":
            return loss * self.value
        # Only the gradient: finite forward, infinite backward.
        weight = next(p for p in self.parameters() if p.requires_grad)
        return loss + torch.sqrt((weight.view(-1)[:1] * 0.0).abs()).sum()


def spoiled_module(base, **attributes):
    module = tiny_module(base, dropout=0.0)
    module.__class__ = type("Spoiled", (SpoilLoss,), attributes)
    return module


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_stops_before_the_update(base, tmp_path, accumulate, how):
    module = spoiled_module(base, how=how, spoiled=(8, 9))  # the last batch of the epoch
    before = {}

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            before.clear()
            before.update(weights(module))

    with pytest.raises(NonFiniteError, match=rf"{how} is NaN or infinite") as raised:
        fit(base, tmp_path, Watch(), RunGuard(), checkpoint(tmp_path, every_n_train_steps=1), module=module,
            accumulate_grad_batches=accumulate)  # fmt: skip
    assert_equal(before, weights(module))
    assert "train.jsonl:9, train.jsonl:10" in str(raised.value)
    newest = LocalStore(tmp_path / "checkpoints").newest_valid()
    assert newest.metadata["step"] == {1: 5, 4: 1}[accumulate]
    saved = sorted((tmp_path / "nonfinite").iterdir())
    assert [p.suffix for p in saved] == [".json", ".pt"]
    named = json.loads(saved[0].read_text())
    if how == "loss":
        assert [entry["rows"] for entry in named] == [["train.jsonl:9", "train.jsonl:10"]]
    batches = torch.load(saved[1], weights_only=True)
    assert batches[-1]["row_ids"] == [8, 9]
    assert batches[-1]["input_ids"].dtype == torch.int64


@pytest.mark.soak
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", range(6))
def test_stops_before_any_nonfinite_update(base, tmp_path, accumulate, value, row):
    module = spoiled_module(base, value=value, spoiled=(2 * row, 2 * row + 1))
    with pytest.raises(NonFiniteError):
        fit(base, tmp_path, RunGuard(), checkpoint(tmp_path), module=module, accumulate_grad_batches=accumulate)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in module.state_dict().values())


def test_skips_and_goes_on(base, tmp_path):
    module = spoiled_module(base)
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            seen.append(weights(module))

    guard = RunGuard(on_nonfinite="skip")
    with pytest.warns(UserWarning, match=r"left out \(1 of at most 3\)"):
        trainer, record, code = fit(base, tmp_path, Watch(), guard, checkpoint(tmp_path), module=module)
    index = record.rows.index([4, 5])
    assert (code, trainer.global_step, guard.num_skipped) == (None, 6, 1)
    assert_equal(seen[index], seen[index - 1])
    assert not torch.equal(next(iter(seen[index + 1].values())), next(iter(seen[index].values())))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in module.state_dict().values())
    state = trainer.optimizers[0].state_dict()["state"]
    assert all(bool(torch.isfinite(value).all()) for entry in state.values() for value in entry.values())


@pytest.mark.filterwarnings("ignore:(?s).*left out")
def test_stops_after_so_many_skips(base, tmp_path):
    module = spoiled_module(base)
    guard = RunGuard(on_nonfinite="skip", max_skips=2)
    with pytest.raises(NonFiniteError, match="2 updates have been left out before"):
        fit(base, tmp_path, guard, checkpoint(tmp_path), module=module, max_epochs=5)
    assert guard.num_skipped == 2


@pytest.mark.filterwarnings("ignore:(?s).*left out")
def test_skips_are_counted_across_restarts(base, tmp_path):
    module = spoiled_module(base)
    fit(base, tmp_path, RunGuard("skip"), checkpoint(tmp_path), module=module)
    guard = RunGuard("skip")
    fit(base, tmp_path, guard, checkpoint(tmp_path), module=spoiled_module(base), max_epochs=2, ckpt_path="last")
    assert guard.num_skipped == 2


def test_a_report_that_cannot_be_written_does_not_hide_the_error(base, tmp_path):
    (tmp_path / "file").touch()
    guard = RunGuard(report_dir=str(tmp_path / "file/x"))
    with pytest.raises(NonFiniteError, match=r"saved to nowhere \(.*Not a directory"):
        fit(base, tmp_path, guard, checkpoint(tmp_path), module=spoiled_module(base))


class AllMasked(TinyData):
    """One batch has no supervised token."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        if tuple(batch["row_ids"]) == (4, 5):
            empty, masked = batch["targets"][:0], torch.full_like(batch["labels"], -100)
            return {**batch, "targets": empty, "target_positions": empty, "labels": masked}
        return batch


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_batch_without_supervised_tokens_is_zero_not_nan(base, tmp_path, accumulate):
    trainer, record, code = fit(
        base, tmp_path, RunGuard(), checkpoint(tmp_path), data=AllMasked(), accumulate_grad_batches=accumulate
    )
    assert (code, trainer.global_step) == (None, 6 // accumulate)
    assert record.losses[record.rows.index([4, 5])] == 0


class FakeScaler:
    def __init__(self, scale):
        self.scale = scale

    def get_scale(self):
        return self.scale


@pytest.mark.parametrize(("scale", "stops"), [(65536.0, False), (1.0, True)])
def test_a_loss_scaler_is_left_to_cope(base, tmp_path, monkeypatch, scale, stops):
    module = spoiled_module(base, how="gradient", spoiled=(8, 9))  # the last batch of the epoch
    guard = RunGuard()
    trainer = tiny_trainer(tmp_path, guard, checkpoint(tmp_path), max_epochs=1, gradient_clip_val=None)
    trainer.precision_plugin.scaler = FakeScaler(scale)
    if stops:
        with pytest.raises(NonFiniteError):
            trainer.fit(module, datamodule=TinyData())
    else:
        with pytest.raises(ValueError, match="not published"):  # nothing skipped the update here; no scaler is real
            trainer.fit(module, datamodule=TinyData())


# Spikes


def test_a_jump_of_the_loss_is_told(base, tmp_path):
    class Jump(SFTModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * 50 if batch_idx == 20 else loss

    module = tiny_module(base)
    module.__class__ = Jump
    with pytest.warns(UserWarning, match=r"The loss jumped to .* at step 20, from about .*rows: train\.jsonl"):
        fit(base, tmp_path, RunGuard(), checkpoint(tmp_path), module=module, data=TinyData(batches=24))


def test_an_ordinary_run_has_no_jumps(base, tmp_path, recwarn):
    fit(base, tmp_path, RunGuard(), checkpoint(tmp_path), data=TinyData(batches=40))
    assert not [w for w in recwarn if "jumped" in str(w.message)]


def test_a_loss_that_stays_high_is_told(base, tmp_path):
    class Worse(SFTModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * 1.2 if batch_idx >= 30 else loss

    module = tiny_module(base, lr=1e-6)
    module.__class__ = Worse
    with pytest.warns(
        UserWarning, match=r"The loss has risen to about \d.* over the 8 steps up to step 3\d, from about"
    ):
        fit(base, tmp_path, RunGuard(), checkpoint(tmp_path), module=module, data=TinyData(batches=44))


def test_no_threshold_no_warning(base, tmp_path, recwarn):
    class Jump(SFTModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (50 if batch_idx == 20 else 1)

    module = tiny_module(base)
    module.__class__ = Jump
    guard = RunGuard(spike_threshold=None)
    fit(base, tmp_path, guard, checkpoint(tmp_path), module=module, data=TinyData(batches=24))
    assert not [w for w in recwarn if "jumped" in str(w.message)]


# Memory


PLACES = {"training_step": 3, "backward": 3, "optimizer_step": 3, "validation_step": 1}


def hungry(base, place, error=None, at=None):
    """A module that runs out of memory at the n-th call of a hook."""
    calls = []

    def fail(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == (at or PLACES.get(place, 1)):
            raise error or torch.OutOfMemoryError("CUDA out of memory.")
        return getattr(SFTModule, place)(self, *args, **kwargs)

    module = tiny_module(base)
    module.__class__ = type("Hungry", (SFTModule,), {place: fail})
    return module


class Sizes(L.Callback):
    """How many tokens the batches have, and the weights after each step."""

    def __init__(self):
        self.batches, self.weights = [], {}

    def on_train_batch_start(self, trainer, module, batch, index):
        self.batches.append(batch["input_ids"].shape)

    def on_train_batch_end(self, trainer, module, *args):
        self.weights[trainer.global_step] = weights(module)


@pytest.mark.parametrize("place", PLACES)
def test_out_of_memory_says_what_did_not_fit(base, tmp_path, place, caplog):
    module = hungry(base, place)
    with caplog.at_level(logging.ERROR), pytest.raises(torch.OutOfMemoryError) as raised:
        fit(base, tmp_path, RunGuard(), checkpoint(tmp_path, every_n_train_steps=1), module=module)
    note = "".join(raised.value.__notes__)
    assert "tokens, 2 documents of at most" in note
    assert "tokens_per_batch" in note
    assert ("validation" in note.splitlines()[0]) == (place == "validation_step")
    assert note in caplog.text
    expected = 6 if place == "validation_step" else 2
    assert LocalStore(tmp_path / "checkpoints").newest_valid().metadata["step"] == expected


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("place", ["training_step", "backward", "optimizer_step"])
def test_out_of_memory_leaves_no_partial_update_and_the_batches_as_they_were(base, tmp_path, place, accumulate):
    options = {"accumulate_grad_batches": accumulate, "max_epochs": 2}
    whole = Sizes()
    fit(base, tmp_path / "calm", whole, checkpoint(tmp_path / "calm"), **options)
    module, sizes = hungry(base, place, at=4), Sizes()
    publish = checkpoint(tmp_path, every_n_train_steps=1, save_on_exception=True)
    with pytest.raises(torch.OutOfMemoryError):
        fit(base, tmp_path, sizes, RunGuard(), publish, module=module, **options)
    assert_equal(weights(module), whole.weights[max(sizes.weights)])
    resumed = Sizes()
    trainer, _, _ = fit(base, tmp_path, resumed, RunGuard(), publish, ckpt_path="last", seed=5, **options)
    assert resumed.batches == whole.batches[-len(resumed.batches) :]
    assert_equal(weights(trainer.lightning_module), whole.weights[max(whole.weights)])


@pytest.mark.parametrize(("stage", "place"), [("test", "test_step"), ("predict", "predict_step")])
def test_out_of_memory_in_other_stages(base, tmp_path, stage, place):
    class Data(TinyData):
        test_dataloader = predict_dataloader = TinyData.val_dataloader

    module = hungry(base, place)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        getattr(tiny_trainer(tmp_path, RunGuard()), stage)(module, datamodule=Data())
    note = "".join(raised.value.__notes__)
    assert f"Out of memory in {stage[:4]}" in note
    assert "tokens, 2 documents" in note
    assert "checkpoint" not in note


def test_out_of_memory_of_a_cpu(base, tmp_path):
    error = RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory")
    with pytest.raises(RuntimeError) as raised:
        fit(base, tmp_path, RunGuard(), checkpoint(tmp_path), module=hungry(base, "backward", error))
    assert "Out of memory in training at step 2" in "".join(raised.value.__notes__)


def test_out_of_memory_of_a_gpu_shows_its_memory(base, tmp_path, monkeypatch):
    trainer, _, _ = fit(base, tmp_path, max_steps=1)
    figures = {"memory_allocated": 3, "memory_reserved": 5, "max_memory_allocated": 4}
    for name, gib in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, gib=gib: gib * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**29, 8 * 2**30))
    monkeypatch.setattr(type(trainer.strategy), "root_device", torch.device("cuda:0"))
    table = _out_of_memory_note(trainer, {"input_ids": torch.zeros(2, 7)})
    for words in (
        "2 x 7 = 14 tokens",
        "allocated     3.00 GiB",
        "reserved      5.00",
        "free          0.50 GiB of 8.00",
    ):
        assert words in table


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_nonfinite": "ignore"}, "on_nonfinite is 'ignore'; allowed are stop, skip"),
        ({"max_skips": 0}, "max_skips is 0"),
        ({"spike_threshold": 0}, "spike_threshold is 0"),
        ({"signals": ["SIGKILL"]}, "signals names SIGKILL; allowed are .*SIGTERM"),
        ({"signals": ["TERM"]}, "signals names TERM"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        RunGuard(**options)
