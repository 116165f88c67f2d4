import json
import logging
from pathlib import Path

import pytest
from tiny import tiny_tokenizer
from tiny_models import save_tiny_model

from lightning_qlora.checkpoints.publishing import LocalStore
from lightning_qlora.cli import main
from lightning_qlora.redaction import scrub


@pytest.mark.parametrize(
    "name",
    [
        "token",
        "hf_token",
        "HF_TOKEN",
        "use_auth_token",
        "api_key",
        "apikey",
        "WANDB_API_KEY",
        "password",
        "db.password",
        "client_secret",
        "AWS_SECRET_ACCESS_KEY",
        "aws_access_key_id",
        "access-token",
        "credentials",
        "passphrase",
    ],
)
def test_names_of_secrets(name):
    assert scrub({name: "abc"}, {}) == {name: "<secret>"}


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer",
        "pad_token",
        "eos_token",
        "additional_special_tokens",
        "token_budget",
        "max_tokens",
        "max_new_tokens",
        "image_token",
        "untrained_tokens",
        "target_modules",
        "monkey",
        "key",
        "modules_to_save",
        "keys",
    ],
)
def test_names_that_are_none(name):
    assert scrub({name: "abc"}, {}) == {name: "abc"}


@pytest.mark.parametrize(
    "text",
    [
        "hf_abcdefghijklmnopqrstuvwxyz0123456789",
        "sk-proj-abcdefghijklmnopqrstuv",
        "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
        "AKIAABCDEFGHIJKLMNOP",
        "https://user:hunter2@host/path",
    ],
)
def test_values_that_look_like_secrets(text):
    scrubbed = scrub({"note": [f"before {text} after"]}, {})["note"][0]
    assert "<secret>" in scrubbed
    assert scrubbed.startswith("before")
    assert scrubbed.endswith("after")
    assert "hunter2" not in scrubbed
    assert text not in scrubbed


def test_values_of_the_environment():
    environment = {"MY_SERVICE_TOKEN": "correct-horse-battery", "HOME": "/root/somewhere", "PIN_PASSWORD": "short"}
    config = {"url": "s3://x?t=correct-horse-battery", "home": "/root/somewhere", "n": ("short", 3, None, True)}
    assert scrub(config, environment) == {
        "url": "s3://x?t=<secret>",
        "home": "/root/somewhere",
        "n": ("short", 3, None, True),
    }


def test_shapes_and_numbers_stay():
    config = {"token": 5, "lr": 1e-4, "list": [1, {"password": None}], "empty": {"token": ""}}
    assert scrub(config, {}) == config


@pytest.mark.filterwarnings("ignore:.*tensorboardX")
@pytest.mark.parametrize("logger", ["CSVLogger", "TensorBoardLogger"])
def test_a_run_writes_no_secret_anywhere(tmp_path, monkeypatch, capfd, caplog, logger):
    """Secrets of the environment and of the configuration are in no file of the run, nor in what it prints."""
    secrets = ("correct-horse-battery", "hf_abcdefghijklmnopqrstuvwx", "hunter2hunter2", "opensesame")
    base = save_tiny_model(tmp_path / "base", tokenizer=tiny_tokenizer("chatml"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", secrets[0])
    monkeypatch.setenv("LIGHTNING_QLORA_CACHE", str(tmp_path / "run" / "cache"))
    Path("train.jsonl").write_text("".join(json.dumps({"prompt": "a", "completion": "b"}) + "\n" for _ in range(4)))
    arguments = [
        "fit",
        f"--model.model_name={base}",
        f"--model.model_kwargs={json.dumps({'token': secrets[1], 'proxies': {'password': secrets[3]}})}",
        "--data.train=train.jsonl",
        f"--data.template_kwargs={json.dumps({'note': f'see {secrets[0]} at https://me:{secrets[2]}@host/'})}",
        f"--trainer.logger={logger}",
        "--trainer.logger.save_dir=run",
        "--trainer.max_steps=1",
        "--trainer.log_every_n_steps=1",
        "--trainer.accelerator=cpu",
        "--trainer.default_root_dir=run",
    ]
    with caplog.at_level(logging.DEBUG):
        assert main(arguments) == 0
    files = [path for path in Path("run").rglob("*") if path.is_file()]
    assert {"config.yaml", "hparams.yaml", "trainer.ckpt", "manifest.json"} <= {path.name for path in files}
    told = "".join(capfd.readouterr()) + caplog.text
    for secret in secrets:
        assert secret not in told
        assert [path for path in files if secret.encode() in path.read_bytes()] == []
    config = LocalStore("run/checkpoints").newest_valid().metadata["config"]
    note = {"note": "see <secret> at https://<secret>@host/"}
    assert config["data"]["template_kwargs"] == config["command_line"]["data"]["init_args"]["template_kwargs"] == note
    assert config["command_line"]["trainer"]["max_steps"] == 1
    assert "token: <secret>" in next(path for path in files if path.name == "config.yaml").read_text()
