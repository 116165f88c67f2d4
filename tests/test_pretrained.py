import sys

import pytest
from tiny import tiny_tokenizer
from tiny_models import save_tiny_model

from lightning_qlora.pretrained import cache_dir, load_tokenizer, resolve_pretrained


def test_folders_and_ids_stay_what_they_are(tmp_path):
    folder = save_tiny_model(tmp_path / "base")
    assert resolve_pretrained(folder) == folder
    assert resolve_pretrained("owner/model") == "owner/model"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{empty}", "config.json"),
        ("/no/such/folder", "existing folder"),
        ("./nowhere", "existing folder"),
        ("nowhere.gguf", "GGUF file"),
        ("package:no_such_package", "pip install no-such-package"),
        ("package:json", "found: none"),
        ("package:not a name", "which is not there"),
    ],
)
def test_what_is_not_there_is_named_with_what_to_write(tmp_path, name, words):
    with pytest.raises(ValueError, match=words):
        resolve_pretrained(name.format(empty=tmp_path))


def test_a_package_with_two_gguf_files_asks_which(tmp_path, monkeypatch):
    package = tmp_path / "two_models"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    for name in ("a.gguf", "b.gguf"):
        (package / name).write_bytes(b"GGUF")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ValueError, match=r"a\.gguf, b\.gguf.*two_models/FILE\.gguf"):
        resolve_pretrained("package:two_models")


def test_the_cache_follows_its_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTNING_QLORA_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("LIGHTNING_QLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "lightning_qlora"


def test_an_adapter_folder_lends_its_tokenizer(tmp_path):
    tiny_tokenizer("chatml").save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).chat_template == tiny_tokenizer("chatml").chat_template


def test_a_chat_template_is_text_or_a_file(tmp_path):
    folder = tmp_path / "base"
    tiny_tokenizer("chatml").save_pretrained(folder)
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}")
    assert load_tokenizer(str(folder), chat_template=str(tmp_path / "own.jinja")).chat_template.startswith("{{ mess")
    assert load_tokenizer(str(folder), chat_template="{{ 1 }}").chat_template == "{{ 1 }}"
    with pytest.raises(ValueError, match="neither Jinja text"):
        load_tokenizer(str(folder), chat_template="missing.jinja")


@pytest.mark.parametrize(
    ("special", "expected"), [(["<|pad|>"], "<|pad|>"), (["<|endoftext|>"], "<|endoftext|>"), ([], None)]
)
def test_padding_is_never_a_token_that_answers_end_with(tmp_path, special, expected):
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    known = set(tokenizer.all_special_tokens) | {str(t) for t in tokenizer.added_tokens_decoder.values()}
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    if expected is not None or "<|endoftext|>" in known:
        assert loaded.pad_token in {expected, "<|endoftext|>"}
    assert loaded.pad_token is None or loaded.pad_token_id != loaded.eos_token_id or len(known) == 1
