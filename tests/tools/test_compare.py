"""The subcommand ``compare`` end to end on tiny models: who answers, what is written, and how the loop closes."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny import tiny_tokenizer
from tiny_adapters import write_adapter
from tiny_models import save_tiny_model
from tiny_training import CHATS, tiny_sft_module, tiny_trainer

from lightning_qlora.callbacks import AdapterCheckpoint
from lightning_qlora.cli import main
from lightning_qlora.data import SFTDataModule
from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.data.formats import parse_row
from lightning_qlora.evaluation import answer_questions, read_questions
from lightning_qlora.model import load_adapter, load_base_model, merge_adapter
from lightning_qlora.schema import Origin
from lightning_qlora.tools import compare

ROWS = [
    {"id": "hi", "prompt": CHATS[0][0], "reference": CHATS[0][1], "tags": ["short"]},
    {"id": "paris", "prompt": CHATS[1][0], "reference": CHATS[1][1], "check": "contains", "expect": "Paris"},
    {
        "id": "turns",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": CHATS[3][0]},
        ],
        "reference": CHATS[3][1],
        "tags": ["short", "numbers"],
    },
    {"id": "seven", "prompt": CHATS[4][0], "check": "numeric", "expect": 1234567, "tags": ["numbers"]},
    {"id": "open", "prompt": "fox"},
]


@pytest.fixture(scope="module")
def adapters(base, tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [write_adapter(root / name, base, tokenizer, seed=i, manifest=True) for i, name in enumerate(("one", "two"))]


@pytest.fixture
def questions(tmp_path):
    return write_rows(tmp_path / "questions.jsonl", ROWS)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def record_of(folder):
    return json.loads((folder / "comparison.json").read_text(encoding="utf-8"))


def texts(record, name):
    return [question["answers"][name]["text"] for question in record["questions"]]


def test_asks_base_adapters_and_a_merged_model_under_the_same_conditions(
    base, adapters, tokenizer, questions, tmp_path, capsys
):
    model = load_adapter(load_base_model(base, quantization=None), adapters[1])
    merge_adapter(model).save_pretrained(tmp_path / "merged")

    compare(questions, adapters, merged=str(tmp_path / "merged"), output=str(tmp_path / "out"), max_new_tokens=8)

    record = record_of(tmp_path / "out")
    assert [(p["name"], p["kind"]) for p in record["participants"]] == [
        ("base", "base"), ("one", "adapter"), ("two", "adapter"), ("merged", "merged"),
    ]  # fmt: skip
    asked, template = read_questions(questions), ChatTemplate(tokenizer)
    for name, folder in zip(("base", "one", "two"), (None, *adapters), strict=True):
        alone = load_base_model(base)
        alone = alone if folder is None else load_adapter(alone, folder)
        sheet = answer_questions(alone, template, asked, name=name, max_new_tokens=8)
        assert texts(record, name) == [answer.text for answer in sheet.answers]
        losses = [question["answers"][name]["reference_nll"] for question in record["questions"]]
        assert losses == pytest.approx([loss and loss.nll_sum for loss in sheet.reference_losses])
    assert len({tuple(texts(record, name)) for name in ("base", "one", "two")}) == 3
    assert (record["baseline"], record["candidate"]) == ("base", "merged")
    assert [(p["before"], p["after"]) for p in record["pairs"]][:3] == [
        ("base", "one"), ("base", "two"), ("base", "merged"),
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "two against one: " in printed
    assert "exactly right answers" in printed
    assert str(tmp_path / "out" / "comparison.html") in printed


def test_adapters_of_every_kind_take_turns_on_one_base(base, tokenizer, questions, tmp_path):
    kinds = {
        "plain": {"target_modules": ["q_proj", "v_proj"], "r": 2},
        "dora": {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
        "head": {"modules_to_save": ["lm_head"], "use_rslora": True},
        "tokens": {"trainable_token_indices": [5, 6, 7]},
    }
    folders = {n: write_adapter(tmp_path / n, base, tokenizer, i, **lora) for i, (n, lora) in enumerate(kinds.items())}

    compare(questions, folders, output=str(tmp_path / "out"), max_new_tokens=4)

    record, asked, template = record_of(tmp_path / "out"), read_questions(questions), ChatTemplate(tokenizer)
    for name in ("base", *folders):
        alone = load_base_model(base)
        alone = alone if name == "base" else load_adapter(alone, folders[name])
        sheet = answer_questions(alone, template, asked, name=name, max_new_tokens=4)
        assert texts(record, name) == [answer.text for answer in sheet.answers], name
        losses = [question["answers"][name]["reference_nll"] for question in record["questions"]]
        assert losses == pytest.approx([loss and loss.nll_sum for loss in sheet.reference_losses]), name


def test_the_record_is_stable(adapters, questions, tmp_path):
    compare(questions, {"mine": adapters[0]}, output=str(tmp_path), max_new_tokens=4)

    record = record_of(tmp_path)
    assert list(record) == [
        "format", "version", "packages", "settings", "baseline", "candidate", "participants", "scores", "tags", "pairs",
        "limits", "notes", "questions",
    ]  # fmt: skip
    assert (record["format"], record["version"]) == ("lightning_qlora.comparison", 1)
    assert list(record["scores"]["mine"]) == [
        "exact", "valid", "fields", "stopped", "rouge_l", "chrf", "perplexity",
    ]  # fmt: skip
    assert record["scores"]["mine"]["exact"]["num_questions"] == 4
    assert record["scores"]["mine"]["perplexity"]["num_questions"] == 3
    assert {tag: found["num_questions"] for tag, found in record["tags"].items()} == {"numbers": 2, "short": 2}
    (pair,) = record["pairs"]
    assert sorted(i for ids in pair["verdicts"].values() for i in ids) == sorted(row["id"] for row in ROWS)
    assert set(pair["differences"]["exact"]) == {
        "value", "low", "high", "p_value", "test", "num_questions", "p_corrected",
    }  # fmt: skip
    assert record["questions"][2]["messages"] == ROWS[2]["messages"]
    assert set(record["questions"][0]["answers"]) == {"base", "mine"}


def test_asks_a_base_alone_and_writes_nothing(base, questions, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compare(questions, base=base, output=None, max_new_tokens=2)

    assert "valid answers" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["questions.jsonl"]


def test_draws_are_the_same_for_all_and_follow_the_seed(base, tokenizer, adapters, questions, tmp_path):
    def draw(seed):
        same = {"first": adapters[0], "again": adapters[0]}
        options = {"temperature": 2.0, "seed": seed, "max_new_tokens": 8}
        compare(questions, same, output=str(tmp_path / str(seed)), **options)
        record = record_of(tmp_path / str(seed))
        return texts(record, "first"), texts(record, "again")

    first, again = draw(1)
    assert first == again
    assert draw(2)[0] != first


def test_failures_are_rows_to_train_on(adapters, questions, tmp_path, tokenizer):
    failures, pairs = tmp_path / "new" / "failures.jsonl", tmp_path / "pairs.jsonl"
    compare(questions, adapters[0], output=str(tmp_path), failures=str(failures), pairs=str(pairs), max_new_tokens=4)

    rows, answers = read_rows(failures), texts(record_of(tmp_path), "one")
    assert [row["metadata"]["question"] for row in rows] == ["hi", "paris", "turns"]
    assert rows[2]["messages"] == [
        *ROWS[2]["messages"][:2],
        {**ROWS[2]["messages"][2], "train": False},
        ROWS[2]["messages"][3],
        {"role": "assistant", "content": CHATS[3][1]},
    ]
    assert rows[0]["metadata"]["answer"] == answers[0]
    learned = SFTDataModule(str(failures), tokenizer=tokenizer, cache_dir=str(tmp_path / "cache"))
    learned.setup("fit")
    assert (learned.reports["train"].rows_kept, dict(learned.reports["train"].refused)) == (3, {})

    # Without a reference, the wrong answer waits for a person: as it stands it teaches nothing.
    (todo,) = read_rows(tmp_path / "new" / "failures.uncorrected.jsonl")
    assert todo["messages"][-1] == {"role": "assistant", "content": answers[3], "train": False}
    with pytest.raises(ValueError, match="nothing-supervised"):
        parse_row(todo, Origin("f", 1))
    corrected = {**todo, "messages": [*todo["messages"][:-1], {"role": "assistant", "content": "1234567"}]}
    assert parse_row(corrected, Origin("f", 1)).messages[-1].content == "1234567"

    preferences = [parse_row(row, Origin("p", 1), task="preference") for row in read_rows(pairs)]
    assert [p.chosen[0].content for p in preferences] == [CHATS[0][1], CHATS[1][1], CHATS[3][1]]
    assert [p.rejected[0].content for p in preferences] == answers[:3]
    assert [message.role for message in preferences[2].prompt] == ["system", "user", "assistant", "user"]


def test_a_reference_that_fails_its_own_check_is_not_trained_on(adapters, tmp_path):
    rows = [{"prompt": "Hi", "reference": "Hello!", "check": "regex", "expect": r"^\d+$"}]
    failures, pairs = tmp_path / "f.jsonl", tmp_path / "p.jsonl"
    compare(
        write_rows(tmp_path / "q.jsonl", rows), adapters[0], output=None,
        failures=str(failures), pairs=str(pairs), max_new_tokens=4,
    )  # fmt: skip

    assert read_rows(failures) == read_rows(pairs) == []
    assert len(read_rows(tmp_path / "f.uncorrected.jsonl")) == 1


def test_the_loop_closes(base, tokenizer, adapters, questions, tmp_path, capsys):
    """Failures become training rows; the next comparison shows what they fixed, and what was not asked before."""
    failures = tmp_path / "failures.jsonl"
    compare(
        questions, {"model": adapters[0]}, output=str(tmp_path / "first"), failures=str(failures), max_new_tokens=24
    )

    data = SFTDataModule(str(failures), tokenizer=base, max_length=128, cache_dir=str(tmp_path / "cache"))
    checkpoint = AdapterCheckpoint(dirpath=str(tmp_path / "run" / "checkpoints"), every_n_epochs=100)
    trainer = tiny_trainer(tmp_path / "run", callbacks=[checkpoint], enable_checkpointing=True, max_epochs=100)
    trainer.fit(tiny_sft_module(base, lr=5e-3, r=16), data)
    capsys.readouterr()
    changed = [*ROWS[:4], {**ROWS[4], "prompt": "another"}, {"id": "new", "prompt": "new"}]
    compare(
        write_rows(tmp_path / "questions.jsonl", changed),
        {"model": str(tmp_path / "run")},
        against=str(tmp_path / "first"),
        output=str(tmp_path / "second"),
        max_new_tokens=24,
        max_broken=0,
        fail_on_regression=True,
    )

    record = record_of(tmp_path / "second")
    assert [p["name"] for p in record["participants"]] == ["base", "previous model", "model"]
    pair = next(p for p in record["pairs"] if (p["before"], p["after"]) == ("previous model", "model"))
    assert pair["verdicts"]["fixed"] == ["hi", "paris", "turns"]
    assert pair["verdicts"].keys().isdisjoint({"broken"})
    assert sum(map(len, pair["verdicts"].values())) == 4
    assert "previous model" not in record["questions"][4]["answers"]
    assert any("was not asked 2 of 6 questions as they are now: open, new" in note for note in record["notes"])
    assert all(limit["passed"] for limit in record["limits"])
    assert "model against previous model: 3 fixed" in capsys.readouterr().out


def test_an_earlier_answer_is_judged_by_todays_check(adapters, tmp_path):
    rows = [{"id": "a", "prompt": "Hi", "check": "contains", "expect": "never written"}]
    path = write_rows(tmp_path / "q.jsonl", rows)
    compare(path, adapters[0], output=str(tmp_path / "first"), max_new_tokens=4)
    write_rows(tmp_path / "q.jsonl", [{**rows[0], "check": "regex", "expect": ""}])

    compare(path, adapters[0], against=str(tmp_path / "first"), output=str(tmp_path / "second"), max_new_tokens=3)

    record = record_of(tmp_path / "second")
    assert record["scores"]["previous one"]["exact"]["value"] == 1.0
    assert record["notes"] == ["previous one answered with max_new_tokens 4, the others with 3."]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"min_exact": 0.5}, r"exactly right answers 0 %, allowed at least 50 % \(min_exact\)"),
        ({"min_exact_of": {"numbers": 0.1}}, r"answers of 'numbers' 0 %, allowed at least 10 % \(min_exact_of.numbers"),
        ({"max_perplexity": 1.5}, r"perplexity of references \S+, allowed at most 1.5"),
        ({"min_chrf": 1.0, "min_rouge_l": 1.0}, "2 limits are not kept by one"),
    ],
)
def test_a_missed_limit_ends_with_an_error_after_everything_is_written(adapters, questions, tmp_path, limits, message):
    with pytest.raises(ValueError, match=message):
        compare(questions, adapters[0], output=str(tmp_path), max_new_tokens=2, **limits)

    assert any(not limit["passed"] for limit in record_of(tmp_path)["limits"])
    assert "✗" in (tmp_path / "comparison.html").read_text(encoding="utf-8")


def test_from_the_command_line(adapters, questions, tmp_path, capsys):
    (tmp_path / "compare.yaml").write_text(f"questions: {questions}\noutput: {tmp_path / 'out'}\nmax_new_tokens: 2\n")
    command = ["compare", "--config", str(tmp_path / "compare.yaml")]

    assert main([*command, f"--adapters+={adapters[0]}", f"--adapters+={adapters[1]}"]) == 0
    assert record_of(tmp_path / "out")["candidate"] == "two"
    assert main([*command, f"--adapters={adapters[0]}", "--min_exact=1", "--min_exact_of.short=1"]) == 1
    assert "error: 2 limits are not kept by one:" in capsys.readouterr().err
    assert main([*command, f"--adapters={{a: {adapters[0]}, b: {adapters[1]}}}", "--baseline=a"]) == 0
    assert [(p["before"], p["after"]) for p in record_of(tmp_path / "out")["pairs"]] == [
        ("a", "base"), ("a", "b"), ("base", "b"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"min_exact": 80.0}, "min_exact is 80.0; write a number from 0 to 1"),
        ({"max_broken": -1}, "max_broken is -1"),
        ({"min_exact_of": {"long": 0.5}}, "names 'long', which no checked question has. Tags are"),
        ({"against": "missing.json"}, "earlier comparison 'missing.json' cannot be read"),
        ({"adapters": "missing"}, "is no adapter folder"),
        ({"merged": "missing"}, "is no model folder"),
        ({"baseline": "three"}, r"baseline is 'three'; allowed are \['base'\]"),
        ({}, "nothing to answer with"),
        ({"base": "b", "max_broken": 0}, "Nobody to hold the candidate against"),
        ({"base": "b", "fail_on_regression": True}, "Nobody to hold the candidate against"),
    ],
)
def test_refuses_what_cannot_work_before_anything_is_loaded(questions, options, message):
    with pytest.raises(ValueError, match=message):
        compare(questions, output=None, **options)


def test_refuses_limits_that_the_questions_say_nothing_about(tmp_path):
    path = write_rows(tmp_path / "q.jsonl", [{"prompt": "Hi"}])

    for limit in ({"min_exact": 0.5}, {"max_perplexity": 2.0}, {"max_broken": 0}):
        with pytest.raises(ValueError, match="No question has a (check|reference)"):
            compare(path, base="unused", output=None, **limit)


def test_refuses_names_that_are_not_distinct(adapters, questions, base, tmp_path):
    with pytest.raises(ValueError, match="are not distinct"):
        compare(questions, {"base": adapters[0]}, output=None)
    with pytest.raises(ValueError, match="is also the last given"):
        compare(questions, adapters[0], baseline="one", output=None)


def test_an_adapter_that_holds_a_part_of_the_base_is_not_compared_with_it(adapters, questions, tmp_path):
    shutil.copytree(adapters[0], tmp_path / "pissa")
    (tmp_path / "pissa" / "manifest.json").unlink()
    config = json.loads((tmp_path / "pissa" / "adapter_config.json").read_text())
    (tmp_path / "pissa" / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))

    with pytest.raises(ValueError, match="neither the base nor another adapter could answer beside it"):
        compare(questions, {"plain": adapters[1], "pissa": str(tmp_path / "pissa")}, output=None)


def test_a_merged_model_must_speak_the_same_tokens(base, adapters, tokenizer, questions, tmp_path):
    other = tiny_tokenizer("chatml", extra_tokens=["<another>"])
    folder = save_tiny_model(tmp_path / "merged", tokenizer=other)

    with pytest.raises(ValueError, match="does not belong here"):
        compare(questions, adapters[0], merged=folder, output=None, max_new_tokens=2)


def test_refuses_a_file_that_is_no_comparison(questions, tmp_path):
    (tmp_path / "other.json").write_text('{"format": "other"}')

    with pytest.raises(ValueError, match="is no comparison of version 1"):
        compare(questions, base="unused", against=str(tmp_path / "other.json"), output=None)
