"""Masks on the templates of real model families, judged by an oracle that renders and searches by itself."""

from __future__ import annotations

from collections import Counter

import pytest
from chat_oracle import CHATS, TEMPLATES, conversation, errors_of, template_tokenizer
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.schema import Conversation, Message, Origin, RowRefused

KINDS = ("bytelevel", "metaspace", "metaspace_always", "unigram", "prepend", "gemma")
SLICE = (
    "qwen3",
    "qwen3_5_think",
    "llama3_1",
    "gemma3",
    "gemma4_v5",
    "gptoss",
    "phi3",
    "idefics3",
    "lfm2_2_5",
    "glm4moe_training",
)


def verdicts(name: str, kind: str) -> dict[str, str]:
    """For each chat ``exact``, or the reason of its refusal; fails on a mask that is wrong."""
    template = ChatTemplate(template_tokenizer(name, kind))
    rows = {chat: conversation(chat) for chat in CHATS}
    found = {}
    for (chat, row), result in zip(rows.items(), template.encode_batch(list(rows.values())), strict=True):
        if isinstance(result, RowRefused):
            found[chat] = result.reason
        else:
            errors = errors_of(name, kind, row, result)
            assert not errors, f"{name} / {kind} / {chat}: {errors}"
            found[chat] = "exact"
    return found


@pytest.mark.parametrize("name", SLICE)
def test_masks_are_exact_or_refused(name):
    found = verdicts(name, "bytelevel")
    assert found["one turn"] == found["two turns"] == found["system"] == found["white space"] == "exact", found


@pytest.mark.parametrize(
    ("name", "chat", "reason"),
    [
        ("llama3", "reasoning", "reasoning-not-rendered"),
        ("llama3", "tools", "message-not-rendered"),
        ("llama3_1", "tools and words", "message-not-rendered"),
        ("gemma", "system", "template-error"),
        ("glm4moe", "one turn", "no-end-token"),
        ("deepseekv3", "one turn", "prompt-not-prefix"),
        ("qwen3_8", "one turn", "token-straddles-border"),
        ("gemma4_v5", "tools and words", "content-altered"),
    ],
)
def test_what_cannot_be_proven_is_refused_with_its_reason(name, chat, reason):
    assert verdicts(name, "bytelevel")[chat] == reason


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_no_silent_error_on_any_template_chat_and_tokenizer():
    counts = Counter()
    for name in TEMPLATES:
        for kind in KINDS:
            counts += Counter(verdicts(name, kind).values())
    print(counts)
    assert sum(counts.values()) == len(TEMPLATES) * len(KINDS) * len(CHATS)
    assert counts["exact"] > sum(counts.values()) / 2


PIECES = ["<|im_end|>", "<|im_", "start|>", "</s>", "[INST]", "\n", " ", "word", "ne"]
WILD = st.lists(st.characters(codec="utf-8") | st.sampled_from(PIECES), min_size=1, max_size=8).map("".join)
STYLES = (("chatml", "bytelevel"), ("llama3", "awkward"), ("gemma", "gemma"), ("mistral", "metaspace"))


def runs_of(template: ChatTemplate, texts: list[str]) -> list[list[int]]:
    """The ids of the supervised stretches of a chat whose turns alternate, or nothing where it is refused."""
    roles = ("user", "assistant") * (len(texts) // 2)
    messages = tuple(Message(role, text) for role, text in zip(roles, texts, strict=True))
    result = template.encode_batch([Conversation(messages, Origin("wild", 1))])[0]
    assume(not isinstance(result, RowRefused))
    runs: list[list[int]] = []
    for position, (token_id, supervised) in enumerate(zip(result.input_ids, result.supervised, strict=True)):
        if supervised:
            if not result.supervised[position - 1]:
                runs.append([])
            runs[-1].append(token_id)
    return runs


@pytest.fixture(scope="module", params=STYLES, ids="-".join)
def wild_template(request):
    return ChatTemplate(tiny_tokenizer(*request.param))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(texts=st.lists(WILD, min_size=4, max_size=4), edit=WILD, place=st.integers(0, 3))
def test_an_edit_changes_the_supervised_ids_of_that_turn_alone(wild_template, texts, edit, place):
    edited = [edit if index == place else text for index, text in enumerate(texts)]
    before, after = runs_of(wild_template, texts), runs_of(wild_template, edited)
    assert len(before) == len(after) == 2
    for turn in (0, 1):
        if place != 2 * turn + 1:
            assert before[turn] == after[turn]
        elif texts[place].strip() != edited[place].strip():
            same = wild_template.tokenizer.decode(before[turn]) == wild_template.tokenizer.decode(after[turn])
            assert same == (before[turn] == after[turn])
