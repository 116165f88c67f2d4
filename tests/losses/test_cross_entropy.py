import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_qlora.losses.cross_entropy import head_cross_entropy


def reference(hidden, head, targets):
    return functional.cross_entropy(head(hidden).double(), targets, reduction="sum")


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_equals_the_whole_logits_at_once(frozen, chunk_size):
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False).requires_grad_(not frozen)
    hidden = torch.randn(20, 16, requires_grad=True)
    targets = torch.randint(0, 50, (20,))

    loss = head_cross_entropy(hidden, head, targets, chunk_size=chunk_size)
    found = torch.autograd.grad(loss.loss_sum * 3.0, [hidden, *([] if frozen else [head.weight])])
    expected_loss = reference(hidden, head, targets)
    expected = torch.autograd.grad(expected_loss * 3.0, [hidden, *([] if frozen else [head.weight])])

    assert loss.num_tokens == 20
    assert loss.num_correct == (head(hidden).argmax(-1) == targets).sum()
    torch.testing.assert_close(loss.loss_sum.double(), expected_loss, rtol=1e-6, atol=0)
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)


def test_no_supervised_token_contributes_an_exact_zero_that_reaches_the_model():
    hidden = torch.randn(0, 16, requires_grad=True)
    loss = head_cross_entropy(hidden, nn.Linear(16, 50).requires_grad_(False), torch.empty(0, dtype=torch.long))
    loss.loss_sum.backward()
    assert loss.loss_sum == 0
    assert loss.num_tokens == 0
    assert hidden.grad is not None


def test_holds_the_logits_of_one_chunk_only():
    sizes = []

    class Spy(nn.Linear):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)

    head = Spy(8, 32).requires_grad_(False)
    head_cross_entropy(torch.randn(10, 8, requires_grad=True), head, torch.zeros(10, dtype=torch.long), chunk_size=4)
    assert sizes == [4, 4, 2]


def test_evaluation_needs_no_gradient():
    head = nn.Linear(8, 32)
    with torch.no_grad():
        loss = head_cross_entropy(torch.randn(10, 8), head, torch.zeros(10, dtype=torch.long), chunk_size=4)
    assert not loss.loss_sum.requires_grad
