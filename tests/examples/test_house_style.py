"""The house style's pairs are what their README says: judged by its rules, balanced, and honestly split."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from lightning_qlora.evaluation import Question, read_questions, score_answer

FOLDER = Path(__file__).parents[2] / "examples" / "house_style"

MAX_SIMILARITY = 0.5
"""No customer's message, and no answer to another message, may share this part of its words (Jaccard) or more."""


def _load_rules() -> ModuleType:
    spec = importlib.util.spec_from_file_location("house_style_rules", FOLDER / "rules.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RULES = _load_rules()


class Row(NamedTuple):
    """One row of any of the files; ``answers`` are (chosen, rejected) of a pair, else the one answer."""

    system: str
    text: str
    answers: tuple[str, ...]
    topic: str


def _read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def _pairs(name: str) -> list[Row]:
    rows = []
    for row in _read(name):
        assert set(row) == {"prompt", "chosen", "rejected", "topic"}
        assert [turn["role"] for turn in row["prompt"]] == ["system", "user"]
        assert [turn["role"] for side in ("chosen", "rejected") for turn in row[side]] == ["assistant", "assistant"]
        system, text = (turn["content"] for turn in row["prompt"])
        rows.append(Row(system, text, (row["chosen"][0]["content"], row["rejected"][0]["content"]), row["topic"]))
    return rows


def _chats(name: str) -> list[Row]:
    rows = []
    for row in _read(name):
        system, text, *answers = (turn["content"] for turn in row["messages"])
        topic = row["topic"] if answers else row["tags"][0]
        rows.append(Row(system, text, tuple(answers) or (row["reference"],), topic))
    return rows


PAIRS, HELD_OUT, SFT, ASKED = _pairs("pairs"), _pairs("held_out"), _chats("sft"), _chats("questions")
FILES = {"pairs": PAIRS, "held_out": HELD_OUT, "sft": SFT, "questions": ASKED}
README = (FOLDER / "README.md").read_text(encoding="utf-8")


@cache
def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text.lower()))


def _similarity(one: str, other: str) -> float:
    shared, every = _words(one) & _words(other), _words(one) | _words(other)
    return len(shared) / len(every)


@pytest.mark.parametrize(("name", "rows"), [("sft", 60), ("pairs", 120), ("held_out", 40), ("questions", 30)])
def test_sizes_are_those_of_the_readme(name: str, rows: int) -> None:
    assert len(FILES[name]) == rows
    assert f"`{name}.jsonl` | {rows} |" in README


def test_texts_are_whole_and_one_system_prompt_stands_above_all() -> None:
    every = [row for rows in FILES.values() for row in rows]
    assert len({row.system for row in every}) == 1
    for row in every:
        assert all(text == text.strip() != "" for text in (row.text, *row.answers)), row
        assert row.topic in RULES.TOPICS


def test_every_topic_has_its_share_in_every_file() -> None:
    for name, rows in FILES.items():
        shares = Counter(row.topic for row in rows)
        assert 0.35 <= shares["help"] / len(rows) <= 0.45, name
        assert all(0.08 <= shares[topic] / len(rows) <= 0.2 for topic in RULES.DECLINED), (name, shares)


@pytest.mark.parametrize("rows", [pytest.param(PAIRS, id="pairs"), pytest.param(HELD_OUT, id="held_out")])
def test_chosen_answers_keep_every_rule_and_rejected_ones_break_one(rows: list[Row]) -> None:
    for row in rows:
        chosen, rejected = row.answers
        assert RULES.broken_rules(chosen, row.topic) == (), chosen
        assert RULES.broken_rules(rejected, row.topic), rejected


def test_references_keep_every_rule_and_a_third_of_the_old_answers_does() -> None:
    assert all(RULES.broken_rules(row.answers[0], row.topic) == () for row in ASKED)
    assert sum(RULES.broken_rules(row.answers[0], row.topic) == () for row in SFT) == len(SFT) / 3


@pytest.mark.parametrize("name", ["pairs", "held_out"])
def test_the_readme_counts_what_the_rejected_answers_break(name: str) -> None:
    broken = Counter(rule for row in FILES[name] for rule in RULES.broken_rules(row.answers[1], row.topic))
    column = ["pairs", "held_out"].index(name) + 2
    for rule, count in broken.items():
        (line,) = [line for line in README.splitlines() if line.startswith(f"| **{rule}** |")]
        assert int(line.split("|")[column + 1]) == count, (rule, count)


@pytest.mark.parametrize("rows", [pytest.param(PAIRS, id="pairs"), pytest.param(HELD_OUT, id="held_out")])
def test_no_shortcut_tells_chosen_from_rejected(rows: list[Row]) -> None:
    """Neither length, nor a question at the end, nor a refusal, nor exclamation marks pick the chosen answer."""
    shortcuts = {
        "longer": (lambda text: len(text), 0.60),
        "shorter": (lambda text: -len(text), 0.60),
        "calmer": (lambda text: -len(re.findall(r"[!\u2600-\U0010ffff]", text)), 0.75),
        "refuses": (lambda text: "cannot" in text, 0.80),
        "ends with an offer": (lambda text: "Shall I" in text, 0.86),
    }
    for name, (measure, most) in shortcuts.items():
        scores = [(measure(row.answers[0]), measure(row.answers[1])) for row in rows]
        accuracy = sum((chosen > rejected) + (chosen == rejected) / 2 for chosen, rejected in scores) / len(rows)
        assert 1 - most <= accuracy <= most, (name, accuracy)
    chosen_words, rejected_words = (sum(len(row.answers[side].split()) for row in rows) for side in (0, 1))
    assert 0.97 <= chosen_words / rejected_words <= 1.03


def _texts(rows: list[Row]) -> list[str]:
    return [text for row in rows for text in (row.text, *row.answers)]


@pytest.mark.parametrize("name", ["held_out", "questions"])
def test_no_text_that_is_measured_on_stands_in_a_training_row(name: str) -> None:
    trained = [*PAIRS, *SFT]
    assert not set(_texts(FILES[name])) & set(_texts(trained))
    messages = [(_similarity(one.text, other.text), one.text, other.text) for one in FILES[name] for other in trained]
    assert max(messages)[0] < MAX_SIMILARITY, max(messages)
    answers = [
        (_similarity(one, other), one, other)
        for row in FILES[name]
        for one in row.answers
        for trained_row in trained
        for other in trained_row.answers
    ]
    assert max(answers)[0] < MAX_SIMILARITY, max(answers)


def test_pairs_and_questions_that_are_measured_on_are_apart() -> None:
    worst = max((_similarity(one.text, other.text), one.text, other.text) for one in HELD_OUT for other in ASKED)
    assert worst[0] < MAX_SIMILARITY, worst


def _neighbours(rows: list[Row]) -> Iterator[tuple[str, str]]:
    for one, other in combinations(rows, 2):
        yield one.text, other.text
        yield one.answers[0], other.answers[0]


def test_the_language_is_varied() -> None:
    """Not one template with slots: few texts begin alike, few offers are alike, no two are near-duplicates."""
    worst = max((_similarity(one, other), one, other) for one, other in _neighbours(PAIRS))
    assert worst[0] < MAX_SIMILARITY, worst
    for side in (0, 1):
        starts = Counter(" ".join(row.answers[side].split()[:3]) for row in PAIRS)
        assert starts.most_common(1)[0][1] <= 4, starts.most_common(3)
    offers = Counter(" ".join(row.answers[0].split("Shall I ")[1].split()[:3]) for row in PAIRS)
    assert offers.most_common(1)[0][1] <= 12, offers.most_common(3)


def test_the_questions_checks_are_the_rules() -> None:
    questions = read_questions(FOLDER / "questions.jsonl")
    by_topic: dict[str, Question] = {question.tags[0]: question for question in questions}
    assert all(question.expect == RULES.whole_style(question.tags[0]) for question in questions)
    for row in [*PAIRS, *HELD_OUT, *SFT, *ASKED]:
        for answer in row.answers:
            for topic, question in by_topic.items():
                right = not RULES.broken_rules(answer, topic)
                assert score_answer(question, answer).exact is right, (topic, answer)


@pytest.mark.parametrize(
    ("answer", "broken"),
    [
        ("The saddle may be too high for your back. Shall I book a fitting for you?", ()),
        ("The saddle may be too high for your back! Shall I book a fitting for you?", ("calm",)),
        ("The saddle may be too high for your back 🙂. Shall I book a fitting for you?", ("calm",)),
        ("It is high. Shall I book it?", ("short",)),
        ("Yes. It is too high for your back. It really is. Shall I book a fitting for you?", ("short",)),
        ("The saddle will be ready tomorrow for your back. Shall I book a fitting for you?", ("no-promise",)),
        ("The saddle may be 2 cm too high for your back. Shall I book a fitting for you?", ("no-promise",)),
        ("The saddle may be too high for your back. Should we book a fitting for you?", ("next-step",)),
        ("Is the saddle too high for your back? Shall I book a fitting for you?", ("next-step",)),
        ("The saddle may be too high for your back. Shall I book a fitting. Bye for now.", ("next-step",)),
        ("I can't judge saddles from here, or backs. Shall I book a fitting for you?", ("plain-no",)),
    ],
)
def test_each_rule_by_itself(answer: str, broken: tuple[str, ...]) -> None:
    assert RULES.broken_rules(answer, "help") == broken
    declined = {*broken, "plain-no"}
    assert set(RULES.broken_rules(answer, "date")) == declined


def test_a_topic_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="'weather'; allowed are"):
        RULES.broken_rules("Rain comes.", "weather")
