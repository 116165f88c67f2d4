from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_chats import Recorder, fit, make_data, write_chats
from tiny_pairs import pair_data, write_pairs

from lightning_qlora.data.resume import TrainingPosition, check_identity, gather_states, hash_arrays

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # the saving callback is left out
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_chats(folder / "train.jsonl", 24)
    write_chats(folder / "validation.jsonl", 6, first=1000)
    write_pairs(folder / "train_pairs.jsonl", 24)
    write_pairs(folder / "validation_pairs.jsonl", 6, first=1000)
    return folder


def data(folder: Path, *, pairs: bool = False, **options: Any):
    if pairs:
        validation = str(folder / "validation_pairs.jsonl")
        return pair_data(folder / "train_pairs.jsonl", folder / "cache", validation=validation, **options)
    return make_data(folder / "train.jsonl", folder / "cache", validation=str(folder / "validation.jsonl"), **options)


def save_everywhere(where: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=where, filename="{epoch}-{step}", save_top_k=-1, **options)


STEPS = {"every_n_train_steps": 1}
EPOCHS = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
VALIDATIONS = {"every_n_epochs": 1, "save_on_train_epoch_end": False}

RUNS = [
    pytest.param({"max_epochs": 3, "limit_val_batches": 0}, STEPS, id="steps"),
    pytest.param({"max_epochs": 3, "limit_val_batches": 0}, EPOCHS, id="epochs"),
    pytest.param({"max_epochs": 3}, VALIDATIONS, id="validations"),
    pytest.param({"max_epochs": 2, "val_check_interval": 2}, STEPS, id="steps-validation-within"),
    pytest.param({"max_epochs": 2, "val_check_interval": 2}, VALIDATIONS, id="validations-within"),
    pytest.param({"max_epochs": 2, "accumulate_grad_batches": 3, "val_check_interval": 2}, STEPS, id="accumulated"),
    pytest.param({"max_steps": 11, "val_check_interval": 3}, STEPS, id="max-steps"),
    pytest.param({"max_epochs": 3, "max_steps": 100}, EPOCHS, id="max-steps-epochs"),
    pytest.param({"max_epochs": 3, "limit_train_batches": 4, "limit_val_batches": 0}, STEPS, id="limited"),
    pytest.param({"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1, "limit_val_batches": 0}, STEPS, id="reload"),
]


@pytest.mark.parametrize(("trainer", "saving"), RUNS)
def test_resumed_run_goes_on_with_the_next_batch(folder, tmp_path, trainer, saving):
    check_every_checkpoint(folder, tmp_path, trainer, saving)


PAIRS = [{"share_prompts": True}, {"packing": False}, {"unpaired": True}]


@pytest.mark.parametrize("options", PAIRS, ids=str)
def test_so_does_one_over_pairs(folder, tmp_path, options):
    trainer = {"max_epochs": 2, "val_check_interval": 2}
    check_every_checkpoint(folder, tmp_path, trainer, {"every_n_train_steps": 4}, pairs=True, **options)


def test_a_schedule_that_asks_for_the_number_of_steps_loses_no_position(folder, tmp_path):
    check_every_checkpoint(folder, tmp_path, {"max_epochs": 2, "val_check_interval": 2}, STEPS, ask_for_steps=True)


def check_every_checkpoint(folder, tmp_path, trainer, saving, *, ask_for_steps=False, **options):
    whole = fit(data(folder, **options), callbacks=[save_everywhere(tmp_path, **saving)], **trainer)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) >= 2
    for checkpoint in checkpoints:
        recorder = Recorder(ask_for_steps=ask_for_steps)
        resumed = fit(data(folder, **options), recorder, ckpt_path=str(checkpoint), **trainer)
        done = len(whole.seen) - len(resumed.seen)
        assert resumed.seen == whole.seen[done:], checkpoint.name
        assert resumed.weight.item() == whole.weight.item()
        steps = [step for step in whole.optimizer_steps if step > done]
        assert [done + step for step in resumed.optimizer_steps] == steps
        # A validation that was due at the checkpoint's batch may be run again; later ones are where they were.
        assert [done + v for v in resumed.validated_after if v] == [v for v in whole.validated_after if v > done]


def test_every_row_is_seen_once_an_epoch_in_another_order(folder):
    seen = fit(data(folder), max_epochs=3, limit_val_batches=0).seen
    orders = [[rows for epoch, _, rows in seen if epoch == number] for number in range(3)]
    for order in orders:
        assert sorted(itertools.chain.from_iterable(order)) == list(range(24))
        assert set(order) == set(orders[0])  # the same batches ...
    assert orders[0] != orders[1] != orders[2] != orders[0]  # ... in another order


@pytest.mark.parametrize("packing", [True, False])
def test_workers_and_three_interruptions(folder, tmp_path, packing):
    options = {"num_workers": 2, "packing": packing}
    trainer = {"max_epochs": 3, "limit_val_batches": 0}
    whole = fit(data(folder, packing=packing), **trainer)
    per_epoch = len(whole.seen) // 3
    seen: list[Any] = []
    checkpoint = None
    for stop in (2, per_epoch, 2 * per_epoch - 1, len(whole.seen)):  # within, at the end, within, to the end
        module = fit(
            data(folder, **options),
            ckpt_path=checkpoint,
            callbacks=[_StopAt(stop, tmp_path / f"{stop}.ckpt")],
            **trainer,
        )
        seen += module.seen
        checkpoint = str(tmp_path / f"{stop}.ckpt")
    assert seen == whole.seen
    assert module.weight.item() == whole.weight.item()


class _StopAt(Callback):
    """Save after a number of batches, counted over the whole run, and stop as a killed process would."""

    def __init__(self, batches: int, path: Path) -> None:
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.batches:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def test_a_batch_that_failed_is_trained_on_again(folder, tmp_path):
    class Failing(Recorder):
        def training_step(self, batch, batch_idx):
            if len(self.seen) == 3:
                raise RuntimeError("out of memory")
            return super().training_step(batch, batch_idx)

    class SaveOnException(Callback):
        def on_exception(self, trainer, module, exception) -> None:
            trainer.save_checkpoint(tmp_path / "failed.ckpt")

    whole = fit(data(folder), max_epochs=1, limit_val_batches=0)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(data(folder), Failing(), max_epochs=1, limit_val_batches=0, callbacks=[SaveOnException()])
    resumed = fit(data(folder), ckpt_path=str(tmp_path / "failed.ckpt"), max_epochs=1, limit_val_batches=0)
    assert [rows for _, _, rows in resumed.seen] == [rows for _, _, rows in whole.seen[3:]]


class Unrepaired(Recorder):
    """A module that leaves Lightning's counters as they were saved."""

    def on_load_checkpoint(self, checkpoint) -> None:
        pass


def test_rows_that_lightning_would_skip_are_refused(folder, tmp_path):
    trainer = {"max_epochs": 3, "max_steps": 1000, "limit_val_batches": 0}
    fit(data(folder), callbacks=[save_everywhere(tmp_path, **EPOCHS)], **trainer)
    checkpoint = next(tmp_path.glob("epoch=0*.ckpt"))
    with pytest.raises(MisconfigurationException, match=r"before batch 0 of epoch 1, and Lightning goes on with batch"):
        fit(data(folder), Unrepaired(), ckpt_path=str(checkpoint), **trainer)


def test_more_steps_continue_the_epoch_that_max_steps_ended(folder, tmp_path):
    whole = fit(data(folder), max_steps=10, limit_val_batches=0)
    fit(data(folder), max_steps=4, limit_val_batches=0, callbacks=[save_everywhere(tmp_path, **EPOCHS)])
    checkpoint = str(next(tmp_path.glob("*.ckpt")))
    resumed = fit(data(folder), ckpt_path=checkpoint, max_steps=10, limit_val_batches=0)
    assert resumed.seen == whole.seen[4:]
    with pytest.raises(MisconfigurationException, match="before batch 4 of epoch 0"):
        fit(data(folder), Unrepaired(), ckpt_path=checkpoint, max_steps=10, limit_val_batches=0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"tokens_per_batch": 400}, "tokens_per_batch"),
        ({"packing": False}, "packing"),
        ({"max_length": 191, "overlong": "keep_end"}, "length_and_supervision_policy"),
        ({"validation": None, "validation_fraction": 0.2}, "validation_fraction"),
    ],
)
def test_other_batches_are_refused_by_name(folder, tmp_path, change, named):
    trainer = {"max_epochs": 2, "limit_val_batches": 0}
    fit(data(folder), callbacks=[save_everywhere(tmp_path, **EPOCHS)], **trainer)
    options = {"validation": str(folder / "validation.jsonl"), **change}
    with pytest.raises(MisconfigurationException, match=rf"changed: .*\b{named}\b"):
        fit(
            make_data(folder / "train.jsonl", folder / "cache", **options),
            ckpt_path=str(next(tmp_path.glob("epoch=0*"))),
            **trainer,
        )


@pytest.mark.parametrize(
    ("change", "named"),
    [({"share_prompts": True}, "share_prompts"), ({"unpaired": True}, "task"), ({"seed": 1}, "seed")],
)
def test_other_batches_of_pairs_are_refused_by_name(folder, tmp_path, change, named):
    trainer = {"max_epochs": 2, "limit_val_batches": 0}
    fit(data(folder, pairs=True), callbacks=[save_everywhere(tmp_path, **EPOCHS)], **trainer)
    with pytest.raises(MisconfigurationException, match=rf"changed: .*\b{named}\b"):
        fit(data(folder, pairs=True, **change), ckpt_path=str(next(tmp_path.glob("epoch=0*"))), **trainer)


def test_other_rows_are_refused_but_only_for_training(folder, tmp_path):
    fit(data(folder), callbacks=[save_everywhere(tmp_path, **EPOCHS)], max_epochs=2, limit_val_batches=0)
    other = write_chats(tmp_path / "other.jsonl", 41)
    checkpoint = str(next(tmp_path.glob("epoch=0*")))
    with pytest.raises(MisconfigurationException, match=r"changed: data\."):
        fit(make_data(other, folder / "cache"), ckpt_path=checkpoint, max_epochs=2)
    module = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.validate(module, datamodule=make_data(other, folder / "cache", validation=str(other)), ckpt_path=checkpoint)
    assert len(list(itertools.chain.from_iterable(module.evaluated))) == 41


def test_code_that_prepares_the_same_rows_may_change(folder, tmp_path, monkeypatch):
    from lightning_qlora.data import encoding

    trainer = {"max_epochs": 2, "limit_val_batches": 0}
    whole = fit(data(folder), callbacks=[save_everywhere(tmp_path, **EPOCHS)], **trainer)
    monkeypatch.setattr(encoding, "_code_digest", lambda: "a later version")
    resumed = fit(data(folder), ckpt_path=str(next(tmp_path.glob("epoch=0*"))), **trainer)
    assert resumed.seen == whole.seen[len(whole.seen) // 2 :]


def test_checkpoints_hold_plain_values(folder, tmp_path):
    fit(data(folder), callbacks=[save_everywhere(tmp_path, **STEPS)], max_steps=2, limit_val_batches=0)
    state = torch.load(next(tmp_path.glob("*step=2*")), weights_only=True)["SFTDataModule"]
    assert (state["epoch"], state["batches_done"], state["world_size"]) == (0, 2, 1)


def test_another_number_of_processes_within_an_epoch_is_refused():
    position = TrainingPosition()
    position.load_state_dict({"epoch": 1, "batches_done": 0, "world_size": 2}, 1)
    with pytest.raises(MisconfigurationException, match="in the middle of an epoch by 2 processes; this run has 1"):
        position.load_state_dict({"epoch": 1, "batches_done": 3, "world_size": 2}, 1)


def test_a_position_is_used_once_and_only_where_lightning_agrees():
    current = SimpleNamespace(ready=3, processed=3)
    batches = SimpleNamespace(current=current, total=SimpleNamespace(processed=9), is_last_batch=False)
    trainer: Any = SimpleNamespace(
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=batches)),
        world_size=1,
        num_training_batches=9,
        overfit_batches=0,
    )
    position = TrainingPosition()
    assert position.begin(trainer, 0) == 0
    state = {"format": 1, "epoch": 1, "batches_done": 3, "world_size": 1}
    position.load_state_dict(state, 1)
    assert position.state_dict(trainer) == state  # saved again before a batch was trained on
    assert position.begin(trainer, 1) == 3
    assert position.begin(trainer, 1) == 0
    for epoch, ready in ((2, 3), (1, 2)):
        current.ready = ready
        position.load_state_dict(state, 1)
        with pytest.raises(MisconfigurationException, match="rows would be lost or repeated"):
            position.begin(trainer, epoch)


@pytest.mark.parametrize(
    ("change", "saved_after", "said"),
    [
        ({"limit_train_batches": 3}, 4, "has only 3 batches. Give back limit_train_batches, overfit_batches"),
        ({"overfit_batches": 3}, 4, "has only 3 batches. Give back limit_train_batches, overfit_batches"),
        ({"overfit_batches": 5}, 10, "overfit_batches trains on other batches. Resume without it"),
    ],
)
@pytest.mark.filterwarnings("ignore:You requested to overfit:UserWarning")
def test_an_epoch_that_has_become_shorter_is_named(folder, tmp_path, change, saved_after, said):
    trainer = {"max_epochs": 2, "limit_val_batches": 0}
    whole = fit(data(folder), callbacks=[save_everywhere(tmp_path, **STEPS)], **trainer)
    assert len(whole.seen) == 2 * 7
    checkpoint = str(next(tmp_path.glob(f"*step={saved_after}.ckpt")))
    with pytest.raises(MisconfigurationException, match=said):
        fit(data(folder), ckpt_path=checkpoint, **trainer, **change)


class _Search(LearningRateFinder):
    def lr_find(self, trainer, module) -> None:
        module.lr = 0.1
        super().lr_find(trainer, module)


def test_a_search_for_the_rate_at_resumption_is_named(folder, tmp_path):
    trainer = {"max_epochs": 2, "limit_val_batches": 0}
    fit(data(folder), callbacks=[save_everywhere(tmp_path, **STEPS)], **trainer)
    with pytest.raises(MisconfigurationException, match="as LearningRateFinder and BatchSizeFinder begin it"):
        fit(data(folder), ckpt_path=str(next(tmp_path.glob("*step=2.ckpt"))), callbacks=[_Search()], **trainer)


def test_a_batch_size_that_was_found_is_trained_with(folder):
    padded = data(folder, packing=False, tokens_per_batch=None, batch_size=1)
    finder = BatchSizeFinder(max_trials=3, steps_per_trial=1, init_val=1)
    module = fit(padded, Recorder(ask_for_steps=True), callbacks=[finder], max_epochs=1, limit_val_batches=0)
    assert padded.batch_size == 4
    assert [len(rows) for _, _, rows in module.seen[-3:]] == [4, 4, 4]


def test_identity_goes_by_the_batches_and_names_what_they_are_made_of():
    check_identity({"batches": "a", "made_of": {"code": 1}}, {"batches": "a", "made_of": {"code": 2}})
    with pytest.raises(MisconfigurationException, match="changed: seed, data"):
        check_identity({"batches": "a", "made_of": {"seed": 1}}, {"batches": "b", "made_of": {"seed": 2, "data": 0}})
    assert hash_arrays(np.arange(3)) == hash_arrays(np.arange(3)) != hash_arrays(np.arange(3, dtype=np.int32))
    assert gather_states({"a": 1}, 1) == [{"a": 1}]
