"""The subcommand ``inspect``: text, JSON and the page; limits that fail a pipeline; hostile rows."""

import io
import json
import re
from pathlib import Path

import pytest
import yaml
from page_elements import Elements
from tiny import tiny_tokenizer
from tiny_models import tiny_config

from lightning_qlora.cli import main
from lightning_qlora.data import SFTDataModule
from lightning_qlora.tools import TOOLS, inspect_data
from lightning_qlora.tools.inspection import gather, print_inspection, render_page
from lightning_qlora.tools.inspection.terminal import write as write_text

HOSTILE = "</pre></script><script>alert(1)</script><img src=x onerror='alert(1)'>&lt; \x1b[31m \u202e [[<|im_end|>]]"


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def data(tmp_path):
    def make(rows, name="train.jsonl", **options):
        file = write(tmp_path / name, rows)
        options = {"tokenizer": tiny_tokenizer(), **options}
        return SFTDataModule(train=file, cache_dir=str(tmp_path / "cache"), **options)

    return make


ROWS = [chat(f"Question {i}?", f"Answer {i}.") for i in range(12)]


def text_of(found, color="never", encoding="utf-8"):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_inspection(found, color=color, stream=stream)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


# The terminal


def test_supervised_rows_and_control_tokens_are_told_apart_without_colour(data):
    text = text_of(gather(data([chat("Two\nlines?", "One\ntwo")]), samples=1))
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if "train.jsonl:1 (train, " in line)
    assert lines[start + 1 : start + 10] == [
        "  | [[<|im_start|>]]system",
        "  | You are a helpful assistant.[[<|im_end|>]]",
        "  | [[<|im_start|>]]user",
        "  | Two",
        "  | lines?[[<|im_end|>]]",
        "  | [[<|im_start|>]]assistant",
        "  + One",
        "  + two[[<|im_end|>]]",
        "  | ",
    ]
    assert "\x1b" not in text


def test_what_the_template_does_to_ordinary_chats_is_said_beforehand(data):
    found = data(ROWS, tokenizer=tiny_tokenizer("qwen"))
    notes = [line.split(maxsplit=1)[1] for line in text_of(gather(found)).splitlines() if line.startswith("  Note ")]
    assert tuple(notes) == found.chat.notes
    assert len(notes) == 1


def test_colour_adds_nothing_but_colour(data):
    found = gather(data(ROWS), samples=2)
    colored = text_of(found, "always")
    assert "\x1b[32m" in colored
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == text_of(found)


def test_hostile_text_neither_steers_the_terminal_nor_looks_like_a_control_token(data):
    text = text_of(gather(data([chat(HOSTILE, HOSTILE + "\n| [[<|im_start|>]]user")]), samples=1))
    assert "\x1b" not in text
    assert "\u202e" not in text
    shown = text[text.index("as the model sees them") :]
    assert shown.count("[[<|im_start|>]]") == 3
    assert "+ | [\\u005b<|im_start|>]]user" in shown


def test_text_that_the_terminal_cannot_encode_is_escaped(data):
    text = text_of(gather(data([chat("你好", "naïve 😀")]), samples=1), encoding="ascii")
    assert "\\u4f60\\u597d" in text
    write_text("é", stream := io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    stream.flush()
    assert stream.buffer.getvalue() == b"\\xe9\n"


def test_the_text_has_every_table(data, tmp_path):
    rows = [*ROWS, *ROWS[:2], {"mess": 1}]
    validation = write(tmp_path / "v.jsonl", ROWS[:3])
    module = data(rows, validation=validation, max_length=64, max_invalid_fraction=0.5)
    text = text_of(gather(module, samples=1, what_if=[16, 1024]))
    for words in (
        "Rows            15 read, 14 kept, 1 refused",
        "train.jsonl:15: found the keys 'mess'",
        "Duplicates      2 rows equal an earlier one",
        "of 3 rows, training rows too: 3; with a question that is trained on: 3",
        "<- configured",
        "% filled",
        "Stop tokens     <|im_end|>",
        "begin with 1",
        module.chat.fingerprint,
    ):
        assert words in text, words


def test_colours_need_a_terminal_and_heed_no_color(monkeypatch):
    from lightning_qlora.tools.inspection.terminal import use_color

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert use_color("auto", Terminal())
    assert not use_color("auto", io.StringIO())
    assert use_color("always", io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not use_color("auto", Terminal())
    assert use_color("always", Terminal())


# The page


def test_the_page_loads_nothing_and_runs_nothing_but_its_own_script(data):
    module = data([chat(HOSTILE, HOSTILE), *ROWS, {"<b onclick=x>": 1}], name="a<img src=x>/'\"><b>.jsonl")
    module.max_invalid_fraction = 1.0
    page = render_page(gather(module, samples=20, what_if=[8]))
    elements = Elements(page)
    assert elements.tags.count("script") == elements.tags.count("style") == 1
    assert not {"img", "link", "iframe", "object", "b onclick"} & set(elements.tags)
    for tag, name, value in elements.attributes:
        assert not name.startswith("on"), (tag, name, value)
        assert name not in ("src", "srcset", "style"), (tag, name, value)
        if name == "href":
            assert value.startswith("#")
    assert "http" not in page.replace("http-equiv", "")
    assert "url(" not in page
    text = "".join(elements.text)
    assert "<script>alert(1)</script><img src=x onerror='alert(1)'>&lt; \\u001b[31m \\u202e" in text
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_the_policy_of_the_page_names_its_script_and_style(data):
    import base64
    import hashlib

    page = render_page(gather(data(ROWS), samples=1))
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for element in ("script", "style"):
        (content,) = re.findall(f"<{element}>(.*?)</{element}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in policy


def test_the_page_marks_what_is_supervised(data):
    page = render_page(gather(data([chat("Why?", "Because.")]), samples=1))
    assert '<span class="learned">Because.</span><span class="learned control">&lt;|im_end|&gt;</span>' in page
    assert '<span class="context control">&lt;|im_start|&gt;</span><span class="context">user' in page


def test_the_page_draws_every_row_and_batch_and_the_limit(data):
    found = gather(data([*ROWS, chat("long " * 90, "x")], max_length=64, max_invalid_fraction=1.0), samples=1)
    page = render_page(found)
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(charts) == 3
    counted = [sum(int(n) for n in re.findall(r": ([\d,]+) (?:rows|batches)</title>", chart)) for chart in charts]
    assert counted == [13, 12, found.stages[0].batches.num_batches]
    assert "max_length 64" in charts[0]
    for chart in charts:
        for x, width in re.findall(r'x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', chart):
            assert 0 <= float(x) <= float(x) + float(width) <= 480


# The tool


def test_json_is_all_there_is_on_standard_output(data, capsys):
    inspect_data(data(ROWS), json=True, samples=2)
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["version"] == 1
    assert found["stages"][0]["report"]["rows_read"] == 12
    assert len(found["samples"]) == 2
    assert captured.out.isascii()


def test_page_and_text_may_show_different_numbers_of_rows(data, tmp_path, capsys):
    page = tmp_path / "new" / "page.html"
    inspect_data(data(ROWS), html=str(page), samples=1, html_samples=5)
    assert page.read_text(encoding="utf-8").count("<article") == 5
    assert "1 row as the model sees them" in capsys.readouterr().out


def test_a_missed_limit_fails_after_everything_is_shown(data, tmp_path, capsys):
    page = tmp_path / "page.html"
    with pytest.raises(ValueError, match=r"duplicate rows 1, allowed at most 0 \(max_duplicates\)"):
        inspect_data(data([*ROWS, ROWS[0]]), json=True, html=str(page), max_duplicates=0)
    found = json.loads(capsys.readouterr().out)
    assert [v["passed"] for v in found["verdicts"] if v["name"] == "max_duplicates"] == [False]
    assert 'class="missed"' in page.read_text(encoding="utf-8")


def test_the_limit_of_the_configuration_counts_too(data, capsys):
    with pytest.raises(ValueError, match="max_invalid_fraction"):
        inspect_data(data([*ROWS, {"mess": 1}]))
    assert "12 kept, 1 refused" in capsys.readouterr().out


def test_rows_are_shown_by_their_place_also_refused_ones(data, tmp_path, capsys):
    module = data([*ROWS, {"mess": 1}, chat("word " * 99, "x")], max_length=64, max_invalid_fraction=1.0)
    page = tmp_path / "page.html"
    places = ["train.jsonl:3", f"{tmp_path}/train.jsonl:13", "train.jsonl:14"]
    inspect_data(module, show=places, samples=0, html=str(page), html_samples=2)
    text = capsys.readouterr().out
    assert "3 rows as the model sees them" in text
    assert "  + Answer 2.[[<|im_end|>]]" in text
    assert "train.jsonl:13 (train) refused: unknown-shape: found the keys 'mess'" in text
    assert "train.jsonl:14 (train) refused: too-long" in text
    assert page.read_text(encoding="utf-8").count("<article") == 5
    with pytest.raises(ValueError, match=r"no row at train\.jsonl:99"):
        inspect_data(module, show="train.jsonl:99")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": -1}, "samples is -1"),
        ({"html_samples": -1}, "html_samples is -1"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"world_size": 0}, "world_size is 0"),
        ({"what_if": [0]}, "what_if"),
        ({"max_refused_fraction": 2.0}, "max_refused_fraction is 2"),
    ],
)
def test_options_out_of_range_are_refused(data, options, words):
    with pytest.raises(ValueError, match=words):
        inspect_data(data(ROWS), **options)


# The command line


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the subcommand with a base that has a tokenizer but no weights."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    tiny_config(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    monkeypatch.setenv("LIGHTNING_QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write(Path("train.jsonl"), ROWS)
    config = {
        "model": {"model_name": str(tmp_path / "base")},
        "data": {"train": "train.jsonl", "validation": "train.jsonl", "max_length": 128},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "default_root_dir": "run"},
    }
    Path("x.yaml").write_text(yaml.safe_dump(config))

    def call(*arguments):
        try:
            code = main(["inspect", "--config=x.yaml", *arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def test_the_subcommand_takes_the_configuration_of_fit_and_no_weights(run):
    assert TOOLS["inspect"] is inspect_data
    code, out, err = run("--json=true", "--show=train.jsonl:5")
    assert code == 0, err
    found = json.loads(out)
    assert found["stages"][0]["num_rows"] == 12
    assert found["leakage"][0]["num_exact"] == 12
    assert found["plan"]["epochs"] == 2
    assert found["samples"][0]["place"] == "train.jsonl:5"
    assert not Path("run").exists()


def test_a_missed_limit_is_the_exit_code_and_one_message(run):
    code, out, err = run("--json=true", "--max_leakage=3")
    assert code == 1
    assert json.loads(out)["verdicts"]
    assert "validation: rows that are trained on 12, allowed at most 3 (max_leakage)" in err
    assert "Traceback" not in err


def test_help_explains_every_option(run):
    code, out, _ = run("--help")
    assert code == 0
    for words in ("--max_leakage", "--min_supervised_share", "--what_if", "Write everything as JSON"):
        assert words in out


def test_settings_for_gpus_need_none_to_be_inspected(run):
    gpus = ("--trainer.accelerator=gpu", "--trainer.devices=[0,1,2,3]", "--trainer.strategy=ddp")
    code, out, err = run("--json", *gpus, "--trainer.precision=bf16-mixed", "--trainer.num_nodes=2")
    assert code == 0, err
    assert json.loads(out)["plan"]["world_size"] == 8
