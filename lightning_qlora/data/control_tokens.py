"""Control tokens: the added tokens that steer a model, and how content is kept from writing them.

A tokenizer turns the text ``<|im_start|>`` into a control token wherever it stands, also in a user's message.
Here a row is encoded by the ordinary tokenizer first; that is the end of it when exactly the control tokens that
the chat template wrote came out, each at its place. Otherwise the row is encoded by a *twin* of the tokenizer, in
which every control token answers to a private-use character instead of its name: the template's own control
tokens are replaced by those characters, everything else is plain text and stays plain text, while flags,
normalizer, pre-tokenizer and model are the same, so that all other tokens come out as they would have.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

__all__ = ["RESERVED_MARKERS", "THINK_CLOSE", "THINK_OPEN", "ControlTokens", "Match", "Written"]

THINK_OPEN: frozenset[str] = frozenset(
    {"<think>", "<thinking>", "[THINK]", "<seed:think>", "◁think▷", "<|START_THINKING|>", "<reasoning>"}
)
"""Markers that open an assistant's reasoning, as model families write them."""

THINK_CLOSE: frozenset[str] = frozenset(
    {"</think>", "</thinking>", "[/THINK]", "</seed:think>", "◁/think▷", "<|END_THINKING|>", "</reasoning>"}
)
"""Markers that close an assistant's reasoning."""

RESERVED_MARKERS: frozenset[str] = (
    THINK_OPEN
    | THINK_CLOSE
    | {
        "<tool_call>",
        "</tool_call>",
        "<tool_calls>",
        "</tool_calls>",
        "[TOOL_CALLS]",
        "[CALL_ID]",
        "[ARGS]",
        "<|python_tag|>",
        "<|tool_call|>",
        "<|/tool_call|>",
        "<|tool_call_start|>",
        "<|tool_call_end|>",
        "<|tool_call>",
        "<tool_call|>",
        "<|START_ACTION|>",
        "<|END_ACTION|>",
        "<function_call>",
        "</function_call>",
        "<start_function_call>",
        "<end_function_call>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
    }
)
"""Think and tool-call markers, which the text of an assistant may write as real tokens; no other text may."""

SENTINEL_BASE = 0x108000
"""Private-use code points from here on name the control tokens in the twin."""

CONTROL_SHAPE = re.compile(r"<[|｜].+[|｜]>", re.DOTALL)
"""What a control token looks like that nobody declared special, such as ``<|fim_prefix|>`` of Qwen2.5."""


STRANGE_TEXT = "\U00013000 \U00030edd \U000e0fff \U0010fffd"
"""Characters that hardly a vocabulary holds: a hieroglyph, a rare ideograph, an unassigned and a private one."""

NAME_PUNCTUATION = str.maketrans("", "", "_-.")
"""What the names of functions and calls may hold besides letters and digits."""


class Match(NamedTuple):
    """One control token in a text: characters ``start`` to ``end`` without the white space it swallows."""

    start: int
    end: int
    token_id: int


class Written(NamedTuple):
    """An encoded text whose control tokens are exactly those that were expected.

    Attributes:
        ids: The token ids.
        encoding: The backend's encoding, for offsets. They count the characters of the text that was encoded.
        places: For each expected control token, the index of its token.
        shrunk: Whether the twin encoded the text, with one character for each control token.
    """

    ids: list[int]
    encoding: Encoding
    places: list[int]
    shrunk: bool

    def start(self, token: int) -> int:
        """The first character of a token."""
        begin, _ = self.encoding.token_to_chars(token) or (0, 0)
        return begin

    def token_at(self, position: int) -> int:
        """The first token that holds the character at ``position`` or, where none does, the next one."""
        while (token := self.encoding.char_to_token(position)) is None and position < self.start(len(self.ids) - 1):
            position += 1
        return len(self.ids) - 1 if token is None else token


def _is_control(token: AddedToken, template_source: str) -> bool:
    content: str = token.content
    if content.isspace():
        return False  # Gemma's "\n\n" is ordinary text
    if token.special or content in RESERVED_MARKERS or CONTROL_SHAPE.fullmatch(content):
        return True
    return content in template_source and not content.isalnum()


class ControlTokens:
    r"""Knows a tokenizer's control tokens and encodes text without letting content write any.

    Control tokens are the added tokens that are declared special, that look like ``<|...|>``, that are think or
    tool markers, or that the chat template names; but not white space, and not the token that the tokenizer gives for
    characters it does not know. What is only called ``unk_token`` is one: tokenizers of bytes know every character, and
    often give that name to the token that ends a text.

    Args:
        tokenizer: A tokenizer with a backend of the ``tokenizers`` library.
        template_source: The chat template's source text.
        content_tokens: Added tokens that any text may write as real tokens, such as special tokens of a domain.

    Raises:
        ValueError: If ``tokenizer`` has no such backend, or ``content_tokens`` names something else.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template_source: str = "", content_tokens: Iterable[str] = ()
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError(
                f"{type(tokenizer).__name__} has no backend of the `tokenizers` library, which the proof of the masks "
                "needs. Load a tokenizer that comes with a tokenizer.json (AutoTokenizer makes one for most models)."
            )
        self.state: str = backend.to_str()
        self.backend = _plain_copy(self.state)
        allowed = set(content_tokens)
        added: dict[int, AddedToken] = self.backend.get_added_tokens_decoder()
        if unknown := allowed - {token.content for token in added.values()}:
            raise ValueError(
                f"content_tokens names {sorted(unknown)}, which the tokenizer does not have as added tokens."
            )
        allowed |= _unknown_tokens(self.backend, added)
        self.contents: dict[int, str] = {
            token_id: token.content
            for token_id, token in added.items()
            if token.content not in allowed and _is_control(token, template_source)
        }
        self.reserved_ids = frozenset(i for i, content in self.contents.items() if content in RESERVED_MARKERS)
        self._is_control_V = np.zeros(max([self.backend.get_vocab_size(), *added]) + 1, dtype=bool)
        self._is_control_V[list(self.contents)] = True
        names = [content.casefold() for content in self.contents.values()]
        self._all_names = "\0".join(names)
        self._bare_names = [name for name in names if name[0].isalnum() or name[-1].isalnum()]
        self.matches = lru_cache(maxsize=16384)(self._matches)
        self.is_inert = lru_cache(maxsize=16384)(self._is_inert)
        self._twin: Tokenizer | None = None
        self._twin_ids: dict[int, int] = {}

    def _matches(self, text: str) -> tuple[Match, ...]:
        """Find the control tokens that the tokenizer reads in ``text`` (cached as ``matches``)."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        found = []
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if self._is_control_V[token_id]:
                core = text[start:end]
                start += len(core) - len(core.lstrip())
                found.append(Match(start, start + len(core.strip()), token_id))
        return tuple(found)

    def _is_inert(self, text: str) -> bool:
        """Whether ``text`` is a plain name that can be no part of a control token, wherever a template puts it.

        (Cached as ``is_inert``.)
        """
        name = text.casefold()
        if not name.translate(NAME_PUNCTUATION).isalnum() or name in self._all_names:
            return False
        # A name without brackets reaches over the end of a control token only where that end has none either.
        return not any(
            bare in name or any(name.endswith(bare[:n]) or name.startswith(bare[-n:]) for n in range(1, len(bare)))
            for bare in self._bare_names
        )

    def encode_batch(self, texts: Sequence[str], expected: Sequence[Sequence[Match]]) -> list[Written | None]:
        """Encode texts so that each holds exactly the control tokens expected of it.

        Args:
            texts: The rendered texts.
            expected: For each, the control tokens that its chat template wrote, in order.

        Returns:
            For each text its encoding, or ``None`` where even the twin finds other control tokens.
        """
        written = [
            self._check(encoding, matches, [match.start for match in matches])
            for encoding, matches in zip(
                self.backend.encode_batch(texts, add_special_tokens=False), expected, strict=True
            )
        ]
        return [
            self._encode_by_twin(text, matches) if clean is None else clean
            for clean, text, matches in zip(written, texts, expected, strict=True)
        ]

    def _check(
        self, encoding: Encoding, matches: Sequence[Match], starts: Sequence[int], shrunk: bool = False
    ) -> Written | None:
        ids: list[int] = encoding.ids
        if shrunk and self._twin_ids:
            ids = [self._twin_ids.get(token_id, token_id) for token_id in ids]
        if int(np.count_nonzero(self._is_control_V[np.fromiter(ids, np.int64, len(ids))])) != len(matches):
            return None
        places: list[int] = []
        for match, start in zip(matches, starts, strict=True):
            place = encoding.char_to_token(start)
            if place is None or ids[place] != match.token_id:
                return None
            places.append(place)
        return Written(ids, encoding, places, shrunk)

    def _encode_by_twin(self, text: str, matches: Sequence[Match]) -> Written | None:
        if self._twin is None:
            self._twin, self._sentinels, self._twin_ids = _build_twin(self.state, self.contents)
        pieces, starts, position = [], [], 0
        for index, match in enumerate(matches):
            pieces += [text[position : match.start], self._sentinels[match.token_id]]
            starts.append(shrink(match.start, matches[:index]))
            position = match.end
        pieces.append(text[position:])
        encoding = self._twin.encode("".join(pieces), add_special_tokens=False)
        return self._check(encoding, matches, starts, shrunk=True)


def _unknown_tokens(backend: Tokenizer, added: dict[int, AddedToken]) -> set[str]:
    """Return the added tokens that come of text which does not name them: those for unknown characters."""
    ids = backend.encode(STRANGE_TEXT, add_special_tokens=False).ids
    return {added[token_id].content for token_id in ids if token_id in added}


def shrink(position: int, matches: Iterable[Match]) -> int:
    """Translate a character position to the text in which one character stands for each control token before it."""
    return position - sum(match.end - match.start - 1 for match in matches if match.end <= position)


def _plain_copy(state: str) -> Tokenizer:
    """Load a backend that neither truncates nor pads, whatever the original was last used for."""
    copy = Tokenizer.from_str(state)
    copy.no_truncation()
    copy.no_padding()
    return copy


def _build_twin(state: str, contents: dict[int, str]) -> tuple[Tokenizer, dict[int, str], dict[int, int]]:
    """Build the tokenizer in which control tokens answer to private-use characters only.

    Returns:
        The twin, the character of each control token by its id, and the ids of the twin that differ from the
        original's, with what they stand for.
    """
    sentinels = {token_id: chr(SENTINEL_BASE + index) for index, token_id in enumerate(sorted(contents))}
    plain: set[int] = set()
    for _ in range(2):
        twin = _plain_copy(json.dumps(_rename(json.loads(state), contents, sentinels, plain)))
        names = {token_id: sentinels.get(token_id, token.content) for token_id, token in _added(state).items()}
        twin_ids = {
            twin_id: token_id
            for token_id, name in names.items()
            if (twin_id := twin.token_to_id(name)) is not None and twin_id != token_id
        }
        deaf = {
            token_id
            for token_id, name in sentinels.items()
            if [twin_ids.get(i, i) for i in twin.encode(name, add_special_tokens=False).ids] != [token_id]
        }
        if not deaf:
            return twin, sentinels, twin_ids
        plain |= deaf  # a normalizer removes private-use characters: match these before it runs
    raise ValueError(
        f"The tokenizer does not keep private-use characters apart ({[contents[i] for i in sorted(deaf)][:5]}); "
        "content that writes control tokens cannot be made safe with it."
    )


def _added(state: str) -> dict[int, AddedToken]:
    return dict(Tokenizer.from_str(state).get_added_tokens_decoder())


def _rename(
    state: dict[str, Any], contents: dict[int, str], sentinels: dict[int, str], plain: set[int]
) -> dict[str, Any]:
    """Give every control token its private name, in the added tokens and in the model's vocabulary alike.

    In the vocabulary too, because several models form a control token from plain text there (Unigram pieces, whole
    words of a WordLevel vocabulary, ``ignore_merges``).
    """
    state["post_processor"] = None
    renamed = {contents[token_id]: name for token_id, name in sentinels.items()}
    for token in state["added_tokens"]:
        if token["id"] in sentinels:
            token["content"] = sentinels[token["id"]]
            token["normalized"] = token["normalized"] and token["id"] not in plain
    model = state["model"]
    if isinstance(model["vocab"], list):
        model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in model["vocab"]]
        return state
    known = renamed.keys() & model["vocab"].keys()
    model["vocab"] = {renamed.get(piece, piece): token_id for piece, token_id in model["vocab"].items()}
    model["vocab"] |= {token["content"]: token["id"] for token in state["added_tokens"]}
    if "merges" in model and known:
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if not known & {*pair, "".join(pair)}]
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    return state
