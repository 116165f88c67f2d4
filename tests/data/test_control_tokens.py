"""Control tokens: which tokens are some, and a twin that encodes everything else as the tokenizer does."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from lightning_qlora.data.control_tokens import ControlTokens, Match

KINDS = ("bytelevel", "metaspace", "metaspace_always", "unigram", "prepend", "gemma", "awkward")


def test_control_tokens_are_special_or_look_so_or_are_named_by_the_template():
    extra = ["<|fim|>", "<tool_call>", "<h1>", "<row>", "word", "  ", AddedToken("<sep>", special=True)]
    tokenizer = tiny_tokenizer("chatml", extra_tokens=extra)
    found = set(ControlTokens(tokenizer, "{{ '<row>' }} word").contents.values())
    assert found == {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim|>", "<tool_call>", "<row>", "<sep>"}


def test_a_tokenizer_without_backend_is_refused():
    with pytest.raises(ValueError, match="no backend of the `tokenizers` library"):
        ControlTokens(object())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", FAMILIES)
def test_the_twin_agrees_with_the_tokenizer_on_clean_text(style, kind):
    tokens = ControlTokens(tiny_tokenizer(style, kind))
    names = list(tokens.contents.values())
    text = f"{names[0]}Hi  there{names[1]}\nHéllo 漢 {names[-1]} Whole <tail> end{names[0]}"
    matches = tokens.matches(text)
    assert [tokens.contents[match.token_id] for match in matches] == [names[0], names[1], names[-1], names[0]]
    twin = tokens._encode_by_twin(text, matches)
    assert twin is not None
    assert twin.ids == tokens.backend.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module", params=KINDS)
def tokens(request):
    return ControlTokens(tiny_tokenizer("qwen", request.param))


@settings(max_examples=40, deadline=None)
@given(text=st.text(st.characters(max_codepoint=0xFFFFF, exclude_categories=["Cs"])), data=st.data())
def test_no_text_makes_a_control_token_in_the_twin(tokens, text, data):
    name = data.draw(st.sampled_from(sorted(tokens.contents.values())))
    written = tokens.encode_batch([text + name + text], [[]])[0]
    assert written is not None
    assert not set(written.ids) & set(tokens.contents)


def test_expected_control_tokens_that_are_not_read_are_noticed():
    tokens = ControlTokens(tiny_tokenizer("chatml", extra_tokens=[AddedToken("STOP", special=True, single_word=True)]))
    stop = tokens.backend.token_to_id("STOP")
    alone, within = tokens.encode_batch(["a STOP b", "aSTOPb"], [[Match(2, 6, stop)], [Match(1, 5, stop)]])
    assert alone is not None
    assert alone.ids[alone.places[0]] == stop
    assert within is None


def test_a_vocabulary_that_spells_its_control_tokens_is_safe_too():
    vocabulary = {"[UNK]": 0, "[END]": 1, "hi": 2}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[END]")
    tokens = ControlTokens(tokenizer)
    assert tokens.backend.encode("hi [END]", add_special_tokens=False).ids == [2, 1]
    (written,) = tokens.encode_batch(["hi [END]"], [[]])
    assert written is not None
    assert written.ids == [2, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unknown", ["<|endoftext|>", "<unk>"])
def test_a_token_that_is_only_called_unknown_is_a_control_token(kind, unknown):
    tokenizer = tiny_tokenizer("chatml", kind, extra_tokens=[AddedToken("<unk>", special=True)])
    tokenizer.unk_token = unknown
    tokens = ControlTokens(tokenizer)
    assert unknown in tokens.contents.values()
    (written,) = tokens.encode_batch([f"a {unknown} b 𓂀"], [[]])
    assert written is not None
    assert not set(written.ids) & set(tokens.contents)
    assert tokens.backend.decode(written.ids).strip() == f"a {unknown} b 𓂀"


def test_a_token_that_stands_for_unknown_characters_is_none():
    backend = Tokenizer(WordLevel({"[UNK]": 0, "[END]": 1, "hi": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens(["[UNK]", "[END]"])
    tokens = ControlTokens(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[END]"))
    assert set(tokens.contents.values()) == {"[END]"}
    (written,) = tokens.encode_batch(["hi 漢 [UNK]"], [[]])
    assert written is not None
    assert written.ids == [2, 0, 0]


@pytest.mark.parametrize("kind", ["gemma", "unigram"])
def test_a_control_token_that_plain_text_would_make_is_cut_out_of_the_vocabulary(kind):
    plain = tiny_tokenizer("chatml", kind)
    word = max((piece for piece in plain.get_vocab() if piece.isascii() and piece.isalpha()), key=len)
    tokens = ControlTokens(tiny_tokenizer("chatml", kind, extra_tokens=[AddedToken(word, special=True)]))
    token_id = tokens.backend.token_to_id(word)
    assert token_id in tokens.backend.encode(word, add_special_tokens=False).ids
    (written,) = tokens.encode_batch([word], [[]])
    assert written is not None
    assert token_id not in written.ids
    assert tokens.backend.decode(written.ids) == word


@pytest.mark.parametrize(
    ("name", "inert"),
    [("lookup", True), ("get_time-2", True), ("im_end", False), ("x<|im", False), ("", False), ("two words", False)],
)
def test_inert_names_can_be_no_part_of_a_control_token(name, inert):
    assert ControlTokens(tiny_tokenizer("chatml")).is_inert(name) is inert


def test_names_that_reach_over_the_end_of_a_bare_token_are_not_inert():
    tokens = ControlTokens(tiny_tokenizer("chatml", extra_tokens=[AddedToken("END|turn", special=True)]))
    assert not tokens.is_inert("the_end")
    assert not tokens.is_inert("turn_over")
    assert tokens.is_inert("lookup")
