from __future__ import annotations

import inspect
import itertools
import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny import tiny_tokenizer
from tiny_chats import Recorder, fit, make_data, write_chats

from lightning_qlora.data import DataSource, SFTDataModule
from lightning_qlora.schema import IGNORE_INDEX, ChatDataModule


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_chats(folder / "train.jsonl", 30)
    write_chats(folder / "validation.jsonl", 7, first=1000)
    questions = [{"prompt": f"Question {i}?", "id": i} for i in range(5)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return folder


def data(folder: Path, **options: Any) -> SFTDataModule:
    return make_data(folder / "train.jsonl", folder / "cache", **options)


def all_rows(batches: Any) -> list[int]:
    return list(itertools.chain.from_iterable(batch["row_ids"] for batch in batches))


def test_without_a_trainer_it_is_a_plain_source_of_batches(folder):
    module = data(folder)
    module.prepare_data()
    module.setup()
    loader = module.train_dataloader()
    assert sorted(all_rows(loader)) == list(range(30))
    for batch in loader:
        assert batch["input_ids"].shape[1] <= 384
        assert batch["attention_mask"] is None
    assert module.state_dict() == {}


def test_answers_the_protocol(folder):
    module = data(folder)
    assert isinstance(module, ChatDataModule)
    end = module.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in module.stop_token_ids
    assert set(module.stop_token_ids) <= set(module.control_token_ids)
    with pytest.raises(RuntimeError, match="no report before"):
        _ = module.report
    module.setup("fit")
    assert module.report.rows_kept == 30
    assert set(module.reports) == {"train"}
    assert [str(o) for o in module.origins((4, -1))] == [f"{folder / 'train.jsonl'}:5"]


def test_supervised_tokens_are_the_answers(folder):
    module = data(folder, max_length=384)  # no turn is dropped
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    chats = [json.loads(line)["messages"] for line in (folder / "train.jsonl").read_text().splitlines()]
    text = module.tokenizer.decode(batch["targets"])
    said = [turn["content"].strip() for row in batch["row_ids"] for turn in chats[row] if turn["role"] == "assistant"]
    assert [part.strip() for part in text.split("<|im_end|>")] == [*said, ""]


def test_padded_batches_have_similar_lengths(folder):
    module = data(folder, packing=False, tokens_per_batch=None, batch_size=4, pad_to_multiple_of=8)
    module.setup("fit")
    batches = list(module.train_dataloader())
    assert sorted(all_rows(batches)) == list(range(30))
    assert max(len(batch["row_ids"]) for batch in batches) == 4
    for batch in batches:
        assert batch["input_ids"].shape[1] % 8 == 0
        assert bool((batch["labels"][batch["attention_mask"] == 0] == IGNORE_INDEX).all())
    assert module.report.packing["efficiency"] > 0.85


def test_report_of_the_packing(folder):
    module = data(folder)
    module.setup("fit")
    loader = module.train_dataloader()
    packing = module.report.packing
    assert packing["batches"] == len(loader)
    assert packing["tokens_per_batch"] == 384
    assert packing["efficiency"] == pytest.approx(module.report.num_tokens / (384 * len(loader)))


# Stages


def test_validation_from_its_own_source(folder):
    module = fit(data(folder, validation=str(folder / "validation.jsonl")), max_epochs=1)
    assert sorted(itertools.chain.from_iterable(module.evaluated)) == list(range(7))
    assert len(module.seen) > 0


def test_validation_by_fraction_never_trains(folder, tmp_path):
    lines = (folder / "train.jsonl").read_text().splitlines()
    path = tmp_path / "copies.jsonl"
    path.write_text("\n".join(lines * 2))  # each row twice: copies must not straddle
    module = make_data(path, tmp_path / "cache", validation_fraction=0.2)
    recorder = fit(module, max_epochs=1)
    trained = {row % 30 for _, _, rows in recorder.seen for row in rows}
    validated = {row % 30 for rows in recorder.evaluated for row in rows}
    assert len(validated) == 6
    assert not trained & validated
    assert trained | validated == set(range(30))
    assert len(list(itertools.chain.from_iterable(recorder.evaluated))) == 12
    assert module.num_leaked_rows == 0
    again = make_data(path, tmp_path / "cache", validation_fraction=0.2)
    again.setup("validate")
    assert {row % 30 for row in all_rows(again.val_dataloader())} == validated


def test_leaked_rows_are_counted(folder, tmp_path):
    lines = (folder / "train.jsonl").read_text().splitlines()
    (tmp_path / "validation.jsonl").write_text("\n".join([*lines[:3], lines[0]]))
    module = data(folder, validation=str(tmp_path / "validation.jsonl"))
    module.setup("fit")
    assert module.num_leaked_rows == 3


def test_without_validation_data_nothing_is_validated_and_the_trainer_is_left_as_it_was(folder):
    recorder, trainer = Recorder(), L.Trainer(accelerator="cpu", max_epochs=1, barebones=True)
    trainer.fit(recorder, datamodule=data(folder))
    assert recorder.evaluated == []
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(recorder, datamodule=data(folder))
    assert trainer.limit_val_batches == 1.0
    assert recorder.validated_after == []


def test_weights_repeat_rows(folder):
    other = DataSource(str(folder / "validation.jsonl"), weight=3.0)
    module = SFTDataModule(
        [str(folder / "train.jsonl"), other],
        tokenizer=tiny_tokenizer(),
        max_length=192,
        cache_dir=str(folder / "cache"),
    )
    module.setup("fit")
    rows = all_rows(module.train_dataloader())
    assert sorted(rows) == sorted([*range(30), *[*range(30, 37)] * 3])
    assert [s.rows_kept for s in module.report.sources] == [30, 7]


def test_weights_hold_for_validation_and_test_too(folder):
    train, other = str(folder / "train.jsonl"), str(folder / "validation.jsonl")
    module = data(folder, validation=[DataSource(train, weight=0.2), other], test=DataSource(other, weight=2.0))
    module.setup()
    rows = all_rows(module.val_dataloader())
    assert len({row for row in rows if row < 30}) == 6
    assert sorted(row for row in rows if row >= 30) == list(range(30, 37))
    assert sorted(all_rows(module.test_dataloader())) == sorted([*range(7)] * 2)
    module = data(folder, validation=DataSource(other, weight=0.01))
    with pytest.raises(ValueError, match="The weights of the validation sources leave no row. Raise them"):
        module.setup()


def test_held_out_rows_are_used_once_whatever_their_weight(folder):
    source = DataSource(str(folder / "train.jsonl"), weight=2.0)
    module = SFTDataModule(
        source, tokenizer=tiny_tokenizer(), max_length=192, validation_fraction=0.2, cache_dir=str(folder / "cache")
    )
    module.setup("fit")
    held_out = all_rows(module.val_dataloader())
    assert len(held_out) == 6
    assert sorted(all_rows(module.train_dataloader()) + held_out * 2) == sorted([*range(30)] * 2)


def test_test_and_predict(folder):
    module = data(folder, test=str(folder / "validation.jsonl"), predict=str(folder / "questions.jsonl"), batch_size=2)
    recorder = Recorder()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.test(recorder, datamodule=module)
    assert sorted(itertools.chain.from_iterable(recorder.evaluated)) == list(range(7))

    class Predicting(Recorder):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return batch

    batches = trainer.predict(Predicting(), datamodule=module)
    assert [row["id"] for batch in batches for row in batch["rows"]] == list(range(5))
    assert [len(batch["rows"]) for batch in batches] == [2, 2, 1]
    ids, mask = batches[0]["input_ids"][0], batches[0]["attention_mask"][0]
    text = module.tokenizer.decode(ids[mask.bool()])
    assert text.endswith("<|im_start|>assistant\n")
    assert "Question 0?" in text


def test_a_question_that_cannot_be_rendered_is_named(folder, tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "fine"}) + "\n" + json.dumps({"prompt": "a\u0000"}))
    module = data(folder, predict=str(tmp_path / "q.jsonl"))
    with pytest.raises(ValueError, match=r"q.jsonl:2 "):
        module.predict_dataloader()


@pytest.mark.parametrize("name", ["train", "val", "test", "predict"])
def test_a_missing_source_is_named(folder, name):
    module = SFTDataModule(tokenizer=tiny_tokenizer(), cache_dir=str(folder / "cache"))
    module.setup()
    with pytest.raises(MisconfigurationException, match=rf"Write --data.{name}"):
        getattr(module, f"{name}_dataloader")()


# Lightning's switches

EMPTY_VALIDATION = pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
"""The finders ask for validation batches in any case, and warn where there are none."""


def test_fast_dev_run_and_limits(folder):
    assert len(fit(data(folder), fast_dev_run=True).seen) == 1
    assert len(fit(data(folder), max_epochs=2, limit_train_batches=3).seen) == 6


@pytest.mark.parametrize("validation", [None, "validation.jsonl"])
def test_overfitting_repeats_the_same_batches(folder, validation):
    source = validation and str(folder / validation)
    seen = fit(data(folder, validation=source), max_epochs=3, overfit_batches=2).seen
    epochs = [[rows for epoch, _, rows in seen if epoch == number] for number in range(3)]
    assert epochs[0] == epochs[1] == epochs[2]
    assert len(epochs[0]) == 2


@EMPTY_VALIDATION
def test_learning_rate_finder_takes_no_batch_away(folder):
    class WithRate(Recorder):
        lr = 0.1

        def configure_optimizers(self):
            return torch.optim.SGD([self.weight], lr=self.lr)

    plain = fit(data(folder), max_epochs=1).seen
    module = WithRate()
    finder = LearningRateFinder(num_training_steps=4, early_stop_threshold=None)
    fit(data(folder), module, max_epochs=1, callbacks=[finder])
    assert [rows for _, _, rows in module.seen[-len(plain) :]] == [rows for _, _, rows in plain]


@EMPTY_VALIDATION
def test_batch_size_finder_changes_the_batches(folder):
    module = data(folder, packing=False, tokens_per_batch=None, batch_size=1)
    recorder = fit(module, max_epochs=1, callbacks=[BatchSizeFinder(max_trials=2, init_val=2, steps_per_trial=1)])
    assert module.batch_size == 4
    assert max(len(rows) for _, _, rows in recorder.seen) == 4


def test_two_fits_with_one_module(folder):
    module, recorder = data(folder), Recorder()
    first = list(fit(module, recorder, max_epochs=1).seen)
    second = fit(module, Recorder(), max_epochs=1).seen
    assert first == second


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("stage", ["train", "validation"])
def test_ranks_see_each_row_once(folder, packing, stage):
    rows = []
    for rank in range(2):
        module = data(folder, validation=str(folder / "validation.jsonl"), packing=packing)
        module.setup("fit")
        ranks = {"num_replicas": 2, "rank": rank}
        module.trainer = SimpleNamespace(distributed_sampler_kwargs=ranks, overfit_batches=0)
        loader = module.train_dataloader() if stage == "train" else module.val_dataloader()
        rows.append(all_rows(loader))
        assert len(loader) == -(-len(loader.dataset) // 2)
    seen = [row for row in itertools.chain(*rows) if row >= 0]
    assert sorted(seen) == list(range(30 if stage == "train" else 7))


def test_it_travels_to_spawned_processes(folder):
    module = data(folder)
    module.setup("fit")
    copy = pickle.loads(pickle.dumps(module))
    assert all_rows(copy.train_dataloader()) == all_rows(module.train_dataloader())


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_proc": 0}, "num_proc is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"overlong": "truncate"}, "overlong is 'truncate'; allowed are drop_oldest_turns"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"max_invalid_fraction": 2}, "max_invalid_fraction is 2"),
    ],
)
def test_values_out_of_range_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        data(folder, **options)


def test_combinations_that_contradict_are_refused(folder):
    with pytest.raises(MisconfigurationException, match="tokens_per_batch is 100, below max_length=192"):
        data(folder, tokens_per_batch=100)
    with pytest.raises(MisconfigurationException, match="Both validation and validation_fraction"):
        data(folder, validation="x.jsonl", validation_fraction=0.1)
    with pytest.raises(MisconfigurationException, match="together with chat_template"):
        _ = data(folder, chat_template="{{ messages }}").tokenizer


def test_bad_data_stops_before_training(folder, tmp_path):
    with pytest.raises(ValueError, match=r"There is no .*nowhere.jsonl"):
        fit(make_data(tmp_path / "nowhere.jsonl", folder / "cache"), max_epochs=1)
    (tmp_path / "bad.jsonl").write_text((folder / "train.jsonl").read_text() + "{\n" * 5)
    with pytest.raises(ValueError, match="5 of 35 rows cannot be used"):
        fit(make_data(tmp_path / "bad.jsonl", folder / "cache"), max_epochs=1)


def test_a_tokenizer_is_loaded_by_name(folder, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    module = data(folder, tokenizer=str(tmp_path / "model"))
    module.setup("fit")
    mine = data(folder)
    mine.setup("fit")
    for one, other in zip(module.train_dataloader(), mine.train_dataloader(), strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])


def test_every_option_is_explained():
    documented = set(re.findall(r"^ {4}(\w+): ", inspect.getdoc(SFTDataModule) or "", re.MULTILINE))
    parameters = set(inspect.signature(SFTDataModule).parameters)
    assert parameters <= documented


def test_yaml_binds_to_it(folder):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(SFTDataModule, "data")
    config = parser.parse_object(
        {
            "data": {
                "train": [
                    str(folder / "train.jsonl"),
                    {"path": str(folder / "validation.jsonl"), "columns": {"prompt": "q"}, "weight": 2},
                ],
                "validation": str(folder / "validation.jsonl"),
                "tokenizer": "some/model",
                "template_kwargs": {"enable_thinking": False},
                "overlong": "keep_end",
                "num_proc": 2,
            }
        }
    )
    module = parser.instantiate_classes(config).data
    assert isinstance(module, SFTDataModule)
    first, second = module.sources["train"]
    assert first == str(folder / "train.jsonl")
    assert second == DataSource(str(folder / "validation.jsonl"), columns={"prompt": "q"}, weight=2.0)
    assert module.tokenizer_name == "some/model"
    assert "overlong" in parser.dump(config)
