"""What compare makes of answers, without a model: pairs, limits, marks, the terminal, the page with hostile texts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from page_elements import Elements

from lightning_qlora.evaluation import Answer, AnswerSheet, Question, ReferenceLoss, score_answer
from lightning_qlora.schema import Message, Origin
from lightning_qlora.tools.comparison import (
    Limits,
    Participant,
    compare_participants,
    describe_missed,
    draw_comparison,
    judge_limits,
    render_page,
    to_record,
)
from lightning_qlora.tools.comparison.marking import mark_differences

SCRIPT = "</pre></script><script>document.title='x'</script><img src=x onerror=\"document.title='x'\">"
HOSTILE = SCRIPT + "{{ 7*7 }}\x1b[31m\u202e"


def question(number, **options):
    return Question(f"q{number}", (Message("user", f"Question {number}?"),), Origin("q.jsonl", number), **options)


def take_part(name, questions, texts, kind="adapter", nll=1.0, asked=None):
    sheet = AnswerSheet(
        name,
        tuple(Answer(q.id, text, 3, True) for q, text in zip(questions, texts, strict=True)),
        tuple(score_answer(q, text) for q, text in zip(questions, texts, strict=True)),
        tuple(None if q.reference is None else ReferenceLoss(nll, 2) for q in questions),
    )
    return Participant(kind, f"/{name}", questions, sheet, asked)


QUESTIONS = [
    *(question(i, reference=f"Answer {i}.", check="exact", tags=("even",) if i % 2 == 0 else ()) for i in range(10)),
    question(10),
]
RIGHT = [f"Answer {i}." for i in range(10)] + ["whatever"]
WRONG = ["No."] * 11


def found(*participants, baseline="base", limits=None):
    comparison = compare_participants(
        QUESTIONS, list(participants), baseline=baseline, candidate=participants[-1].name, settings={"seed": 0}
    )
    return comparison if limits is None else comparison.with_limits(judge_limits(comparison, limits))


@pytest.fixture
def better():
    half = [*RIGHT[:5], *WRONG[5:]]
    return found(
        take_part("base", QUESTIONS, WRONG, "base", nll=2.0),
        take_part("old", QUESTIONS, half),
        take_part("new", QUESTIONS, [WRONG[0], *RIGHT[1:]], nll=0.5),
    )


# Findings and limits


def test_every_two_are_compared_the_earlier_first(better):
    assert [(pair.before, pair.after) for pair in better.pairs] == [("base", "old"), ("base", "new"), ("old", "new")]
    pair = better.pair("old", "new")
    assert [QUESTIONS[i].id for i in pair.which("broken")] == ["q0"]
    assert [QUESTIONS[i].id for i in pair.which("fixed")] == ["q5", "q6", "q7", "q8", "q9"]
    assert pair.verdicts[10] == "changed"
    assert pair.differences["exact"].value == pytest.approx(0.4)
    assert better.pair("base", "new").p_corrected["exact"] == pytest.approx(3 * 2 / 2**9)  # the least of three pairs
    assert better.scores["new"]["exact"].value == 0.9
    assert better.tags["even"].num_questions == 5
    assert better.tags["even"].scores["new"]["exact"].value == 0.8


def test_questions_that_one_was_not_asked_count_for_neither():
    asked = [True] * 5 + [False] * 6
    comparison = found(
        take_part("base", QUESTIONS, WRONG, "base"),
        take_part("previous new", QUESTIONS, [*RIGHT[:5], *[""] * 6], "previous", asked=asked),
        take_part("new", QUESTIONS, RIGHT),
    )

    assert comparison.scores["previous new"]["exact"][0] == 1.0
    pair = comparison.pair("previous new", "new")
    assert pair.verdicts == ("right",) * 5 + (None,) * 6
    assert pair.differences["exact"].num_questions == 5
    assert [(p.before, p.after) for p in comparison.judged_pairs()] == [("base", "new"), ("previous new", "new")]
    assert "previous new" not in to_record(comparison)["questions"][7]["answers"]
    assert "not asked" in render_page(comparison)


def test_limits_name_what_was_found_and_allowed(better):
    limits = Limits(
        {"exact": 0.95, "chrf": 0.1, "valid": None},
        {"even": 0.9},
        max_perplexity=1.1,
        max_broken=0,
        fail_on_regression=True,
    )
    judged = better.with_limits(judge_limits(better, limits))

    assert [(limit.name, limit.passed) for limit in judged.limits] == [
        ("min_exact", False), ("min_chrf", True), ("min_exact_of.even", False), ("max_perplexity", False),
        ("max_broken", True), *[("fail_on_regression", True)] * 3,
    ]  # fmt: skip
    message = describe_missed(judged)
    assert message.startswith("3 limits are not kept by new:\n  exactly right answers 90 %, allowed at least 95 %")
    assert "perplexity of references 1.284, allowed at most 1.1 (max_perplexity)" in message


def test_a_significant_loss_is_a_regression_and_a_small_one_is_not():
    base = take_part("base", QUESTIONS, RIGHT, "base")
    worse = found(base, take_part("new", QUESTIONS, WRONG), limits=Limits(max_broken=9, fail_on_regression=True))
    little = found(base, take_part("new", QUESTIONS, ["No.", *RIGHT[1:]]), limits=Limits(fail_on_regression=True))

    assert {limit.name for limit in worse.missed} == {"max_broken", "fail_on_regression"}
    assert "right by base and wrong now: 10, allowed at most 9 (max_broken): q0, q1," in worse.missed[0].text
    assert "exactly right answers -1 against base (p = 0.002)" in worse.missed[1].text
    assert not little.missed


def test_without_checks_the_references_tell_a_regression():
    questions = [question(i, reference=f"The answer number {i} is long.") for i in range(12)]
    references = [q.reference for q in questions]
    comparison = compare_participants(
        questions,
        [take_part("base", questions, references, "base", nll=1.0), take_part("new", questions, ["x"] * 12, nll=3.0)],
        baseline="base",
        candidate="new",
    )

    limits = judge_limits(comparison, Limits(fail_on_regression=True))

    missed = " ".join(limit.text for limit in limits if not limit.passed)
    assert all(title in missed for title in ("ROUGE-L", "chrF", "perplexity"))


# Marks


@pytest.mark.parametrize(
    ("answer", "wanted", "pieces"),
    [
        ("a b c", "a b c", [("same", "a b c")]),
        ('"x": true}', '"x": false}', [("same", '"x": '), ("missing", "false"), ("extra", "true"), ("same", "}")]),
        ("one two three", "one three", [("same", "one "), ("extra", "two "), ("same", "three")]),
        ("", "gone", [("missing", "gone")]),
        ("nothing alike here", "a wholly other text", [("other", "nothing alike here")]),
    ],
)
def test_marks_words(answer, wanted, pieces):
    assert mark_differences(answer, wanted) == pieces


@given(st.text(alphabet="ab 1.\n", max_size=30), st.text(alphabet="ab 1.\n", max_size=30))
@settings(max_examples=100, deadline=None)
def test_marks_lose_no_character(answer, wanted):
    pieces = mark_differences(answer, wanted)

    assert "".join(p.text for p in pieces if p.kind != "missing") == answer
    if not any(p.kind == "other" for p in pieces):
        assert "".join(p.text for p in pieces if p.kind not in ("extra",)) == wanted


def test_long_texts_are_marked_by_lines():
    lines = [f"line {i}\n" for i in range(1000)]

    pieces = mark_differences("".join(lines[:500] + lines[501:]), "".join(lines))

    assert [p for p in pieces if p.kind != "same"] == [("missing", "line 500\n")]


# Outputs


def test_the_terminal_shows_no_control_characters():
    texts = [HOSTILE] * 11
    printed = draw_comparison(
        found(take_part("base", QUESTIONS, WRONG, "base"), take_part("new", QUESTIONS, texts)), max_rows=11
    )

    assert "\x1b" not in printed
    assert "\u202e" not in printed
    assert "11 of 11 questions" in printed
    assert "new against base: 10 as wrong as before, 0 right before and wrong now, 1 changed." in printed


def hostile_page():
    questions = [
        Question(
            HOSTILE + str(i),
            (Message("system", HOSTILE), Message("user", HOSTILE)),
            Origin(HOSTILE, i),
            reference=HOSTILE if i else None,
            check="contains",
            expect=["never", HOSTILE],
            tags=(HOSTILE,),
        )
        for i in range(3)
    ]
    base = take_part("base", questions, [HOSTILE + "1", "never", ""], "base")
    new = take_part(HOSTILE, questions, [HOSTILE + "2", f"never {HOSTILE}", HOSTILE])
    comparison = compare_participants(
        questions, [base, new], baseline="base", candidate=HOSTILE, settings={"base": HOSTILE}, notes=[HOSTILE]
    )
    limits = Limits({"exact": 1.0}, {HOSTILE: 1.0}, max_broken=0)
    return render_page(comparison.with_limits(judge_limits(comparison, limits)))


def test_the_page_loads_nothing_and_runs_nothing_but_its_own_script():
    page = hostile_page()
    elements = Elements(page)

    assert elements.tags.count("script") == elements.tags.count("style") == 1
    assert "img" not in elements.tags
    assert not [name for _, name, _ in elements.attributes if name.startswith("on")]
    assert not [name for _, name, _ in elements.attributes if name in ("src", "srcset", "style", "action")]
    assert all(value.startswith("#") for _, name, value in elements.attributes if name == "href")
    assert "49" not in re.findall(r"\b49\b", " ".join(elements.text))  # no template syntax of a text is followed
    assert "\x1b" not in page
    assert "\u202e" not in page
    policy = next(value for _, name, value in elements.attributes if name == "content" and "default-src" in value)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_the_page_shows_every_answer_score_and_pair(better):
    page = render_page(better)
    elements = Elements(page)
    text = " ".join(" ".join(elements.text).split())

    assert elements.tags.count("article") == len(QUESTIONS)
    assert elements.tags.count("svg") == 2 + 1 + 3  # scores, perplexity; tags; pairs
    assert "9/10, 90.0 % [59.6, 98.2]" in text
    assert "new against old" in text
    verdicts = [json.loads(value) for _, name, value in elements.attributes if name == "data-verdicts"]
    assert verdicts[0] == {"base\nold": "fixed", "base\nnew": "wrong", "old\nnew": "broken"}
    assert all(label in page for label in ('aria-label="Scores"', "<title>exactly right answers: new 9/10"))


def test_a_page_of_one_model_without_checks():
    questions = [question(0)]
    page = render_page(
        compare_participants(
            questions, [take_part("base", questions, ["x"], "base")], baseline="base", candidate="base"
        )
    )

    assert Elements(page).tags.count("article") == 1
    assert 'id="before"' not in page.split("<script>")[0]


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def browse(page, tmp_path, script=""):
    """Load a page in a browser and return what its document has become; a script acts as a reader would."""
    if script:  # a page of this package lets no other script in
        page = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
        page = page.replace("</body>", f"<script>{script}</script></body>")
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, "--dump-dom", (tmp_path / "page.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser")
def test_a_browser_filters_and_runs_nothing_hostile(better, tmp_path):
    hostile = browse(hostile_page(), tmp_path)
    assert "<title>Comparison of answers</title>" in hostile
    assert "3 of 3 questions" in hostile

    page = render_page(better)
    choose = "before.value = 'old'; before.dispatchEvent(new Event('input'));"
    for kind, shown in (("regressions", 1), ("wins", 5), ("failures", 1), ("changed", 7), ("", 11)):
        click = f"document.querySelector('[data-kind=\"{kind}\"]').click();"
        assert f"{shown} of 11 questions" in browse(page, tmp_path, choose + click)
    swapped = choose + "after.value = 'base'; document.querySelector('[data-kind=regressions]').click();"
    assert "5 of 11 questions" in browse(page, tmp_path, swapped)  # what old fixed, base breaks
    searched = "query.value = 'question 7'; query.dispatchEvent(new Event('input'));"
    assert "1 of 11 questions" in browse(page, tmp_path, searched)
    tagged = "tag.value = 'even'; tag.dispatchEvent(new Event('input'));"
    assert "5 of 11 questions" in browse(page, tmp_path, tagged)
