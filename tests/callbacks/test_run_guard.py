import copy
import functools
import json
import math
import os
import signal

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_run import (
    Job,
    LateGuard,
    TinyData,
    assert_equal,
    final_state,
    fit_to_exit,
    make_jobs,
    tiny_module,
    tiny_trainer,
    trained_tensors,
)

from lightning_qlora.callbacks import AdapterCheckpoint, RunGuard
from lightning_qlora.callbacks.run_guard import NonFiniteError
from lightning_qlora.checkpoints.publishing import LocalStore
from lightning_qlora.modules.sft import SFTModule


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return make_jobs(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def base(jobs):
    return jobs["SFT"].base


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


def check_preemption(job, tmp_path, calm, hook, at, number=signal.SIGTERM, times=1, **options):
    """Interrupt a run, continue it, and compare it with the one that was not interrupted."""
    trainer, record, code = calm
    assert code is None
    tell = Tell(hook, at, number, times)
    _, first, code = fit_to_exit(job, tmp_path, tell, RunGuard(), checkpoint(tmp_path), **options)
    assert code == 143
    options |= {"ckpt_path": "last", "seed": 7}
    resumed, second, code = fit_to_exit(job, tmp_path, RunGuard(), checkpoint(tmp_path), **options)
    assert code is None
    assert first.rows + second.rows == record.rows  # none lost, none repeated
    assert first.losses + second.losses == record.losses
    assert_equal(final_state(trainer), final_state(resumed))


OPTIONS = {1: {"val_check_interval": 3}, 4: {"accumulate_grad_batches": 4, "val_check_interval": 3}}


@pytest.fixture(scope="module")
def calm(jobs, tmp_path_factory):
    """Run a job without an interruption, once for all that ask for the same."""

    @functools.cache
    def run(kind, accumulate):
        root = tmp_path_factory.mktemp("calm")
        return fit_to_exit(jobs[kind], root, checkpoint(root), **OPTIONS[accumulate])

    return run


@pytest.mark.parametrize(
    ("kind", "accumulate", "hook", "at", "number", "times"),
    [
        ("SFT", 1, "on_train_batch_start", 0, signal.SIGTERM, 1),
        ("SFT", 1, "on_train_batch_end", 2, signal.SIGUSR1, 1),
        ("SFT", 1, "on_validation_batch_start", 1, signal.SIGTERM, 2),
        ("SFT", 4, "on_after_backward", 1, signal.SIGTERM, 3),
        ("SFT", 4, "on_validation_batch_start", 0, signal.SIGUSR1, 1),
        ("DPO", 1, "on_validation_batch_start", 1, signal.SIGTERM, 2),
        ("DPO", 4, "on_after_backward", 1, signal.SIGTERM, 3),
        ("ORPO", 1, "on_train_batch_end", 2, signal.SIGUSR1, 1),
        ("ORPO", 4, "on_train_batch_start", 2, signal.SIGTERM, 1),
    ],
)
def test_a_signal_loses_nothing(jobs, tmp_path, calm, kind, accumulate, hook, at, number, times):
    check_preemption(jobs[kind], tmp_path, calm(kind, accumulate), hook, at, number, times, **OPTIONS[accumulate])


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
@pytest.mark.parametrize(
    ("kind", "number"),
    [("SFT", signal.SIGTERM), ("SFT", signal.SIGUSR1), ("DPO", signal.SIGTERM), ("ORPO", signal.SIGUSR1)],
)
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(("hook", "times"), HOOKS.items())
def test_a_signal_anywhere_loses_nothing(jobs, tmp_path, kind, accumulate, hook, times, number):
    job, options = jobs[kind], {**OPTIONS[accumulate], "max_epochs": 2}
    calm = fit_to_exit(job, tmp_path / "calm", checkpoint(tmp_path / "calm"), **options)
    for at in range(0, times, 1 if kind == "SFT" else 2):
        check_preemption(job, tmp_path / str(at), calm, hook, at, number, times=1 + at % 2, **options)


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_three_interruptions_in_a_row(jobs, tmp_path, kind):
    job = jobs[kind]
    options = {"max_epochs": 2, "accumulate_grad_batches": 2, "val_check_interval": 3}
    calm, record, _ = fit_to_exit(job, tmp_path / "calm", checkpoint(tmp_path / "calm"), **options)
    rows = []
    for seed in range(3):
        callbacks = Tell("on_train_batch_start", 1), RunGuard(), checkpoint(tmp_path)
        _, part, code = fit_to_exit(job, tmp_path, *callbacks, ckpt_path="last" if seed else None, seed=seed, **options)
        assert code == 143
        rows += part.rows
    end, part, code = fit_to_exit(job, tmp_path, RunGuard(), checkpoint(tmp_path), ckpt_path="last", seed=9, **options)
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

    fit_to_exit(base, tmp_path, Tell("on_train_batch_start", 2), RunGuard(), Counts(), checkpoint(tmp_path))
    folder = LocalStore(tmp_path / "checkpoints").newest_valid().path
    assert torch.load(f"{folder}/trainer.ckpt", weights_only=True)["callbacks"]["Counts"] == {"seen": 3}


def test_before_the_first_step_there_is_nothing_to_save(base, tmp_path):
    tell = Tell("on_sanity_check_start", 0)
    trainer, record, code = fit_to_exit(base, tmp_path, RunGuard(), tell, checkpoint(tmp_path), num_sanity_val_steps=1)
    assert (code, trainer.global_step, record.rows) == (143, 0, [])
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("loader", "sanity"), [("train_dataloader", 0), ("train_dataloader", 1), ("val_dataloader", 1)]
)
def test_a_signal_while_the_first_loaders_are_made(base, tmp_path, loader, sanity):
    """Lightning listens by then, and would exit with 0."""

    def make(data):
        os.kill(os.getpid(), signal.SIGTERM)
        return getattr(TinyData, loader)(data)

    data = type("Data", (TinyData,), {loader: make})()
    module = tiny_module(base, lr_scheduler=None)  # a schedule would ask for the loader earlier
    options = {"module": module, "data": data, "num_sanity_val_steps": sanity}
    trainer, record, code = fit_to_exit(base, tmp_path, RunGuard(), checkpoint(tmp_path), **options)
    assert (code, trainer.global_step, record.rows) == (143, 0, [])


def test_the_handlers_from_before_are_put_back(base, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    fit_to_exit(base, tmp_path, RunGuard(), checkpoint(tmp_path), max_steps=1)
    fit_to_exit(base, tmp_path / "b", Tell("on_train_batch_start", 0), RunGuard(), checkpoint(tmp_path / "b"))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_without_adapter_checkpoint_it_still_ends_between_steps(base, tmp_path):
    tell = Tell("on_train_batch_start", 1)
    with pytest.warns(UserWarning, match="finds no AdapterCheckpoint"):
        trainer, record, code = fit_to_exit(
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
    trainer, _, code = fit_to_exit(base, tmp_path, tell, RunGuard(), checkpoint(tmp_path), accumulate_grad_batches=2)
    assert (code, trainer.global_step) == (143, 1)
    assert calls == [["scontrol", "requeue", "5"]]
    assert torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 1
    assert LocalStore(tmp_path / "checkpoints").newest_valid().metadata["step"] == 1


# Non-finite numbers


class SpoilLoss:
    """Returns a loss that is not finite for one batch, in front of a module's class."""

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


def spoiled_module(job, **attributes):
    module = (Job(job) if isinstance(job, str) else job).module(dropout=0.0)
    module.__class__ = type("Spoiled", (SpoilLoss, type(module)), attributes)
    return module


@pytest.mark.parametrize("guard", [RunGuard, LateGuard])
@pytest.mark.parametrize(
    ("kind", "accumulate", "how"),
    [("SFT", a, how) for a in (1, 4) for how in ("loss", "gradient")] + [("DPO", 4, "loss"), ("ORPO", 1, "gradient")],
)
def test_stops_before_the_update(jobs, tmp_path, kind, accumulate, how, guard):
    job = jobs[kind]
    module = spoiled_module(job, how=how, spoiled=(8, 9))  # the last batch of the epoch
    before = {}

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            before.clear()
            before.update(trained_tensors(module))

    with pytest.raises(NonFiniteError, match=rf"{how} is NaN or infinite") as raised:
        fit_to_exit(job, tmp_path, Watch(), guard(), checkpoint(tmp_path, every_n_train_steps=1), module=module,
            accumulate_grad_batches=accumulate)  # fmt: skip
    assert_equal(before, trained_tensors(module))
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
@pytest.mark.parametrize("guard", [RunGuard, LateGuard])
def test_stops_before_any_nonfinite_update(base, tmp_path, accumulate, value, row, guard):
    module = spoiled_module(base, value=value, spoiled=(2 * row, 2 * row + 1))
    with pytest.raises(NonFiniteError):
        fit_to_exit(base, tmp_path, guard(), checkpoint(tmp_path), module=module, accumulate_grad_batches=accumulate)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in module.state_dict().values())


@pytest.mark.parametrize("kind", [RunGuard, LateGuard])
def test_skips_and_goes_on(base, tmp_path, kind):
    module = spoiled_module(base)
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            seen.append(trained_tensors(module))

    guard = kind(on_nonfinite="skip")
    with pytest.warns(UserWarning, match=r"left out \(1 of at most 3\)"):
        trainer, record, code = fit_to_exit(base, tmp_path, Watch(), guard, checkpoint(tmp_path), module=module)
    index = record.rows.index([4, 5])
    assert (code, trainer.global_step, guard.num_skipped) == (None, 6, 1)
    assert_equal(seen[index], seen[index - 1])
    assert not torch.equal(next(iter(seen[index + 1].values())), next(iter(seen[index].values())))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in module.state_dict().values())
    state = trainer.optimizers[0].state_dict()["state"]
    assert all(bool(torch.isfinite(value).all()) for entry in state.values() for value in entry.values())


@pytest.mark.parametrize("kind", [RunGuard, LateGuard])
@pytest.mark.filterwarnings("ignore:(?s).*left out")
def test_stops_after_so_many_skips(base, tmp_path, kind):
    module = spoiled_module(base)
    guard = kind(on_nonfinite="skip", max_skips=2)
    with pytest.raises(NonFiniteError, match="2 updates have been left out before"):
        fit_to_exit(base, tmp_path, guard, checkpoint(tmp_path), module=module, max_epochs=5)
    assert guard.num_skipped == 2


@pytest.mark.parametrize("spoiled", [(4, 5), (8, 9)])  # of the epoch's last one the step is checked when it is saved
@pytest.mark.parametrize("kind", [RunGuard, LateGuard])
@pytest.mark.filterwarnings("ignore:(?s).*left out")
def test_skips_are_counted_across_restarts(base, tmp_path, kind, spoiled):
    fit_to_exit(base, tmp_path, kind("skip"), checkpoint(tmp_path), module=spoiled_module(base, spoiled=spoiled))
    guard = kind("skip")
    fit_to_exit(
        base, tmp_path, guard, checkpoint(tmp_path), module=spoiled_module(base), max_epochs=2, ckpt_path="last"
    )
    assert guard.num_skipped == 2


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_gpu_leaves_the_update_out(base, tmp_path, how, fused):
    states, pending = [], []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            states.append([trained_tensors(module), copy.deepcopy(trainer.optimizers[0].state_dict()["state"])])
            pending.append(guard._pending is not None)

    optimizer = functools.partial(torch.optim.AdamW, fused=fused, weight_decay=0.1)
    for name in ("skip", "stop"):
        states.clear()
        guard = RunGuard(on_nonfinite=name)
        module = spoiled_module(base, how=how)
        module.optimizer = optimizer
        run = functools.partial(fit_to_exit, base, tmp_path / name, guard, Watch(), checkpoint(tmp_path / name),
            module=module, accelerator="gpu", precision="bf16-mixed")  # fmt: skip
        if name == "skip":
            _, record, _ = run()
            index = record.rows.index([4, 5])
            assert guard.num_skipped == 1
            assert_equal(states[index], states[index - 1])
            assert not torch.equal(next(iter(states[-1][0].values())), next(iter(states[index][0].values())))
        else:
            with pytest.raises(NonFiniteError, match=rf"{how} is NaN or infinite.*\n.*train.jsonl:5"):
                run()
            before = {name: tensor.cpu() for name, tensor in states[index - 1][0].items()}
            assert_equal(before, trained_tensors(module))  # which fit has brought back to the host
            assert len(states) == index + fused
    assert all(pending) if fused else not any(pending)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_is_checked_before_its_adapter_is_validated(base, tmp_path, how):
    trained, validated = [], []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            trained.append(trainer.global_step)

        def on_validation_batch_start(self, trainer, *args):
            validated.append(trainer.global_step)

    with pytest.raises(NonFiniteError):
        fit_to_exit(base, tmp_path, LateGuard(), Watch(), checkpoint(tmp_path), val_check_interval=1,
            module=spoiled_module(base, how=how))  # fmt: skip
    assert validated[-1] == trained[-1] - 1


@pytest.mark.parametrize("is_spoiled", [False, True])
def test_what_a_device_decided_is_over_with_the_step(base, tmp_path, is_spoiled):
    told, optimizers = [], []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            optimizers[:] = trainer.optimizers
            told.append(hasattr(trainer.optimizers[0], "found_inf"))

    run = functools.partial(fit_to_exit, base, tmp_path, LateGuard(), Watch(), checkpoint(tmp_path))
    if is_spoiled:
        with pytest.raises(NonFiniteError):
            run(module=spoiled_module(base))
    else:
        run()
    assert told
    assert not any(told)
    assert not hasattr(optimizers[0], "found_inf")


def test_a_step_that_is_checked_late_is_the_same_step(base, tmp_path):
    states = [fit_to_exit(base, tmp_path / kind.__name__, kind(), checkpoint(tmp_path / kind.__name__))
        for kind in (RunGuard, LateGuard)]  # fmt: skip
    assert_equal(*(final_state(trainer) for trainer, _, _ in states))
    assert states[0][1].losses == states[1][1].losses


def test_a_report_that_cannot_be_written_does_not_hide_the_error(base, tmp_path):
    (tmp_path / "file").touch()
    guard = RunGuard(report_dir=str(tmp_path / "file/x"))
    with pytest.raises(NonFiniteError, match=r"saved to nowhere \(.*Not a directory"):
        fit_to_exit(base, tmp_path, guard, checkpoint(tmp_path), module=spoiled_module(base))


class AllMasked(TinyData):
    """One batch has no supervised token."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        if tuple(batch["row_ids"]) == (4, 5):
            empty, masked = batch["targets"][:0], torch.full_like(batch["labels"], -100)
            return {**batch, "targets": empty, "target_positions": empty, "labels": masked}
        return batch


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_batch_without_supervised_tokens_is_zero_not_nan(base, tmp_path, accumulate):
    trainer, record, code = fit_to_exit(
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


@pytest.mark.parametrize("guard", [RunGuard, LateGuard])
def test_a_jump_of_the_loss_is_told(base, tmp_path, guard):
    class Jump(SFTModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * 50 if batch_idx == 20 else loss

    module = tiny_module(base)
    module.__class__ = Jump
    with pytest.warns(UserWarning, match=r"The loss jumped to .* at step 20, from about .*rows: train\.jsonl"):
        fit_to_exit(base, tmp_path, guard(), checkpoint(tmp_path), module=module, data=TinyData(batches=24))


def test_an_ordinary_run_has_no_jumps(base, tmp_path, recwarn):
    fit_to_exit(base, tmp_path, RunGuard(), checkpoint(tmp_path), data=TinyData(batches=40))
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
        fit_to_exit(base, tmp_path, RunGuard(), checkpoint(tmp_path), module=module, data=TinyData(batches=44))


def test_no_threshold_no_warning(base, tmp_path, recwarn):
    class Jump(SFTModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (50 if batch_idx == 20 else 1)

    module = tiny_module(base)
    module.__class__ = Jump
    guard = RunGuard(spike_threshold=None)
    fit_to_exit(base, tmp_path, guard, checkpoint(tmp_path), module=module, data=TinyData(batches=24))
    assert not [w for w in recwarn if "jumped" in str(w.message)]


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
