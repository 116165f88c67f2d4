"""How text is split before merging: from a name to the steps, and back; and the tokens that come of it."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from lightning_qlora.text_splitting import name_of_splitting, restore_splitting

NAMES = ["smollm", "llama-bpe", "smaug-bpe", "qwen2"]


def byte_level():
    """Merges that GPT-2's splitting allows, and others do not: white space before a digit, long numbers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("1", "2"), ("12", "3"), ("123", "4"), ("Ċ", "Ċ")]
    vocabulary = [*alphabet, *(one + two for one, two in merges)]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def rules(tokenizer):
    return json.loads(tokenizer.to_str())


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stands_for_steps_that_have_that_name(name):
    tokenizer = byte_level()
    assert name_of_splitting(rules(tokenizer)) == "gpt-2"
    assert restore_splitting(tokenizer, name)
    assert name_of_splitting(rules(tokenizer)) == name


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("gpt-2", ["a", "Ċ", "Ċ", "1234"]),
        ("smollm", ["a", "ĊĊ", "1", "2", "3", "4"]),
        ("llama-bpe", ["a", "ĊĊ", "123", "4"]),
        ("qwen2", ["a", "ĊĊ", "1", "2", "3", "4"]),
    ],
)
def test_numbers_and_white_space_become_the_tokens_of_the_training(name, tokens):
    tokenizer = byte_level()
    assert restore_splitting(tokenizer, name)
    assert tokenizer.encode("a\n\n1234").tokens == tokens


def test_what_is_not_known_stays_and_is_said():
    tokenizer = byte_level()
    before = tokenizer.to_str()
    assert not restore_splitting(tokenizer, "a-new-one")
    assert tokenizer.to_str() == before
    split = pre_tokenizers.Sequence([pre_tokenizers.Split("-", "isolated"), pre_tokenizers.ByteLevel(use_regex=False)])
    tokenizer.pre_tokenizer = split
    before = tokenizer.to_str()
    assert restore_splitting(tokenizer, "smollm")
    assert tokenizer.to_str() == before
    assert name_of_splitting(rules(tokenizer)) is None
