from __future__ import annotations

import builtins
import importlib
import json

import pytest
import torch
from jsonargparse import auto_cli
from tiny_adapters import write_adapter

from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.evaluation import Question, generate_answers
from lightning_qlora.model import load_adapter, load_base_model
from lightning_qlora.schema import Message, Origin
from lightning_qlora.tools import TOOLS, generate


@pytest.fixture(scope="module")
def adapter(base, tokenizer, tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("run") / "epoch=1.5", base, tokenizer)


def expected(base, tokenizer, prompt, adapter=None, system=None, quantization="nf4", max_new_tokens=6):
    model = load_base_model(base, quantization=quantization)
    model = model if adapter is None else load_adapter(model, adapter)
    turns = [*([] if system is None else [Message("system", system)]), Message("user", prompt)]
    question = Question("1", tuple(turns), Origin("x", 1))
    (answer,) = generate_answers(model, ChatTemplate(tokenizer), [question], max_new_tokens=max_new_tokens)
    return answer.text


@pytest.fixture
def type_lines(monkeypatch):
    """Type lines into the chat, then end the input."""

    def typed(*lines):
        left = iter(lines)

        def read(_=""):
            line = next(left, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr(builtins, "input", read)

    return typed


def test_answers_one_prompt(base, adapter, tokenizer, capsys):
    generate(adapter, prompt="Hi", max_new_tokens=6)
    with_adapter = capsys.readouterr()
    generate(base=base, prompt="Hi", max_new_tokens=6)
    without = capsys.readouterr()
    generate(adapter, prompt="Hi", system="Be brief.", max_new_tokens=6)

    assert with_adapter.out == expected(base, tokenizer, "Hi", adapter) + "\n"
    assert "not known: loading it in 4-bit NF4" in with_adapter.err
    assert without.out == expected(base, tokenizer, "Hi") + "\n" != with_adapter.out
    assert "not known" not in without.err
    assert capsys.readouterr().out == expected(base, tokenizer, "Hi", adapter, system="Be brief.") + "\n"


def test_answers_a_file(base, adapter, tokenizer, tmp_path, capsys):
    rows = [
        {"id": "a", "prompt": "Hi", "reference": "Hello!"},
        {"id": "b", "messages": [{"role": "system", "content": "Own."}, {"role": "user", "content": "What?"}]},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "q.txt").write_text("Hi\n\nWhat?\u2028Now\n", encoding="utf-8")

    options = {"max_new_tokens": 6, "system": "Given."}
    generate(adapter, file=str(tmp_path / "q.jsonl"), output=str(tmp_path / "out" / "a.jsonl"), **options)
    written = [json.loads(line) for line in (tmp_path / "out" / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert capsys.readouterr().out == ""
    generate(adapter, file=str(tmp_path / "q.txt"), **options)
    printed = [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]

    assert [row["answer"] for row in written] == [
        expected(base, tokenizer, "Hi", adapter, system="Given."),
        expected(base, tokenizer, "What?", adapter, system="Own."),
    ]
    assert (written[0]["id"], written[0]["reference"], written[0]["stopped"]) == ("a", "Hello!", False)
    assert [row["answer"] for row in printed] == [
        expected(base, tokenizer, prompt, adapter, system="Given.") for prompt in ("Hi", "What?\u2028Now")
    ]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.jsonl"]


def test_chats_and_remembers(base, adapter, tokenizer, type_lines, capsys):
    type_lines("Hi", "What?", "/reset", "Hi", "/system Be brief.", "Hi", "", "/quit", "never read")

    generate(adapter, max_new_tokens=6)

    printed = capsys.readouterr().out
    first, brief = (
        expected(base, tokenizer, "Hi", adapter),
        expected(base, tokenizer, "Hi", adapter, system="Be brief."),
    )
    turns = (Message("user", "Hi"), Message("assistant", first), Message("user", "What?"))
    model = load_adapter(load_base_model(base), adapter)
    question = Question("1", turns, Origin("x", 1))
    (second,) = generate_answers(model, ChatTemplate(tokenizer), [question], max_new_tokens=6)
    assert printed == (
        f"Adapter epoch=1_5 answers. /help lists the commands.\n{first}\n{second.text}\n"
        f"Starting over, without a system prompt.\n{first}\nStarting over, with this system prompt.\n{brief}\n"
    )


def test_switches_adapters(base, tokenizer, tmp_path, type_lines, capsys):
    first = write_adapter(tmp_path / "one", base, tokenizer, seed=1)
    second = write_adapter(tmp_path / "two", base, tokenizer, seed=2)
    type_lines("Hi", "/adapter two", "/reset", "Hi", "/adapter off", "/reset", "Hi", "/adapter on", "/reset", "Hi",
               "/adapter three", "/adapter", "/fly", "/help")  # fmt: skip

    generate([first, second], max_new_tokens=6)

    printed = capsys.readouterr().out
    answers = [expected(base, tokenizer, "Hi", adapter) for adapter in (first, second, None)]
    assert len(set(answers)) == 3
    places = [printed.index(answer) for answer in answers]
    assert places == sorted(places)
    assert printed.count(answers[1]) == 2
    assert "Adapter two answers; adapters: one, two." in printed
    assert "The base answers; adapters: one, two." in printed
    assert "There is no adapter 'three'; there are one, two, on and off." in printed
    assert "Unknown command /fly." in printed


def test_an_interrupt_ends_the_answer_not_the_chat(adapter, type_lines, capsys, monkeypatch):
    type_lines("Hi", "/adapter")

    def interrupt(self, value):
        raise KeyboardInterrupt

    module = importlib.import_module("lightning_qlora.tools.generate")
    monkeypatch.setattr(module._Recorder, "put", interrupt)
    generate(adapter, max_new_tokens=6)

    assert capsys.readouterr().out.endswith("Adapter epoch=1_5 answers; adapters: epoch=1_5.\n\n")


def test_stops_where_training_taught_it_to(base, tokenizer, adapter, tmp_path, capsys):
    model = load_adapter(load_base_model(base), adapter)
    prompt = torch.tensor([ChatTemplate(tokenizer).encode_prompt([Message("user", "Hi")])])
    tokens = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :].tolist()
    stopping = write_adapter(tmp_path / "stop", base, tokenizer, stop=[tokens[2]])

    generate(stopping, prompt="Hi", max_new_tokens=6)

    assert capsys.readouterr().out == tokenizer.decode(tokens[: tokens.index(tokens[2])]) + "\n"


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_loads_the_base_as_it_was_in_training(base, tokenizer, tmp_path, capsys, quantization):
    trained = write_adapter(tmp_path / "a", base, tokenizer, quantization=quantization, manifest=True)

    generate(trained, prompt="Hi", max_new_tokens=6)

    captured = capsys.readouterr()
    assert captured.out == expected(base, tokenizer, "Hi", trained, quantization=quantization) + "\n"
    assert "not known" not in captured.err


def test_an_adapter_is_loaded_on_its_own_base_only(base, tokenizer, tmp_path, capsys):
    trained = write_adapter(tmp_path / "a", base, tokenizer, manifest=True)
    changed = load_base_model(base, quantization=None)
    changed.get_input_embeddings().weight.data += 0.5
    changed.save_pretrained(tmp_path / "other")
    other = str(tmp_path / "other")

    with pytest.raises(ValueError, match="does not belong here"):
        generate(trained, base=other, prompt="Hi", max_new_tokens=2)

    generate(trained, base=other, prompt="Hi", max_new_tokens=2, allow_mismatch=["base"])
    assert capsys.readouterr().out


def test_takes_the_bases_tokenizer_where_the_folder_has_none(base, tokenizer, tmp_path, capsys):
    bare = write_adapter(tmp_path / "bare", base)

    generate(bare, prompt="Hi", max_new_tokens=6)

    assert capsys.readouterr().out == expected(base, tokenizer, "Hi", bare) + "\n"


def test_sampling_follows_the_seed(adapter, capsys):
    def sample(seed):
        generate(adapter, prompt="Hi", max_new_tokens=12, temperature=3.0, seed=seed)
        return capsys.readouterr().out

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Nothing to answer with"),
        ({"base": "b", "prompt": "x", "file": "y"}, "both given"),
        ({"base": "b", "output": "y"}, "none is given"),
        ({"adapter": ["a", "b"], "prompt": "x"}, "compare asks several"),
        ({"base": "b", "temperature": -1.0}, "temperature=-1.0"),
        ({"base": "b", "top_p": 0.0}, "top_p=0.0"),
        ({"base": "b", "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"base": "b", "file": "missing.jsonl"}, "There is no file of questions"),
        ({"adapter": "missing"}, "is no adapter folder"),
    ],
)
def test_refuses_what_cannot_work_before_anything_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        generate(**options)


def test_adapters_of_two_bases(base, tokenizer, tmp_path):
    first = write_adapter(tmp_path / "one", base, tokenizer)
    second = write_adapter(tmp_path / "two", base, tokenizer)
    config = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    (tmp_path / "two" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "other"}))

    with pytest.raises(ValueError, match="name different bases"):
        generate([first, second])


def test_the_signature_is_the_command_line(adapter, base, tokenizer, capsys):
    auto_cli(TOOLS["generate"], args=[f"--adapter={adapter}", "--prompt=Hi", "--max_new_tokens=6"], as_positional=False)

    assert capsys.readouterr().out == expected(base, tokenizer, "Hi", adapter) + "\n"
    with pytest.raises(SystemExit, match="0"):
        auto_cli(TOOLS["generate"], args=["--help"], as_positional=False)
    assert "0 always takes the most likely token" in capsys.readouterr().out
