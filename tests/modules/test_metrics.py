import math

import pytest
import torch

from lightning_qlora.modules.metrics import ExactMean, MeanDifference, MeanPerplexity


def test_mean_and_perplexity_weigh_terms_not_batches():
    for metric, expected in ((ExactMean(), 1.25), (MeanPerplexity(), math.exp(1.25))):
        metric.update(torch.tensor(3.0), 3)
        metric.update(torch.tensor(2.0), torch.tensor(1.0))
        metric.update(torch.tensor(0.0), 0)
        assert metric.compute() == pytest.approx(expected)


def test_a_nan_shows_in_the_mean():
    metric = ExactMean()
    metric.update(torch.tensor(float("nan")), 2)
    assert metric.compute().isnan()


def test_difference_of_means_of_unequal_counts():
    metric = MeanDifference()
    metric.update(torch.tensor([1.0, 2.0]), torch.tensor([]))
    metric.update(torch.tensor([6.0]), torch.tensor([2.0, 3.0]))
    assert metric.compute() == pytest.approx(3 - 2.5)
