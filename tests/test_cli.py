import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import tiny_tokenizer
from tiny_models import save_tiny_model

from lightning_qlora.cli import main
from lightning_qlora.modules import SFTModule
from lightning_qlora.ranks import RankError


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"), tokenizer=tiny_tokenizer("chatml"))


@pytest.fixture
def run(base, tmp_path, monkeypatch, capsys):
    """Run the command line in an empty folder with a tiny base and 24 rows, and return its exit code and output."""
    monkeypatch.setenv("LIGHTNING_QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(24)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("questions.jsonl").write_text(
        "".join(json.dumps({"id": f"q{i}", "prompt": f"Hi {i}?"}) + "\n" for i in range(5))
    )
    config = {
        "model": {"model_name": base, "max_new_tokens": 4},
        "data": {"train": "train.jsonl", "validation": "train.jsonl", "max_length": 128, "predict": "questions.jsonl"},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "enable_progress_bar": False,
            "default_root_dir": "run",
            "log_every_n_steps": 1,
        },
    }
    Path("x.yaml").write_text(yaml.safe_dump(config))

    def call(subcommand, *arguments):
        try:
            code = main([subcommand, "--config=x.yaml", *arguments])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


def test_fit_writes_the_adapter_the_log_and_the_configuration(run):
    code, output = run("fit")
    assert code == 0, output
    assert list(Path("run").rglob("adapter_model.safetensors"))
    assert list(Path("run").rglob("metrics.csv"))
    (saved,) = Path("run").rglob("config.yaml")
    assert yaml.safe_load(saved.read_text())["data"]["init_args"]["max_length"] == 128


def test_options_reach_adapters_quantisation_optimizer_logger_and_callbacks(run):
    code, output = run(
        "fit",
        "--model.lora.r=3",
        "--model.quantization.bnb_4bit_quant_type=fp4",
        "--optimizer=torch.optim.SGD",
        "--optimizer.lr=0.5",
        "--trainer.logger=TensorBoardLogger",
        "--trainer.logger.save_dir=run",
        "--trainer.callbacks+=LearningRateMonitor",
    )
    assert code == 0, output
    (saved,) = Path("run").rglob("config.yaml")
    model = yaml.safe_load(saved.read_text())["model"]["init_args"]
    assert model["lora"]["init_args"]["r"] == 3
    assert model["quantization"]["bnb_4bit_quant_type"] == "fp4"
    assert model["quantization"]["load_in_4bit"] is True
    assert model["optimizer"]["class_path"] == "torch.optim.SGD"
    assert model["optimizer"]["init_args"]["lr"] == 0.5
    (adapter,) = [json.loads(p.read_text()) for p in Path("run").rglob("adapter_config.json")][:1]
    assert adapter["r"] == 3
    assert list(Path("run").rglob("events.out.tfevents.*"))


def test_fit_then_validate_test_and_predict_from_the_last_checkpoint(run):
    assert run("fit")[0] == 0
    code, output = run("validate", "--ckpt_path=last")
    assert code == 0, output
    code, output = run("test", "--ckpt_path=last", "--data.test=train.jsonl")
    assert code == 0, output
    code, output = run("predict", "--ckpt_path=last", "--data.batch_size=2")
    assert code == 0, output
    answers = [json.loads(line) for line in Path("run/predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in answers] == [f"q{i}" for i in range(5)]
    assert all(isinstance(row["answer"], str) for row in answers)


def test_a_run_may_be_named_as_a_checkpoint_and_mistakes_are_told(run):
    assert run("fit")[0] == 0
    code, output = run("validate", "--ckpt_path=run")
    assert code == 0, output
    code, last = run("validate", "--ckpt_path=last", "--trainer.default_root_dir=rum")
    assert (code, "error: There is no checkpoint in rum/checkpoints" in last) == (1, True)
    code, named = run("validate", "--ckpt_path=rum")
    assert (code, "error: ckpt_path='rum' is no checkpoint: it " in named) == (1, True)
    assert "Traceback" not in last + named


@pytest.mark.filterwarnings("ignore:You are trying to `self.log", "ignore:Be aware that when using `ckpt_path`")
def test_barebones_gets_nothing_that_it_forbids(run):
    assert run("fit")[0] == 0
    files = {path for path in Path("run").rglob("*") if path.suffix in (".safetensors", ".csv")}
    options = ["--trainer.barebones=true", "--trainer.log_every_n_steps=null"]
    for subcommand in (["fit"], ["fit", "--dry_run"], ["predict", "--ckpt_path=run"]):
        code, output = run(*subcommand, *options)
        assert code == 0, output
    assert len(Path("run/predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 5
    assert {path for path in Path("run").rglob("*") if path.suffix in (".safetensors", ".csv")} == files
    code, output = run("predict", "--ckpt_path=last", *options)
    assert (code, "Write the folder of the run as ckpt_path." in output) == (1, True)


def test_ckpt_path_last_resumes(run):
    assert run("fit")[0] == 0
    code, output = run("fit", "--ckpt_path=last", "--trainer.max_steps=4")
    assert code == 0, output
    metrics = "".join(p.read_text() for p in Path("run").rglob("metrics.csv"))
    assert metrics


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.train=nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--data.train=empty.jsonl"], ["empty.jsonl"]),
        (["--data.train=odd.jsonl"], ["colour", "messages"]),
        (["--model.model_name=no/such-model"], ["no/such-model"]),
        (["--model.lora.target_modules=[nothing]"], ["nothing", "q_proj"]),
        (["--data.chat_template=missing.jinja"], ["missing.jinja"]),
        (["--data.max_length=0"], ["max_length", "0"]),
        (
            ["--trainer.plugins=lightning.pytorch.plugins.BitsandbytesPrecision", "--trainer.plugins.mode=nf4"],
            ["Remove"],
        ),
        (["--trainer.precision=bf16-true"], ["bf16-mixed"]),
        (["--model.quantization=int8"], ["nf4"]),
        (["--model.activation_checkpointing=some"], ["none", "full"]),
        (["--model.lora.rank=4"], ["rank"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_a_mistake_ends_with_one_message_and_nothing_written(run, arguments, words):
    Path("empty.jsonl").write_text("")
    Path("odd.jsonl").write_text(json.dumps({"colour": "red"}) + "\n")
    code, output = run("fit", *arguments)
    assert code not in (0, None)
    assert "Traceback" not in output
    assert "error:" in output
    for word in words:
        assert word in output
    assert not list(Path().rglob("*.safetensors"))
    assert not list(Path().rglob("*.ckpt"))


def test_answers_without_supervised_tokens_are_refused(run):
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]}] * 3
    Path("empty_answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, output = run("fit", "--data.train=empty_answers.jsonl")
    assert code == 1
    assert "empty_answers.jsonl" in output


def test_what_another_rank_failed_at_is_one_message(run, monkeypatch):
    def build(module, base):
        raise RankError("Rank 1 failed: OSError: Input/output error")

    monkeypatch.setattr(SFTModule, "_build", build)
    code, output = run("fit")
    assert code == 1
    assert "error: Rank 1 failed: OSError: Input/output error" in output
    assert "Traceback" not in output


def test_a_traceback_is_shown_when_asked_for(run, monkeypatch):
    monkeypatch.setenv("LIGHTNING_QLORA_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"nowhere\.jsonl"):
        run("fit", "--data.train=nowhere.jsonl")


def test_print_config_round_trips(run):
    code, output = run("fit", "--print_config")
    assert code == 0
    Path("printed.yaml").write_text(output)
    code, again = run("fit", "--config=printed.yaml", "--print_config")
    assert again == output


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--help", ["--trainer.max_steps", "--model", "--data"]),
        ("--model.help=SFTModule", ["--model.lora", "The gradients are the same", "--model.quantization"]),
        ("--data.help=SFTDataModule", ["--data.max_length", "Most tokens of a row"]),
    ],
)
def test_help_explains_options_by_their_docstrings(run, argument, words):
    code, output = run("fit", argument)
    assert code == 0
    assert not [word for word in words if word not in " ".join(output.split())]


STARTED = """
import sys

import lightning as L


class Started(L.Callback):
    def on_train_batch_end(self, *_):
        print("imported:", *sys.modules)
"""

NOT_NEEDED = {"datasets", "lightning_qlora.tools", "pandas", "tensorboard", "torch._inductor.compile_fx", "trl"}
"""What would take tenths of a second each, or whole ones, before the first step."""


def test_fit_starts_without_what_it_does_not_need(run):
    Path("started.py").write_text(STARTED)
    options = ["--config=x.yaml", "--trainer.callbacks+=started.Started", "--trainer.max_steps=1"]
    result = subprocess.run(
        [sys.executable, "-m", "lightning_qlora", "fit", *options], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    (imported,) = [line.split()[1:] for line in result.stdout.splitlines() if line.startswith("imported:")]
    assert "lightning_qlora.data.datamodule" in imported
    assert not NOT_NEEDED & set(imported)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_forks_of_a_command_do_not_wait_for_threads_that_they_have_not(run, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    code, output = run("fit", "--print_config")
    assert code == 0, output
    backend, texts = tiny_tokenizer().backend_tokenizer, ["one two three"] * 100
    backend.encode_batch(texts)  # in threads
    child = multiprocessing.get_context("fork").Process(target=backend.encode_batch, args=(texts,))
    child.start()
    child.join(30)
    child.kill()
    assert child.exitcode == 0
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_module_entry_point_lists_every_subcommand():
    result = subprocess.run([sys.executable, "-m", "lightning_qlora", "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in ("fit", "validate", "test", "predict", "generate"):
        assert name in result.stdout


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--model.loss=ORPOLoss"], {"beta": 0.1, "likelihood_weight": 1.0}),
        (["--model.loss=SimPOLoss", "--model.loss.gamma=0.5"], {"beta": 2.0, "gamma": 0.5}),
        (["--model.loss=KTOLoss", "--model.loss.init_args.beta=0.3"], {"beta": 0.3, "desirable_weight": 1.0}),
    ],
)
def test_losses_of_preferences_are_named_with_their_options(run, arguments, options):
    code, output = run("fit", "--model=PreferenceModule", *arguments, "--print_config")
    assert code == 0, output
    printed = yaml.safe_load(output)["model"]["init_args"]["loss"]["init_args"]
    assert printed == {**printed, **options}


def test_one_loss_written_over_another_has_its_own_defaults(run):
    Path("dpo.yaml").write_text(
        yaml.safe_dump({"model": {"class_path": "PreferenceModule", "init_args": {"loss": "DPOLoss"}}})
    )
    for name, options in (("ORPOLoss", {"likelihood_weight": 1.0}), ("RobustDPOLoss", {"flipped_labels": 0.1})):
        code, output = run("fit", "--config=dpo.yaml", f"--model.loss={name}", "--print_config")
        assert code == 0, output
        assert yaml.safe_load(output)["model"]["init_args"]["loss"]["init_args"] == {"beta": 0.1, **options}
