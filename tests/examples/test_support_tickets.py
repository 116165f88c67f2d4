"""The example data is what its README says: valid, balanced, and honestly split."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "support_tickets"
CATEGORIES = ("delivery", "fault", "return", "billing", "account")
FIELDS = ("category", "order", "product", "urgent")

MAX_SIMILARITY = 0.5
"""No two texts of different files may share this part of their words (Jaccard) or more."""


class Ticket(NamedTuple):
    """One row of any of the files.

    ``words`` are those of the text without its numbers, so that another order number makes no other text.
    """

    system: str
    text: str
    answer: str
    fields: dict[str, Any]
    values: tuple[str | None, str | None]
    words: frozenset[str]


def _read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def _tickets(name: str) -> list[Ticket]:
    tickets = []
    for row in _read(name):
        system, user, *answers = (message["content"] for message in row["messages"])
        answer = answers[0] if answers else row["reference"]
        fields = json.loads(answer)
        words = frozenset(re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", user.lower()))
        tickets.append(Ticket(system, user, answer, fields, (fields["order"], fields["product"]), words))
    return tickets


FILES = {name: _tickets(f"{name}.jsonl") for name in ("train", "validation", "questions", "fresh_questions")}
TRAIN, VALIDATION, QUESTIONS, FRESH = FILES.values()
EVERY = TRAIN + VALIDATION + QUESTIONS + FRESH
SCORED = ("questions", "fresh_questions")
HELD_OUT = [pytest.param(FILES[name], id=name) for name in ("validation", *SCORED)]


def _similarity(one: Ticket, other: Ticket) -> float:
    return len(one.words & other.words) / len(one.words | other.words)


def test_sizes_are_those_of_the_readme() -> None:
    """The README counts the rows; at least 300, 60 and 60 are what the quickstart needs."""
    assert (len(TRAIN), len(VALIDATION), len(QUESTIONS), len(FRESH)) == (660, 60, 60, 60)
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name, tickets in (("train", TRAIN), ("validation", VALIDATION), ("questions", QUESTIONS)):
        assert f"`{name}.jsonl` | {len(tickets)}" in readme


@pytest.mark.parametrize(("name", "roles"), [("train", 3), ("validation", 3), ("questions", 2), ("fresh_questions", 2)])
def test_rows_have_the_messages_shape(name: str, roles: int) -> None:
    for row in _read(f"{name}.jsonl"):
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"][:roles]
        assert all(message["content"] == message["content"].strip() != "" for message in row["messages"])


@pytest.mark.parametrize("name", SCORED)
def test_questions_have_what_the_scoring_reads(name: str) -> None:
    rows = _read(f"{name}.jsonl")
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"id", "messages", "reference", "tags", "check"}
        assert row["check"] == "json"
        fields = json.loads(row["reference"])
        assert row["tags"][0] == fields["category"]
        assert ("urgent" in row["tags"]) == fields["urgent"]
        assert ("order-missing" in row["tags"]) == (fields["order"] is None)
        assert ("product-missing" in row["tags"]) == (fields["product"] is None)
        is_new = fields["product"] is not None and fields["product"] not in {ticket.values[1] for ticket in TRAIN}
        assert ("new-product" in row["tags"]) == is_new


def test_one_system_prompt_names_every_field_and_category() -> None:
    (prompt,) = {ticket.system for ticket in EVERY}
    assert all(word in prompt for word in FIELDS + CATEGORIES)


def test_every_answer_is_a_valid_ticket_written_one_way() -> None:
    for ticket in EVERY:
        fields = ticket.fields
        assert tuple(fields) == FIELDS
        assert ticket.answer == json.dumps(fields, ensure_ascii=False)
        assert fields["category"] in CATEGORIES
        assert fields["order"] is None or re.fullmatch(r"[1-9]\d{4}", fields["order"])
        assert fields["product"] is None or re.fullmatch(r"[a-z0-9][a-z0-9 -]*[a-z0-9]", fields["product"])
        assert isinstance(fields["urgent"], bool)


def test_copied_values_stand_in_the_message() -> None:
    for ticket in EVERY:
        order, product = ticket.values
        if order is not None:
            assert len(re.findall(rf"(?<!\d){order}(?!\d)", ticket.text)) == 1, ticket.text
        if product is not None:
            assert re.search(rf"\b{re.escape(product)}\b", ticket.text.lower()), ticket.text


def test_a_missing_order_number_is_really_missing() -> None:
    """Every five-digit number that is not the order says what it is; the list of those is short and kept here."""
    others = {
        (ticket.text, number)
        for ticket in EVERY
        for number in re.findall(r"(?<!\d)\d{5}(?!\d)", ticket.text)
        if number != ticket.values[0]
    }
    named = r"tried|slip|serial|tax ID|number at the uni|customer number|loyalty card|and|ZX|at|to|Hills|zip|code"
    for text, number in others:
        assert re.search(rf"(?:{named})\W*(?:is )?{number}|{number} (?:Beverly|Miami)", text), (text, number)


def test_labels_are_balanced() -> None:
    for tickets in FILES.values():
        categories = Counter(ticket.fields["category"] for ticket in tickets)
        assert set(categories.values()) == {len(tickets) // len(CATEGORIES)}
        for category in CATEGORIES:
            urgent = [ticket.fields["urgent"] for ticket in tickets if ticket.fields["category"] == category]
            assert 0.15 <= sum(urgent) / len(urgent) <= 0.5
        for position in (0, 1):
            present = sum(ticket.values[position] is not None for ticket in tickets) / len(tickets)
            assert 0.5 <= present <= 0.85


@pytest.mark.parametrize("name", SCORED)
def test_no_constant_answer_scores_more_than_a_few_percent(name: str) -> None:
    commonest = Counter(ticket.answer for ticket in FILES[name]).most_common(1)[0][1]
    assert commonest / len(FILES[name]) <= 0.05


@pytest.mark.parametrize("held_out", HELD_OUT)
def test_no_held_out_text_stands_in_the_training_rows(held_out: list[Ticket]) -> None:
    assert not {ticket.text for ticket in held_out} & {ticket.text for ticket in TRAIN}
    assert not {ticket.words for ticket in held_out} & {ticket.words for ticket in TRAIN}
    worst = max((_similarity(one, other), one.text, other.text) for one in held_out for other in TRAIN)
    assert worst[0] < MAX_SIMILARITY, worst


@pytest.mark.parametrize("held_out", HELD_OUT)
def test_no_held_out_value_combination_stands_in_the_training_rows(held_out: list[Ticket]) -> None:
    """Each held-out ticket copies at least one value, its order number or its product, in a pair never trained on."""
    trained = {ticket.values for ticket in TRAIN}
    for ticket in held_out:
        assert ticket.values != (None, None), ticket.text
        assert ticket.values not in trained, ticket.text
    orders = {ticket.values[0] for ticket in held_out} - {None}
    assert not orders & {number for ticket in TRAIN for number in re.findall(r"\d{5}", ticket.text)}


@pytest.mark.parametrize(("name", "other"), list(combinations(("validation", *SCORED), 2)))
def test_held_out_files_are_apart(name: str, other: str) -> None:
    assert not {ticket.values for ticket in FILES[name]} & {ticket.values for ticket in FILES[other]}
    worst = max((_similarity(one, two), one.text, two.text) for one in FILES[name] for two in FILES[other])
    assert worst[0] < MAX_SIMILARITY, worst


@pytest.mark.parametrize("name", SCORED)
def test_half_of_the_questions_products_are_new(name: str) -> None:
    trained = {ticket.values[1] for ticket in TRAIN}
    named = [ticket.values[1] for ticket in FILES[name] if ticket.values[1] is not None]
    assert sum(product not in trained for product in named) >= len(named) / 2


def test_the_language_is_varied() -> None:
    """Not one template with slots: few texts begin or end alike, and no two are near-duplicates."""
    for words in (slice(0, 3), slice(-3, None)):
        parts = Counter(
            " ".join(re.findall(r"\w+", re.sub(r"\d", "0", ticket.text.lower()))[words]) for ticket in TRAIN
        )
        assert parts.most_common(1)[0][1] / len(TRAIN) <= 0.03, parts.most_common(3)
    worst = max(((_similarity(one, other), one.text, other.text) for one, other in combinations(TRAIN, 2)))
    assert worst[0] < 0.6, worst
    lengths = sorted(len(ticket.text.split()) for ticket in TRAIN)
    assert lengths[len(lengths) // 20] <= 10
    assert lengths[-len(lengths) // 20] >= 18
