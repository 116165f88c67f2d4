"""What happens to a row that is longer than ``max_length``: drop whole turns, drop the row, or cut tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, Protocol, TypeAlias, TypeVar, get_args

from lightning_qlora.data.documents import AnswerKind
from lightning_qlora.schema import Conversation, Message, Row, RowRefused, TokenizedRow

__all__ = [
    "OUTCOMES",
    "OVERLONG_POLICIES",
    "Fitted",
    "Outcome",
    "OverlongPolicy",
    "Shortened",
    "cut",
    "drop_oldest",
    "drop_until_it_fits",
    "fit_rows",
    "split_exchanges",
]

T = TypeVar("T")

OverlongPolicy: TypeAlias = Literal["drop_oldest_turns", "drop_row", "keep_start", "keep_end"]
OVERLONG_POLICIES: tuple[OverlongPolicy, ...] = get_args(OverlongPolicy)

Outcome: TypeAlias = Literal["fits", "turns-dropped", "cut-start", "cut-end", "too-long"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


class Encoder(Protocol):
    """What the length policy needs of :class:`~lightning_qlora.data.chat_template.ChatTemplate`."""

    def encode(self, row: Row) -> TokenizedRow:
        """Return the tokens of a row, or raise :class:`~lightning_qlora.schema.RowRefused`."""

    def encode_batch(self, rows: Sequence[Row]) -> list[TokenizedRow | RowRefused]:
        """Return the tokens of each row, or its refusal."""


class Fitted(Protocol):
    """A row after the length policy: what is counted, and what is stored."""

    @property
    def outcome(self) -> Outcome | None:
        """What the policy did; ``None`` for a row that was refused before its length was known."""

    @property
    def full_length(self) -> int:
        """The tokens that the limit is held against, before the policy; 0 for such a row."""

    @property
    def refusal(self) -> RowRefused | None:
        """Why the row cannot be used."""

    @property
    def documents(self) -> tuple[tuple[TokenizedRow, AnswerKind], ...]:
        """What is stored of it, if it can."""


class Shortened(NamedTuple):
    """One row after the length policy.

    Attributes:
        result: The row, at most ``max_length`` tokens long, or why it cannot be used.
        outcome: What the policy did; ``None`` for a row that was refused before its length was known.
        full_length: Its tokens before; 0 for such a row.
    """

    result: TokenizedRow | RowRefused
    outcome: Outcome | None
    full_length: int

    @property
    def refusal(self) -> RowRefused | None:
        """Why the row cannot be used."""
        return self.result if isinstance(self.result, RowRefused) else None

    @property
    def documents(self) -> tuple[tuple[TokenizedRow, AnswerKind], ...]:
        """What is stored of the row; nothing of a refused one."""
        return ((self.result, AnswerKind.NONE),) if isinstance(self.result, TokenizedRow) else ()


def fit_rows(
    encoder: Encoder, rows: Sequence[Row], max_length: int, overlong: OverlongPolicy = "drop_oldest_turns"
) -> list[Shortened]:
    """Tokenise rows and bring those that are too long down to ``max_length`` tokens.

    The policies:

    - ``drop_oldest_turns``: leave out the oldest exchanges, with their tool calls and results; the system message and
      the last exchange stay whole, and the chat is rendered anew, so the model sees a chat as it would be served. A
      row whose last exchange alone is too long is refused.
    - ``drop_row``: refuse the row.
    - ``keep_start``, ``keep_end``: cut tokens off the other end. An answer may lose its end-of-turn token (then the
      model is not taught to stop there) or its question; no token is invented.

    Args:
        encoder: The chat template.
        rows: The rows.
        max_length: Most tokens of a row.
        overlong: The policy.

    Returns:
        For each row what came of it. A row that has no supervised token left is refused.
    """
    return [
        Shortened(encoded, None, 0)
        if isinstance(encoded, RowRefused)
        else _shorten(encoder, row, encoded, max_length, overlong)
        for row, encoded in zip(rows, encoder.encode_batch(rows), strict=True)
    ]


def _shorten(encoder: Encoder, row: Row, encoded: TokenizedRow, max_length: int, overlong: OverlongPolicy) -> Shortened:
    full_length = len(encoded.input_ids)
    if full_length <= max_length:
        return Shortened(encoded, "fits", full_length)
    if overlong == "keep_start":
        return Shortened(cut(encoded, slice(None, max_length)), "cut-end", full_length)
    if overlong == "keep_end":
        return Shortened(cut(encoded, slice(-max_length, None)), "cut-start", full_length)
    if overlong == "drop_oldest_turns" and isinstance(row, Conversation):
        shortened = drop_until_it_fits(
            len(split_exchanges(row.messages)[1]),
            lambda dropped: encoder.encode(drop_oldest(row, dropped)),
            lambda candidate: len(candidate.input_ids) <= max_length,
        )
        if shortened is not None:
            result = _unusable(shortened, full_length, max_length) if isinstance(shortened, RowRefused) else shortened
            return Shortened(result, "turns-dropped", full_length)
    what = (
        "its last exchange alone is" if overlong == "drop_oldest_turns" and isinstance(row, Conversation) else "it is"
    )
    detail = (
        f"{full_length} tokens, and {what} longer than max_length={max_length}. Raise max_length, or write "
        "overlong: keep_start or keep_end to cut tokens."
    )
    return Shortened(RowRefused("too-long", detail, row.origin), "too-long", full_length)


def _unusable(refusal: RowRefused, full_length: int, max_length: int) -> RowRefused:
    """Say of a row that cannot be used without its oldest exchanges that it lost them for its length."""
    lost = refusal.reason == "no-supervised-tokens"
    why = "no turn that is to be trained on is left." if lost else f"it is of no use: {refusal.detail}"
    detail = (
        f"The row is {full_length} tokens, longer than max_length={max_length}, and without the oldest exchanges, "
        f"which that costs it, {why} Raise max_length, or write overlong: keep_start or keep_end to cut tokens."
    )
    return RowRefused(refusal.reason, detail, refusal.origin)


def drop_until_it_fits(
    num_exchanges: int, encode: Callable[[int], T], fits: Callable[[T], bool]
) -> T | RowRefused | None:
    """Drop as few of the oldest exchanges as it takes; ``None`` if even the last one alone is too long.

    Each try renders the chat anew, because a template may write other turns differently once the first is gone.
    The number of exchanges is found by bisection: a chat of 100 turns takes 7 renders.

    Args:
        num_exchanges: That there are.
        encode: Returns the tokens without so many of the oldest, or raises ``RowRefused``.
        fits: Whether tokens are within the limit.
    """
    best: T | RowRefused | None = None
    fewest, most = 1, num_exchanges - 1
    while fewest <= most:
        dropped = (fewest + most) // 2
        try:
            candidate = encode(dropped)
        except RowRefused as refusal:
            # What remains cannot be used, for instance because only earlier turns were to be supervised. Fewer
            # dropped turns may still do.
            best = refusal if best is None or isinstance(best, RowRefused) else best
            most = dropped - 1
            continue
        if fits(candidate):
            best, most = candidate, dropped - 1
        else:
            fewest = dropped + 1
    return best


def drop_oldest(row: Conversation, count: int) -> Conversation:
    """Return the conversation without its ``count`` oldest exchanges; the leading system messages stay."""
    system, exchanges = split_exchanges(row.messages)
    if not 0 <= count < max(1, len(exchanges)):
        raise ValueError(f"count is {count}; {len(exchanges)} exchanges can lose 0 to {max(0, len(exchanges) - 1)}.")
    return replace(row, messages=(*system, *(message for exchange in exchanges[count:] for message in exchange)))


def split_exchanges(
    messages: Sequence[Message],
) -> tuple[tuple[Message, ...], tuple[tuple[Message, ...], ...]]:
    """Split a chat into its leading system messages and its exchanges.

    An exchange begins where someone other than the assistant speaks again after the assistant has answered; so tool
    calls, their results and the answer that follows stay together with the question::

        system | user assistant | user assistant(calls) tool tool assistant | user assistant
    """
    start = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    exchanges: list[list[Message]] = []
    answered = True
    for message in messages[start:]:
        asks = message.role in ("user", "system")
        if not exchanges or (asks and answered):
            exchanges.append([])
            answered = False
        answered = answered or message.role == "assistant"
        exchanges[-1].append(message)
    return tuple(messages[:start]), tuple(tuple(exchange) for exchange in exchanges)


def cut(row: TokenizedRow, kept: slice) -> TokenizedRow | RowRefused:
    """Keep some tokens of a row; it is refused if none that is left is supervised."""
    supervised = row.supervised[kept]
    supervised[0] = False  # nothing comes before it any more to predict it from
    if not any(supervised):
        detail = "no supervised token is left after cutting the row to max_length; raise max_length"
        return RowRefused("no-supervised-tokens", detail, row.origin)
    return TokenizedRow(row.input_ids[kept], supervised, row.origin)
