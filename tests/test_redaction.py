import pytest

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
