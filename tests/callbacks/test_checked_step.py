import math

import pytest

from lightning_qlora.callbacks.checked_step import describe, named


def account(rank, losses, gradients=()):
    names = {"rows": [f"train.jsonl:{rank}"], "gradients": list(gradients), "saved": f"{rank}.pt"}
    return {"rank": rank, "losses": losses, **names}


def test_a_part_of_a_gradient_that_is_not_finite_is_told_of_the_rank_that_has_it():
    told = describe(7, [account(0, [1.0]), account(1, [2.0], ["a", "b"])])
    assert told.splitlines() == [
        "The loss is finite but the gradient is NaN or infinite in the optimizer step after step 7.",
        "  rank 0: micro-batch losses 1 (rows: train.jsonl:0); batch saved to 0.pt",
        "  rank 1: micro-batch losses 2; gradients of 2 tensors, such as a (rows: train.jsonl:1); batch saved to 1.pt",
    ]


@pytest.mark.parametrize("gradients", [[], ["a"]])
def test_of_losses_only_those_that_are_not_finite_are_told(gradients):
    told = describe(0, [account(0, [1.0], ["a"]), account(1, [2.0, math.inf], gradients)])
    assert told.startswith("The loss is NaN or infinite in the optimizer step after step 0.\n  rank 1: ")
    assert "losses 2, inf" in told
    assert "rank 0" not in told
    assert ("gradients of" in told) == bool(gradients)


def test_many_rows_are_counted():
    assert named([]) == ""
    assert named([f"r{i}" for i in range(10)]).endswith("r7 and 2 more)")
