"""How sure a score is, and whether two models differ by more than chance on the same questions.

Intervals hold 95 %. Rates of yes and no get Wilson's (Wilson, JASA 1927; Brown, Cai and DasGupta, Statistical Science
2001): a bootstrap of 60 right answers out of 60 would claim to be certain. Everything else gets the percentile
bootstrap over questions (Efron and Tibshirani, 1993), differences with both models resampled alike. torchmetrics'
``BootStrapper`` resamples tensors only, not questions with their texts; counts per question need no copy of a metric.

Differences of yes and no are tested by McNemar's exact test (McNemar, Psychometrika 1947), all others by exchanging
the two models' results at random, question by question (approximate randomisation: Noreen, 1989), as Dror et al. advise
(The Hitchhiker's Guide to Testing Statistical Significance in NLP, ACL 2018). Neither assumes a distribution.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "Difference",
    "Estimate",
    "Parts",
    "difference",
    "estimate",
    "holm",
    "mcnemar_exact",
    "permutation_test",
    "wilson_interval",
]

Floats: TypeAlias = npt.NDArray[np.float64]

_Z = 1.959963984540054  # of 95 %
_RESAMPLES = 2000
_PERMUTATIONS = 9999
_BLOCK = 1 << 22  # numbers of one block of random signs, 32 MiB
_MAX_MEAN_NLL = 700.0  # exp(710) overflows


class Parts(NamedTuple):
    """A score of each of Q questions as a part of a whole: the score of them all is ``sum(part) / sum(whole)``.

    Attributes:
        part: (Q,) such as 1 for a right answer, right fields, or nats.
        whole: (Q,) such as 1, all fields, or tokens; 0 where the score does not apply to the question.
        is_rate: Whether each question is a yes or a no.
        is_log: Whether the score is the exponential of the quotient, as a perplexity is.
    """

    part: Floats
    whole: Floats
    is_rate: bool = False
    is_log: bool = False

    @property
    def applies(self) -> npt.NDArray[np.bool_]:
        """(Q,) whether the score applies to the question."""
        applies: npt.NDArray[np.bool_] = self.whole > 0
        return applies

    def only(self, kept: npt.NDArray[np.bool_]) -> Parts:
        """Take some of the questions."""
        return self._replace(part=self.part[kept], whole=self.whole[kept])

    def of(self, weights: Floats) -> Floats:
        """Return the score of (..., Q) weighted questions; ``nan`` where they hold none that it applies to."""
        part, whole = weights @ self.part, weights @ self.whole
        score = np.divide(part, whole, out=np.full_like(whole, np.nan), where=whole > 0)
        return np.exp(np.minimum(score, _MAX_MEAN_NLL)) if self.is_log else score


class Estimate(NamedTuple):
    """A score, its 95 % interval, and the number of questions that it is taken over."""

    value: float
    low: float
    high: float
    num_questions: int


class Difference(NamedTuple):
    """What a later score has over an earlier one on the same questions.

    Attributes:
        value: Later minus earlier.
        low: Lower end of the 95 % interval.
        high: Upper end.
        p_value: Two-sided: how often chance alone would part the two as far.
        test: ``"McNemar exact"`` or ``"permutation"``.
        num_questions: The questions that it is taken over.
    """

    value: float
    low: float
    high: float
    p_value: float
    test: str
    num_questions: int


def estimate(parts: Parts, *, seed: int = 0) -> Estimate:
    """Take the score of all questions, with its interval.

    Args:
        parts: The scores of the questions.
        seed: Of the resampling.
    """
    parts = parts.only(parts.applies)
    count = len(parts.part)
    if not count:
        return Estimate(math.nan, math.nan, math.nan, 0)
    value = float(parts.of(np.ones(count)))
    if parts.is_rate:
        return Estimate(value, *wilson_interval(int(parts.part.sum()), count), count)
    low, high = _percentiles(parts.of(_resample(count, seed)))
    return Estimate(value, low, high, count)


def difference(before: Parts, after: Parts, *, seed: int = 0) -> Difference:
    """Compare two models' scores on the same questions.

    Args:
        before: The earlier scores.
        after: The later ones, of the same questions in the same order.
        seed: Of the resampling and of the permutations.
    """
    kept = before.applies & after.applies
    before, after = before.only(kept), after.only(kept)
    count = int(kept.sum())
    test = "McNemar exact" if after.is_rate else "permutation"
    if not count:
        return Difference(math.nan, math.nan, math.nan, math.nan, test, 0)
    value = float(after.of(np.ones(count)) - before.of(np.ones(count)))
    weights = _resample(count, seed)
    low, high = _percentiles(after.of(weights) - before.of(weights))
    if after.is_rate:
        won, lost = int((after.part > before.part).sum()), int((after.part < before.part).sum())
        p_value = mcnemar_exact(won, lost)
    else:
        p_value = permutation_test(after.part - before.part, seed=seed)
    return Difference(value, low, high, p_value, test, count)


def wilson_interval(num_yes: int, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a rate."""
    rate, square = num_yes / count, _Z**2
    centre = (rate + square / (2 * count)) / (1 + square / count)
    half = _Z * math.sqrt(rate * (1 - rate) / count + square / (4 * count**2)) / (1 + square / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar_exact(num_won: int, num_lost: int) -> float:
    """Return the two-sided p-value of questions won and lost: were each a fair coin, how often is it as uneven."""
    total = num_won + num_lost
    tail = sum(math.comb(total, k) for k in range(min(num_won, num_lost) + 1))
    return float(min(1.0, 2 * tail / 2**total))


def permutation_test(differences: Floats, *, seed: int = 0) -> float:
    """Return the two-sided p-value of paired differences: how often random signs give a sum as far from zero.

    Every choice of signs is tried where they are few, else 9,999 random ones, the observed one counted among them.

    Args:
        differences: (Q,) later minus earlier.
        seed: Of the random signs.
    """
    differences = differences[differences != 0]
    count = len(differences)
    if not count:
        return 1.0
    observed = abs(differences.sum()) * (1 - 1e-9)  # sums in another order round otherwise
    if 2**count <= _PERMUTATIONS:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=count)))
        return float((np.abs(signs @ differences) >= observed).mean())
    generator = np.random.default_rng(seed)
    reached, left, rows = 1, _PERMUTATIONS, max(1, _BLOCK // count)
    while left > 0:
        signs = generator.integers(0, 2, (min(rows, left), count)) * 2.0 - 1.0
        reached += int((np.abs(signs @ differences) >= observed).sum())
        left -= len(signs)
    return reached / (_PERMUTATIONS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number (Holm, Scandinavian Journal of Statistics 1979); ``nan`` does not count."""
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    corrected, largest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def _resample(count: int, seed: int) -> Floats:
    """Draw (R, Q) counts: how often each question is in each of R samples of as many questions."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=_RESAMPLES).astype(np.float64)


def _percentiles(scores: Floats) -> tuple[float, float]:
    low, high = np.nanpercentile(scores, [2.5, 97.5])
    return float(low), float(high)
