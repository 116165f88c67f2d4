from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qlora.data.truncation import OVERLONG_POLICIES, drop_oldest, fit_rows, split_exchanges
from lightning_qlora.schema import Completion, Conversation, Message, Origin, Row, RowRefused, TokenizedRow

ORIGIN = Origin("chats.jsonl", 3)
BOS, END, OPEN = 1, 2, 3


class CharacterTemplate:
    """A message is ``OPEN``, a token for each character, ``END``; of the assistant, all but ``OPEN`` are supervised."""

    def __init__(self) -> None:
        self.renders = 0

    def encode(self, row: Row) -> TokenizedRow:
        self.renders += 1
        messages = row.messages if isinstance(row, Conversation) else [Message("assistant", row.completion, train=True)]
        ids, flags = [BOS], [False]
        for message in messages:
            supervised = message.role == "assistant" and message.train is not False
            ids += [OPEN, *(ord(c) for c in message.content), END]
            flags += [False, *[supervised] * (len(message.content) + 1)]
        if not any(flags):
            raise RowRefused("no-supervised-tokens", "nothing to learn", row.origin)
        return TokenizedRow(ids, flags, row.origin)

    def encode_batch(self, rows: Sequence[Row]) -> list[TokenizedRow | RowRefused]:
        result: list[TokenizedRow | RowRefused] = []
        for row in rows:
            try:
                result.append(self.encode(row))
            except RowRefused as refusal:
                result.append(refusal)
        return result


def chat(*turns: tuple[str, str], **kwargs) -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in turns), ORIGIN, **kwargs)


def encoded_text(row: TokenizedRow) -> str:
    return "".join(chr(i) if i > OPEN else {BOS: "^", OPEN: "<", END: ">"}[i] for i in row.input_ids)


FOUR = chat(
    ("system", "S"),
    ("user", "aaaa"), ("assistant", "AAAA"),
    ("user", "bbbb"), ("assistant", "call"), ("tool", "result"), ("assistant", "BBBB"),
    ("user", "cccc"), ("user", "more"), ("assistant", "CCCC"),
    ("user", "dddd"), ("assistant", "DDDD"),
)  # fmt: skip


def test_exchanges_keep_questions_tools_and_answers_together():
    system, exchanges = split_exchanges(FOUR.messages)
    assert [m.content for m in system] == ["S"]
    assert [[m.content for m in e] for e in exchanges] == [
        ["aaaa", "AAAA"],
        ["bbbb", "call", "result", "BBBB"],
        ["cccc", "more", "CCCC"],
        ["dddd", "DDDD"],
    ]


def test_a_later_system_message_belongs_to_the_question_after_it():
    _, exchanges = split_exchanges(chat(("user", "a"), ("assistant", "A"), ("system", "s"), ("user", "b")).messages)
    assert [[m.content for m in e] for e in exchanges] == [["a", "A"], ["s", "b"]]


def test_a_chat_that_the_assistant_opens():
    _, exchanges = split_exchanges(chat(("assistant", "Hi"), ("user", "a"), ("assistant", "A")).messages)
    assert [[m.content for m in e] for e in exchanges] == [["Hi"], ["a", "A"]]


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [
        (72, "^<S><aaaa><AAAA><bbbb><call><result><BBBB><cccc><more><CCCC><dddd><DDDD>"),
        (71, "^<S><bbbb><call><result><BBBB><cccc><more><CCCC><dddd><DDDD>"),
        (60, "^<S><bbbb><call><result><BBBB><cccc><more><CCCC><dddd><DDDD>"),
        (59, "^<S><cccc><more><CCCC><dddd><DDDD>"),
        (33, "^<S><dddd><DDDD>"),
        (16, "^<S><dddd><DDDD>"),
    ],
)
def test_as_few_oldest_exchanges_as_possible_are_dropped(max_length, expected):
    (shortened,) = fit_rows(CharacterTemplate(), [FOUR], max_length)
    assert encoded_text(shortened.result) == expected
    assert shortened.outcome == ("fits" if max_length == 72 else "turns-dropped")
    assert shortened.full_length == 72
    assert shortened.result.origin == ORIGIN


def test_last_exchange_too_long_refuses_the_row():
    (shortened,) = fit_rows(CharacterTemplate(), [FOUR], 15)
    assert shortened.result.reason == "too-long"
    assert shortened.outcome == "too-long"
    assert "72 tokens" in shortened.result.detail
    assert "max_length=15" in shortened.result.detail
    assert shortened.result.origin == ORIGIN


def test_bisection_renders_long_chats_few_times():
    turns = [turn for i in range(200) for turn in (("user", "question"), ("assistant", "answer"))]
    template = CharacterTemplate()
    (shortened,) = fit_rows(template, [chat(*turns)], 100)
    assert 80 < len(shortened.result.input_ids) <= 100
    assert template.renders <= 9


def test_dropping_the_only_supervised_turn_refuses_the_row():
    row = Conversation(
        (
            Message("user", "a" * 20),
            Message("assistant", "A", train=True),
            Message("user", "b"),
            Message("assistant", "B", train=False),
        ),
        ORIGIN,
    )
    (shortened,) = fit_rows(CharacterTemplate(), [row], 12)
    assert shortened.result.reason == "no-supervised-tokens"
    assert shortened.outcome == "turns-dropped"
    assert "32 tokens, longer than max_length=12" in shortened.result.detail
    assert "no turn that is to be trained on is left" in shortened.result.detail


def test_any_other_refusal_of_what_remains_says_that_turns_were_dropped():
    class Picky(CharacterTemplate):
        def encode(self, row: Row) -> TokenizedRow:
            if row.messages[0].content == "bbbb":
                raise RowRefused("prompt-not-prefix", "Another prompt.", row.origin)
            return super().encode(row)

    row = chat(("user", "aaaa"), ("assistant", "AAAA"), ("user", "bbbb"), ("assistant", "BBBB"))
    (shortened,) = fit_rows(Picky(), [row], 20)
    assert (shortened.result.reason, shortened.outcome) == ("prompt-not-prefix", "turns-dropped")
    assert "25 tokens, longer than max_length=20" in shortened.result.detail
    assert "Another prompt." in shortened.result.detail


def test_everything_else_of_the_row_survives_dropping():
    tools = ({"type": "function"},)
    row = chat(("user", "a"), ("assistant", "A"), ("user", "b"), tools=tools, template_kwargs={"x": 1})
    shorter = drop_oldest(row, 1)
    assert (shorter.tools, shorter.template_kwargs, shorter.origin) == (tools, {"x": 1}, ORIGIN)
    assert [m.content for m in shorter.messages] == ["b"]
    with pytest.raises(ValueError, match="2 exchanges can lose 0 to 1"):
        drop_oldest(row, 2)


@pytest.mark.parametrize(
    ("policy", "outcome", "expected"),
    [("keep_start", "cut-end", "^<aaaa><AA"), ("keep_end", "cut-start", "aaa><AAAA>")],
)
def test_cutting_invents_no_token(policy, outcome, expected):
    (shortened,) = fit_rows(CharacterTemplate(), [chat(("user", "aaaa"), ("assistant", "AAAA"))], 10, policy)
    assert encoded_text(shortened.result) == expected
    assert shortened.outcome == outcome
    assert shortened.full_length == 13


def test_cutting_refuses_a_row_without_supervision_left():
    (shortened,) = fit_rows(CharacterTemplate(), [chat(("user", "aaaa"), ("assistant", "AAAA"))], 7, "keep_start")
    assert (shortened.result.reason, shortened.outcome) == ("no-supervised-tokens", "cut-end")
    (shortened,) = fit_rows(CharacterTemplate(), [chat(("user", "a"), ("assistant", "AA"))], 1, "keep_end")
    assert shortened.result.reason == "no-supervised-tokens"  # only the end token is left, and nothing predicts it


def test_first_token_after_a_cut_is_not_supervised():
    (shortened,) = fit_rows(CharacterTemplate(), [chat(("user", "a"), ("assistant", "AAAA"))], 3, "keep_end")
    assert encoded_text(shortened.result) == "AA>"
    assert shortened.result.supervised == [False, True, True]


@pytest.mark.parametrize("policy", ["drop_row", "drop_oldest_turns"])
def test_raw_text_is_refused_whole(policy):
    (shortened,) = fit_rows(CharacterTemplate(), [Completion("", "x" * 20, ORIGIN)], 10, policy)
    assert shortened.outcome == "too-long"
    assert "exchange" not in shortened.result.detail


def test_refusals_of_the_template_pass_through_in_place():
    rows = [chat(("user", "a")), chat(("user", "a"), ("assistant", "A"))]
    refused, fits = fit_rows(CharacterTemplate(), rows, 100)
    assert (refused.result.reason, refused.outcome, refused.full_length) == ("no-supervised-tokens", None, 0)
    assert fits.outcome == "fits"


@settings(max_examples=150, deadline=None)
@given(
    turns=st.lists(
        st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), st.text("ab", max_size=6)),
        min_size=1,
        max_size=12,
    ),
    max_length=st.integers(1, 80),
    policy=st.sampled_from(OVERLONG_POLICIES),
)
def test_whatever_remains_fits_and_can_be_learned(turns, max_length, policy):
    template = CharacterTemplate()
    row = chat(*turns)
    (shortened,) = fit_rows(template, [row], max_length, policy)
    if isinstance(shortened.result, RowRefused):
        return
    ids, flags = shortened.result.input_ids, shortened.result.supervised
    assert len(ids) == len(flags) <= max_length
    assert any(flags)
    assert not flags[0]
    full = template.encode(row).input_ids
    if shortened.outcome == "fits":
        assert ids == full
    elif shortened.outcome in ("cut-start", "cut-end"):
        assert ids == (full[-max_length:] if shortened.outcome == "cut-start" else full[:max_length])
    else:  # whole messages only: the system messages, then a suffix of the others
        exchanges = split_exchanges(row.messages)[1]
        texts = [template.encode(drop_oldest(row, n)).input_ids for n in range(1, len(exchanges)) if _usable(row, n)]
        assert ids in texts
        assert all(len(other) > max_length or len(other) <= len(ids) for other in texts)


def _usable(row: Conversation, count: int) -> bool:
    return any(m.role == "assistant" for m in drop_oldest(row, count).messages)
