"""Intervals and tests against their formulas, against other implementations' published values, and against chance."""

import math

import numpy as np
import pytest

from lightning_qlora.evaluation import Parts, difference, estimate, holm
from lightning_qlora.evaluation.statistics import mcnemar_exact, permutation_test, wilson_interval


def rates(*values):
    return Parts(np.array(values, dtype=float), np.ones(len(values)), is_rate=True)


def shares(part, whole, **kind):
    return Parts(np.array(part, dtype=float), np.array(whole, dtype=float), **kind)


@pytest.mark.parametrize(
    ("num_yes", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (60, 60, 0.9398, 1.0),
    ],
)
def test_wilson_interval_is_the_published_one(num_yes, count, low, high):
    assert wilson_interval(num_yes, count) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize(
    ("won", "lost", "p_value"),
    [(0, 0, 1.0), (5, 5, 1.0), (6, 0, 2 / 64), (1, 9, 2 * 11 / 1024), (9, 1, 2 * 11 / 1024), (53, 0, 2**-52)],
)
def test_mcnemar_counts_the_coins(won, lost, p_value):
    assert mcnemar_exact(won, lost) == pytest.approx(p_value)


def test_few_differences_are_permuted_in_every_way():
    # Only all plus or all minus reach as far: 2 of 2**5 choices; equal pairs say nothing.
    assert permutation_test(np.array([1.0, 2, 3, 4, 5, 0, 0])) == 2 / 32
    assert permutation_test(np.array([1.0, -1.0])) == 1.0
    assert permutation_test(np.zeros(4)) == 1.0


def test_many_differences_are_permuted_at_random():
    differences = np.random.default_rng(1).normal(0.15, 1, 80)
    p_value = permutation_test(differences)

    z = differences.sum() / math.sqrt((differences**2).sum())  # the normal limit of the same test
    assert p_value == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=0.02)
    assert permutation_test(differences) == p_value
    assert permutation_test(differences + 5) == 1 / 10_000


def test_intervals_hold_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        whole = generator.integers(1, 6, 60)
        found = estimate(shares(generator.binomial(whole, 0.7), whole))
        held += found.low <= 0.7 <= found.high
    assert 180 <= held <= 199


def test_chance_alone_is_seldom_significant():
    generator = np.random.default_rng(0)
    p_values = []
    for _ in range(200):
        before, after = (rates(*generator.integers(0, 2, 40)) for _ in range(2))
        p_values.append(difference(before, after).p_value)
    assert np.mean(np.array(p_values) < 0.05) <= 0.06  # exact: never above 0.05 in the long run


def test_an_estimate_counts_only_what_it_applies_to():
    found = estimate(shares([3, 0, 1], [4, 0, 2]))

    assert (found.value, found.num_questions) == (4 / 6, 2)
    assert found.low <= found.value <= found.high
    nothing = estimate(shares([0, 0], [0, 0]))
    assert nothing.num_questions == 0
    assert math.isnan(nothing.value)


def test_a_perplexity_is_over_all_tokens_together():
    found = estimate(shares([10.0, 2.0], [5, 5], is_log=True))

    assert found.value == pytest.approx(math.exp(12 / 10))
    assert (found.low, found.high) == pytest.approx((math.exp(0.4), math.exp(2.0)))
    assert math.isfinite(estimate(shares([1e9], [1], is_log=True)).value)


def test_a_difference_is_over_the_questions_that_both_have():
    before, after = shares([1, 0, 0, 0], [1, 1, 1, 0], is_rate=True), shares([1, 1, 0, 0], [1, 1, 0, 0], is_rate=True)

    found = difference(before, after)

    assert (found.value, found.num_questions, found.test, found.p_value) == (0.5, 2, "McNemar exact", 1.0)
    assert (found.low, found.high) == (0.0, 1.0)
    none = difference(before, before.only(np.zeros(4, dtype=bool))._replace(part=np.zeros(4), whole=np.zeros(4)))
    assert none.num_questions == 0
    assert math.isnan(none.p_value)


def test_the_same_answers_differ_by_nothing():
    scores = shares([1, 2, 3], [4, 4, 4])

    assert difference(scores, scores)[:4] == (0.0, 0.0, 0.0, 1.0)


def test_holm_corrects_step_by_step():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.02]) == [0.02]
    corrected = holm([0.9, math.nan, 0.8])
    assert math.isnan(corrected[1])
    assert (corrected[0], corrected[2]) == (1.0, 1.0)
