from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_tokenizer
from tiny_models import save_tiny_model
from tiny_training import CHATS, TinyChats, tiny_sft_module, tiny_trainer

from lightning_qlora.callbacks import AnswerComparison
from lightning_qlora.evaluation import answer_questions, read_questions
from lightning_qlora.model import load_base_model


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer("chatml")


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"), tokenizer=tokenizer)


@pytest.fixture
def questions(tmp_path):
    rows = [{"prompt": question, "reference": answer, "check": "exact"} for question, answer in CHATS[:3]]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, [*rows, {"id": "open", "prompt": "dog"}])), encoding="utf-8")
    return path


def read_metrics(root):
    (path,) = root.rglob("metrics.csv")
    header, *rows = [line.split(",") for line in path.read_text().splitlines()]
    return [{k: float(v) for k, v in zip(header, row, strict=True) if v} for row in rows]


def test_shows_what_training_did(folder, tokenizer, questions, tmp_path, capsys):
    data = TinyChats(tokenizer, CHATS[:3], chats_per_batch=3)
    module = tiny_sft_module(folder, lr=5e-3, r=16)
    callback = AnswerComparison(questions, max_new_tokens=24)
    logger = CSVLogger(tmp_path, name="logs")

    tiny_trainer(tmp_path, callbacks=[callback], logger=logger, log_every_n_steps=1, max_epochs=100).fit(module, data)

    asked = read_questions(questions)
    base = load_base_model(folder)
    assert callback.before == answer_questions(base, data.chat, asked, name="before", max_new_tokens=24)
    assert [answer.text for answer in callback.after.answers[:3]] == [answer for _, answer in CHATS[:3]]
    assert not any(score.exact for score in callback.before.scores)

    printed = capsys.readouterr().out
    assert "3/3 (100.0 %)" in printed
    assert "3 fixed, 0 right before and wrong now, 1 changed" in printed
    scores = next(row for row in read_metrics(tmp_path) if "answers_exact" in row)
    assert (scores["answers_exact"], scores["answers_exact_base"], scores["step"]) == (1.0, 0.0, 100)
    assert scores["answers_perplexity"] < scores["answers_perplexity_base"] / 2

    (path,) = (tmp_path / "logs" / "version_0" / "answers").glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert path.name == "step_100.jsonl"
    assert [row["verdict"] for row in rows] == ["fixed", "fixed", "fixed", "changed"]
    assert rows[1]["after"]["answer"] == rows[1]["reference"] == "Paris."
    assert rows[1]["before"]["reference_nll"] > rows[1]["after"]["reference_nll"] > 0
    totals = json.loads(path.with_suffix(".json").read_text())
    assert (totals["before"]["num_exact"], totals["after"]["num_exact"], totals["after"]["num_questions"]) == (0, 3, 4)


@pytest.mark.parametrize("every", ["end", "validation"])
def test_training_is_bit_equal_with_and_without(folder, tokenizer, questions, tmp_path, every):
    def train(callbacks):
        module = tiny_sft_module(folder, lr=1e-2, dropout=0.2)
        trainer = tiny_trainer(tmp_path, callbacks=callbacks, val_check_interval=2, max_epochs=2, limit_train_batches=3)
        trainer.fit(module, TinyChats(tokenizer))
        return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}

    plain, asked = train([]), train([AnswerComparison(questions, every=every, max_new_tokens=4)])

    assert plain.keys() == asked.keys()
    assert all(torch.equal(plain[name], asked[name]) for name in plain)


def test_at_each_validation_checkpoints_can_follow_the_score(folder, tokenizer, questions, tmp_path, mocker_calls):
    callback = AnswerComparison(questions, every="validation", max_new_tokens=4)
    best = ModelCheckpoint(tmp_path / "best", monitor="answers_perplexity", filename="{answers_perplexity:.3f}")
    trainer = tiny_trainer(tmp_path, callbacks=[callback, best], enable_checkpointing=True, max_epochs=2)

    calls = mocker_calls(callback, "_answer")
    trainer.fit(tiny_sft_module(folder), TinyChats(tokenizer))

    # The base once, then both validations; the end of fit has the same weights as the last validation.
    assert [call[2] for call in calls] == ["before", "after", "after"]
    assert float(best.best_model_score) == pytest.approx(float(trainer.callback_metrics["answers_perplexity"]), rel=0.5)
    assert len(list((tmp_path / "answers").glob("*.jsonl"))) == 2


def test_loggers_that_take_text_get_a_table(folder, tokenizer, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"prompt": "<b>a|b</b>\n# c", "reference": "x"}) + "\n", encoding="utf-8")
    texts, tables = TensorBoardLogger(tmp_path, name="board"), DummyLogger()
    tables.log_text = lambda key, **table: tables.__dict__.update({key: table})
    callback = AnswerComparison(path, max_new_tokens=2)
    trainer = tiny_trainer(
        tmp_path, callbacks=[callback], logger=[texts, tables, CSVLogger(tmp_path)], max_epochs=1, log_every_n_steps=1
    )

    trainer.fit(tiny_sft_module(folder), TinyChats(tokenizer))

    reader = EventAccumulator(texts.log_dir)
    reader.Reload()
    assert reader.Scalars("answers_exact")[0].step == trainer.global_step
    (event,) = reader.Tensors("answers/text_summary")
    assert event.step == trainer.global_step
    head, _, row = event.tensor_proto.string_val[0].decode().splitlines()
    assert head == "| question | reference | before | after | verdict |"
    assert row.startswith(r"| &lt;b&gt;a\|b&lt;/b&gt; \# c | x | ")
    assert tables.answers["columns"] == ["question", "reference", "before", "after", "verdict"]
    assert tables.answers["data"][0][:2] == ["<b>a|b</b> # c", "x"]
    assert tables.answers["step"] == trainer.global_step


@pytest.fixture
def mocker_calls(monkeypatch):
    def record(target, name):
        calls, original = [], getattr(target, name)
        monkeypatch.setattr(target, name, lambda *args: calls.append(args) or original(*args))
        return calls

    return record


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_answers_when_validating_and_testing(folder, tokenizer, questions, tmp_path, capsys, verb):
    trainer = tiny_trainer(tmp_path, callbacks=[AnswerComparison(questions, max_new_tokens=4)])

    (metrics,) = getattr(trainer, verb)(tiny_sft_module(folder), TinyChats(tokenizer), verbose=False)

    # lora_B is zero at first: adapters on and off are the same.
    assert metrics["answers_perplexity"] == metrics["answers_perplexity_base"]
    assert "exactly right answers" in capsys.readouterr().out


def test_fast_dev_run_asks_two_questions_and_writes_nothing(folder, tokenizer, questions, tmp_path):
    callback = AnswerComparison(questions, max_new_tokens=2, output_dir=tmp_path / "out")

    tiny_trainer(tmp_path, callbacks=[callback], fast_dev_run=True).fit(tiny_sft_module(folder), TinyChats(tokenizer))

    assert len(callback.after.answers) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_goes_with_lightnings_progress_bars(folder, tokenizer, questions, tmp_path, capsys, bar):
    callback = AnswerComparison(questions, every="validation", max_new_tokens=2)
    trainer = tiny_trainer(tmp_path, callbacks=[callback, bar()], enable_progress_bar=True)

    trainer.fit(tiny_sft_module(folder), TinyChats(tokenizer))

    captured = capsys.readouterr()
    assert "Answers before" in captured.err
    assert captured.out.rstrip().endswith(".jsonl")


def test_bad_questions_end_the_run_before_it_begins(folder, tokenizer, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x", "check": "exact"}\n')
    module = tiny_sft_module(folder)
    trainer = tiny_trainer(tmp_path, callbacks=[AnswerComparison(tmp_path / "bad.jsonl")])

    with pytest.raises(ValueError, match=r"bad\.jsonl:1: the check 'exact' has nothing to compare with"):
        trainer.fit(module, TinyChats(tokenizer))
    assert module.model is None


def test_needs_a_data_module_with_a_tokenizer(folder, tokenizer, questions, tmp_path):
    trainer = tiny_trainer(tmp_path, callbacks=[AnswerComparison(questions)])

    with pytest.raises(MisconfigurationException, match="needs the tokenizer of a data module"):
        trainer.fit(tiny_sft_module(folder), TinyChats(tokenizer).train_dataloader())


def test_says_when_adapters_off_is_not_the_base(folder, tokenizer, questions, tmp_path):
    module = tiny_sft_module(folder, quantization=None)
    module.lora.init_lora_weights = "pissa"
    trainer = tiny_trainer(tmp_path, callbacks=[AnswerComparison(questions, max_new_tokens=2)], max_epochs=1)

    with pytest.warns(UserWarning, match="not those of the original base"):
        trainer.fit(module, TinyChats(tokenizer))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": "epoch"}, "every is 'epoch'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_rows": -1}, "max_rows is -1"),
    ],
)
def test_refuses_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        AnswerComparison("questions.jsonl", **options)


@pytest.mark.slow
def test_ranks_share_the_questions(folder, tokenizer, questions, tmp_path):
    def answer(root, **options):
        callback = AnswerComparison(questions, max_new_tokens=4, output_dir=root)
        tiny_trainer(root, callbacks=[callback], **options).validate(
            tiny_sft_module(folder), TinyChats(tokenizer), verbose=False
        )
        return (root / "step_0.jsonl").read_text(), (root / "step_0.json").read_text()

    one = answer(tmp_path / "one")
    two = answer(tmp_path / "two", strategy="ddp_fork", devices=2, use_distributed_sampler=False)

    assert [json.loads(line)["after"]["answer"] for line in one[0].splitlines()] == [
        json.loads(line)["after"]["answer"] for line in two[0].splitlines()
    ]
    for name, value in json.loads(one[1])["after"].items():
        assert json.loads(two[1])["after"][name] == pytest.approx(value, rel=1e-5)
