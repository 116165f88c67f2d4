import math
import random
import statistics

import pytest

from lightning_qlora.callbacks.loss_spikes import LossRise, LossWatch

THRESHOLD = 6.0

# The losses of the first 41 steps, and of the last 64, of a run on two short rows a step.
EARLY = """
1.5028 1.8169 1.6008 1.0923 0.6644 0.5912 1.0552 0.1936 0.4866 0.2092 0.2599 0.4989 0.3202 0.3611 0.1690 0.0822 0.3931
0.5651 0.6073 0.0939 0.5233 0.5341 0.2023 0.4371 0.2521 0.3536 0.1394 0.3275 0.2381 0.1966 0.4795 0.1825 0.2187 0.2087
0.2554 0.0372 0.6305 0.5128 0.3574 0.2935 0.0642
"""
LATE = """
0.0342 0.0083 0.0071 0.0402 0.0153 0.0285 0.0215 0.0126 0.0126 0.0080 0.0058 0.0410 0.0109 0.0024 0.0098 0.0044 0.0123
0.0032 0.0123 0.0024 0.0116 0.0188 0.0414 0.0574 0.0029 0.0200 0.0648 0.0040 0.0358 0.0027 0.0707 0.0014 0.0629 0.0213
0.0141 0.1233 0.1325 0.1245 0.0099 0.0149 0.0102 0.0071 0.0846 0.0359 0.0128 0.0066 0.0119 0.0369 0.1386 0.0228 0.0763
0.0147 0.0063 0.0083 0.0710 0.0102 0.0234 0.0039 0.0098 0.0125 0.0084 0.2014 0.0082 0.0130
"""
early, late = ([float(word) for word in text.split()] for text in (EARLY, LATE))


def told(losses):
    """Number and rise of each step that is told of."""
    watch = LossWatch(THRESHOLD)
    return [(step, rise) for step, loss in enumerate(losses) if (rise := watch.add(loss)) is not None]


def noisy(rng, center, spread, count):
    return [center * math.exp(rng.gauss(0, spread)) for _ in range(count)]


def small_batches(rng, count=300):
    """A whole run like the one above: the same first steps, then steps drawn from its middle and its end."""
    middle = [rng.choice(early[8:]) for _ in range(100)]
    return early + middle + [rng.choice([*late, 0.345, 0.296]) for _ in range(count)]


def test_a_real_run_on_small_batches_is_quiet():
    assert told(early + late) == []
    # Steps of the same run, with medians of 0.026 to 0.013 before them, at which a rule on plain losses cried wolf.
    for outlier in (0.296, 0.236, 0.345, 0.139, 0.201, 0.162):
        assert told([*early, *late, outlier, *late]) == []


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_quiet(seed):
    rng = random.Random(seed)
    assert told(small_batches(rng)) == []
    for spread in (0.02, 0.1, 0.3, 0.5):
        assert told(noisy(rng, 1.2, spread, 500)) == []


def test_falling_and_stepping_down_is_quiet():
    assert told([2.0 * 0.99**i + 0.3 for i in range(300)]) == []
    assert told(noisy(random.Random(0), 1.1, 0.1, 100) + noisy(random.Random(1), 0.7, 0.1, 100)) == []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("center", "spread", "jump"), [(1.2, 0.02, 1.9), (1.2, 0.15, 5.0), (0.3, 0.5, 12.0), (0.02, 1.0, 3.0)]
)
def test_a_jump_is_told_once(seed, center, spread, jump):
    rng = random.Random(seed)
    before, after = noisy(rng, center, spread, 100), noisy(rng, center, spread, 100)
    ((step, rise),) = told([*before, jump, *after])
    assert (step, rise.loss, rise.num_steps) == (100, jump, 1)
    assert rise.before == pytest.approx(statistics.median(before[-64:]))


def test_a_jump_is_one_above_all_of_the_last():
    rng = random.Random(0)
    steady = noisy(rng, 1.0, 0.1, 40)
    assert [step for step, _ in told([*steady, 9.0, *steady, 9.5, *steady])] == [40, 81]
    assert [step for step, _ in told([*steady, 9.0, *steady, 8.5, *steady])] == [40]


@pytest.mark.parametrize("seed", range(5))
def test_a_divergence_is_told_once_and_soon(seed):
    losses = small_batches(random.Random(seed))
    ((step, _),) = told([*losses, *(min(0.02 * 1.5**i, 9.0) for i in range(30))])
    assert len(losses) <= step < len(losses) + 18  # by then it is 20 at the latest


@pytest.mark.parametrize("seed", range(5))
def test_a_rise_that_no_single_step_shows_is_told(seed):
    rng = random.Random(seed)
    before = noisy(rng, 1.0, 0.2, 100)
    ((step, rise),) = told(before + noisy(rng, 2.0, 0.2, 40))
    assert (rise.num_steps, 100 <= step < 116) == (8, True)
    assert rise.loss > 1.5


def test_it_goes_on_where_it_stopped():
    losses = noisy(random.Random(0), 1.0, 0.1, 40)
    watch = LossWatch(THRESHOLD)
    assert not [loss for loss in losses if watch.add(loss)]
    assert LossWatch(THRESHOLD, watch.losses).add(9.0) == LossRise(9.0, statistics.median(losses), 1)


@pytest.mark.parametrize("odd", [0.0, -3.0, 1e-30])
def test_losses_without_a_logarithm(odd):
    assert told([odd] * 100) == []
    assert [step for step, _ in told([*[odd] * 50, 4.0, *[odd] * 50])] == [50]
