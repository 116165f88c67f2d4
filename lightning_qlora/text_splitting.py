"""How byte-level tokenizers split text before they merge: llama.cpp's names, and the steps of the tokenizers library.

A GGUF file holds the name only, and transformers gives every byte-level tokenizer that it reads from one GPT-2's way
of splitting. Most texts come out the same; numbers and runs of white space may not.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

__all__ = ["name_of_splitting", "restore_splitting"]

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}"
_REGEXES: dict[str, tuple[str, bool]] = {
    "llama-bpe": (_LLAMA, True),
    "smaug-bpe": (_LLAMA, False),
    "qwen2": (_QWEN, False),
}
"""By llama.cpp's name: what text is split by, and whether a piece that is a token is left unmerged."""
_PLAIN = ("gpt-2", "default")


def name_of_splitting(rules: dict[str, Any]) -> str | None:
    """Return llama.cpp's name for how a byte-level tokenizer splits text; the steps, not a name, decide.

    Args:
        rules: A ``tokenizer.json``.
    """
    pre = rules["pre_tokenizer"] or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    kinds = [step.get("type") for step in steps]
    if kinds[-1] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    own_regex = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and own_regex:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and own_regex and steps[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not own_regex and steps[0]["behavior"] == "Isolated":
        found = steps[0]["pattern"].get("Regex"), bool(rules["model"].get("ignore_merges"))
        return None if steps[0].get("invert") else next((n for n, known in _REGEXES.items() if known == found), None)
    return None


def restore_splitting(tokenizer: Tokenizer, name: str) -> bool:
    """Let a tokenizer that splits text as GPT-2 does split it as llama.cpp's name says.

    Args:
        tokenizer: Changed in place; one that splits in another way is left as it is.
        name: ``tokenizer.ggml.pre`` of a GGUF file.

    Returns:
        Whether it splits so now.
    """
    if not isinstance(tokenizer.pre_tokenizer, ByteLevel) or name in _PLAIN:
        return True
    if name == "smollm":
        tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
        return True
    if name not in _REGEXES:
        return False
    regex, tokenizer.model.ignore_merges = _REGEXES[name]
    split = Split(Regex(regex), "isolated")
    tokenizer.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    return True
