import pytest
import torch
from torch import nn

from lightning_qlora.kernels.log_softmax import PLAIN_BYTES
from lightning_qlora.losses import log_probs as log_probs_module
from lightning_qlora.losses.log_probs import chunk_positions, head_log_probs
from lightning_qlora.memory.simulation import _autocast_flag
from lightning_qlora.modules.forward import Head


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 7, 64, None])
def test_each_position_carries_its_own_gradient(frozen, chunk_size):
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False).requires_grad_(not frozen)
    hidden, weights = torch.randn(20, 16, requires_grad=True), torch.randn(20)
    targets = torch.randint(0, 50, (20,))
    wanted_for = [hidden, *([] if frozen else [head.weight])]

    log_probs, correct = head_log_probs(hidden, head, targets, chunk_size=chunk_size)
    found = torch.autograd.grad((log_probs * weights).sum(), wanted_for)
    expected_log_probs = head(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected = torch.autograd.grad((expected_log_probs * weights).sum(), wanted_for)

    torch.testing.assert_close(log_probs, expected_log_probs, rtol=1e-6, atol=1e-6)
    assert torch.equal(correct, head(hidden).argmax(-1) == targets)
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)


def test_factors_from_behind_are_not_rounded_to_sixteen_bits():
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(4, 16, dtype=torch.bfloat16, requires_grad=True)
    factor = 1 / 3  # 0.3340 in bfloat16: 0.2 % too much
    ones, thirds = (
        torch.autograd.grad(head_log_probs(hidden, head, torch.arange(4))[0].sum() * f, hidden)[0] for f in (1, factor)
    )
    assert torch.equal(thirds, (ones.float() * factor).bfloat16())


def test_no_position_gives_an_empty_result_that_reaches_the_model():
    hidden = torch.randn(0, 16, requires_grad=True)
    log_probs, correct = head_log_probs(hidden, nn.Linear(16, 50).requires_grad_(False), torch.empty(0).long())
    log_probs.sum().backward()
    assert log_probs.shape == correct.shape == (0,)
    assert log_probs.dtype == torch.float32
    assert hidden.grad is not None


def test_no_position_reaches_a_trained_head_too():
    head = nn.Linear(16, 50)
    log_probs, _ = head_log_probs(torch.randn(0, 16, requires_grad=True), head, torch.zeros(0, dtype=torch.int64))
    log_probs.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in head.parameters())


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chunk_changes_nothing(monkeypatch, frozen, dtype):
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False, dtype=dtype).requires_grad_(not frozen)
    hidden = torch.randn(700, 16, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 50, (700,))
    results = []
    for size in (None, 256, 699, 700):
        log_probs, correct = head_log_probs(hidden, head, targets, chunk_size=size)
        (gradient,) = torch.autograd.grad(log_probs.sum(), hidden)
        results.append((log_probs.detach(), correct, gradient))
    for found in results[1:]:
        for one, two in zip(results[0], found, strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    ("vocab_size", "frozen", "positions"),
    [
        (1_000, True, 1024),
        (32_000, True, 1024),
        (49_152, True, 640),
        (128_256, True, 256),
        (128_256, False, 256),
        (262_144, True, 256),
        (2_000_000, True, 256),
    ],
)
def test_chunks_are_as_long_as_their_memory_allows(vocab_size, frozen, positions):
    assert chunk_positions(vocab_size, frozen=frozen) == positions


@pytest.mark.parametrize(
    ("vocab_size", "logit_bytes", "positions"),
    [(32_000, 4, 1024), (128_256, 4, 640), (151_936, 4, 512), (262_144, 4, 320), (128_256, 8, 320), (900_000, 4, 256)],
)
def test_chunks_are_longer_where_a_logit_takes_less(vocab_size, logit_bytes, positions):
    assert chunk_positions(vocab_size, logit_bytes=logit_bytes) == positions


def test_a_logit_takes_what_the_way_it_will_go_takes(monkeypatch):
    """Only a frozen linear head alone, with a gradient to be formed, is sure to make nothing but logits."""
    monkeypatch.setattr(log_probs_module, "bytes_per_logit", lambda near, dtype: dtype.itemsize)
    hidden = torch.randn(5, 16, requires_grad=True)
    alone = nn.Linear(16, 50).requires_grad_(False)
    capped = Head(alone, 30.0)

    def taken(head, hidden=hidden):
        return log_probs_module._logit_bytes(head, hidden)

    assert taken(alone) == taken(Head(alone, None)) == 4
    assert taken(alone, torch.randn(5, 16, dtype=torch.bfloat16, requires_grad=True)) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert taken(alone) == 2
    with _autocast_flag(torch.float16):  # of the GPU that a step on the meta device stands for
        assert taken(alone, hidden.to("meta")) == 2
    for head in (capped, nn.Sequential(alone, nn.Tanh()), nn.Identity(), nn.Linear(16, 50), lambda hidden: hidden):
        assert taken(head) == PLAIN_BYTES
    assert taken(alone, hidden.detach()) == PLAIN_BYTES
    with torch.no_grad():
        assert taken(alone) == PLAIN_BYTES


def test_the_vocabulary_is_that_of_the_heads_largest_layer_or_of_logits_themselves(monkeypatch):
    asked = []

    def note(vocab_size, *, frozen, logit_bytes):
        asked.append((vocab_size, frozen))
        return 3

    monkeypatch.setattr(log_probs_module, "chunk_positions", note)
    hidden, targets = torch.randn(5, 16, requires_grad=True), torch.zeros(5, dtype=torch.int64)
    adapted = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 50)).requires_grad_(False)
    for head in (nn.Linear(16, 50), adapted, nn.Identity()):
        head_log_probs(hidden, head, targets)
    assert asked == [(50, False), (50, True), (16, True)]
