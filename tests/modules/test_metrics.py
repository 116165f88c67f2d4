import math

import pytest
import torch
from torch import nn

from lightning_qlora.modules.metrics import ExactMean, MeanDifference, MeanPerplexity, StageMetrics, _share


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


@pytest.mark.parametrize(
    ("metric", "update"),
    [(ExactMean(), (torch.tensor(3.0), 2)), (MeanDifference(), (torch.tensor([3.0]), torch.tensor([1.5])))],
    ids=["mean", "difference"],
)
def test_what_inference_mode_leaves_behind_can_be_gone_on_with(metric, update):
    with torch.inference_mode():  # as trainer.validate does
        metric.update(*update)
        metric.reset()
    kept = dict(metric.metric_state)
    metric.update(*update)
    assert metric.compute() == 1.5
    assert all((state == 0).all() for state in kept.values())  # what is kept for a checkpoint stays as it was


def test_a_further_loader_has_metrics_of_its_own():
    metrics = StageMetrics({"val": nn.ModuleDict({"loss": ExactMean()})})
    with torch.inference_mode():
        metrics.of("val")["loss"].update(torch.tensor(3.0), 2)
        metrics.of("val", 1)["loss"].update(torch.tensor(5.0), 2)
    assert metrics.of("val")["loss"].compute() == 1.5
    assert metrics.of("val", 1)["loss"].compute() == 2.5
    assert not metrics.state_dict()


def test_sums_go_back_to_their_ranks_and_to_the_first_where_there_were_others():
    ranks = [{"loss.total": torch.tensor(1.0)}, {"loss.total": torch.tensor(2.0)}]
    assert [_share(ranks, rank, 2) for rank in range(2)] == ranks
    assert [_share(ranks, rank, 3) for rank in range(3)] == [{"loss.total": torch.tensor(3.0)}, {}, {}]
