"""Texts of strangers, so that a reader sees every character and none acts."""

from __future__ import annotations

import unicodedata

__all__ = ["visible"]

_JOINERS = "\u200c\u200d"  # parts of words and emoji; they draw nothing by themselves
_HIDDEN = ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")


def visible(text: str) -> str:
    r"""Write characters that draw nothing, or that steer a terminal or the direction of text, as ``\u001b``."""
    if text.isprintable():
        return text
    return "".join(character if _draws(character) else f"\\u{ord(character):04x}" for character in text)


def _draws(character: str) -> bool:
    return character in "\n\t" or character in _JOINERS or unicodedata.category(character) not in _HIDDEN
