"""A tokenizer as llama.cpp reads it: tokens, their kinds, merges or scores, how text is split, where answers end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from lightning_qlora.text_splitting import name_of_splitting

__all__ = ["Vocabulary", "read_vocabulary", "write_vocabulary"]


class Vocabulary(NamedTuple):
    """What the GGUF file holds of a tokenizer.

    Attributes:
        model: ``gpt2`` for byte-level BPE, ``llama`` for SentencePiece's.
        pre: llama.cpp's name of the pre-tokenizer.
        tokens: By id, filled up to the rows of the embedding.
        types: llama.cpp's kind of each token.
        merges: Of byte-level BPE, in order.
        scores: Of SentencePiece: the higher, the earlier two pieces join.
        special: Token ids by what they are for: bos, eos, eot, eom, pad, unk.
        add_bos: Whether encoding begins with bos.
        add_eos: Whether encoding ends with eos.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, stop_token_ids: Sequence[int]) -> Vocabulary:
    """Translate a tokenizer.

    Args:
        tokenizer: One with a fast backend.
        vocab_size: Rows of the embedding.
        stop_token_ids: What ends an answer, the most usual first.

    Raises:
        ValueError: If llama.cpp has no equivalent, or the embedding has no row for a token.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    model = rules["model"]
    if model["type"] != "BPE":
        raise ValueError(_no_equivalent(f"a {model['type']} tokenizer"))
    is_byte_level = not model.get("byte_fallback")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if len(tokenizer) > vocab_size:
        raise ValueError(f"The tokenizer has {len(tokenizer)} tokens and the embedding {vocab_size} rows.")
    tokens, types = _tokens(rules, model, vocab_size)
    ids = tokenizer("a").input_ids
    return Vocabulary(
        model="gpt2" if is_byte_level else "llama",
        pre=_pre_tokenizer(rules) if is_byte_level else _sentencepiece(rules),
        tokens=tokens,
        types=types,
        merges=merges if is_byte_level else [],
        scores=[] if is_byte_level else _scores(tokens, model["merges"]),
        special=_special_ids(tokenizer, stop_token_ids),
        add_bos=tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id,
        add_eos=tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id,
    )


def _no_equivalent(what: str) -> str:
    return (
        f"{what} has no proven equivalent in llama.cpp here: written are byte-level BPE as of GPT-2, SmolLM, Llama 3 "
        "and Qwen, and SentencePiece's BPE as of Gemma. llama.cpp's own convert_hf_to_gguf.py takes the merged folder."
    )


def _tokens(rules: dict[str, Any], model: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    added = {token["id"]: token for token in rules["added_tokens"]}
    piece = {index: text for text, index in model["vocab"].items()}
    tokens, types = [], []
    for index in range(vocab_size):
        if index in added:
            tokens.append(added[index]["content"])
            types.append(TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED)
        elif index in piece:
            tokens.append(piece[index])
            is_byte = model.get("byte_fallback") and len(piece[index]) == 6 and piece[index].startswith("<0x")
            types.append(TokenType.BYTE if is_byte else TokenType.NORMAL)
        else:
            tokens.append(f"[PAD{index}]")
            types.append(TokenType.UNUSED)
    unknown = model["vocab"].get(model.get("unk_token"))
    if unknown is not None:
        types[unknown] = TokenType.UNKNOWN
    return tokens, [int(kind) for kind in types]


def _pre_tokenizer(rules: dict[str, Any]) -> str:
    name = name_of_splitting(rules)
    if name is None:
        raise ValueError(_no_equivalent(f"A tokenizer that splits by {json.dumps(rules['pre_tokenizer'])[:200]}"))
    return name


def _sentencepiece(rules: dict[str, Any]) -> str:
    """Recognise a tokenizer that writes spaces as a visible mark and puts none before the text."""
    normalizer = rules["normalizer"] or {}
    steps = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer]
    replaces = [step for step in steps if step.get("type") == "Replace"]
    splitting = (rules["pre_tokenizer"] or {}).get("type")
    if len(steps) != 1 or not replaces or replaces[0]["content"] != "▁" or splitting not in (None, "Split"):
        raise ValueError(_no_equivalent("A SentencePiece tokenizer that puts a space before the text"))
    return "default"


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Give each piece the rank of the merge that makes it: SentencePiece joins by score where BPE joins by rank."""
    rank: dict[str, int] = {}
    for index, pair in enumerate(merges):
        rank.setdefault("".join(pair.split(" ", 1) if isinstance(pair, str) else pair), index)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _special_ids(tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]) -> dict[str, int]:
    named = {
        "bos": tokenizer.bos_token_id,
        "pad": tokenizer.pad_token_id,
        "unk": tokenizer.unk_token_id,
    }
    stops = sorted(dict.fromkeys(stop_token_ids), key=lambda token: token != tokenizer.eos_token_id)
    stops = stops or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
    if len(stops) > 3:
        raise ValueError(f"llama.cpp's file names three tokens that end an answer; generation_config has {stops}.")
    named |= dict(zip(("eos", "eot", "eom"), stops, strict=False))
    return {name: index for name, index in named.items() if index is not None}


def write_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a vocabulary and the chat template."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(False)
    for name, index in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
    elif template:
        writer.add_chat_template(template)
