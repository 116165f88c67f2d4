"""What autograd saves, on the host: on the CPU, where it is copied all the same, so that the bookkeeping is seen."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_qlora.kernels import elementwise, host_offload
from lightning_qlora.kernels.elementwise import Source
from lightning_qlora.kernels.host_offload import HostOffload, formed_again

WIDTH, ROWS = 8, 5
NBYTES = 4 * WIDTH * ROWS


class Watched(HostOffload):
    """Moves everything, and notes what is on the device whenever something is asked for."""

    def __init__(self):
        super().__init__(everywhere=True, least_bytes=1)
        self.moved = []
        self.most = 0

    def _send_away(self, tensor):
        moved = super()._send_away(tensor)
        self.moved.append(moved)
        self.most = max(self.most, self.bytes_here())
        return moved

    def _bring(self, view):
        tensor = super()._bring(view)
        self.most = max(self.most, self.bytes_here())
        return tensor

    def bytes_here(self):
        return sum(each.nbytes for each in self.moved if each.on_device is not None)

    def are_here(self):
        return [each.on_device is not None for each in self.moved]


class Layer(nn.Module):
    """Saves its input and two tensors more."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x):
        hidden = x @ self.weight
        return x * torch.sigmoid(hidden)  # saves both factors, of which one is what sigmoid saves


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return nn.ModuleList(Layer() for _ in range(6))


def run(layers, offload, seed=0):
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))
    x = x.clone().requires_grad_()
    for layer in layers:
        x = layer(x) if offload is None else offload(layer, x)
    return x.square().sum()


def gradients(layers):
    found = [layer.weight.grad.clone() for layer in layers]
    layers.zero_grad()
    return found


def expected(layers, seed=0):
    run(layers, None, seed).backward()
    return gradients(layers)


def equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_layers_worth_stays_on_the_device_and_what_is_shared_is_moved_once(layers):
    wanted, offload = expected(layers), Watched()
    loss = run(layers, offload)
    assert len(offload.moved) == 2 * len(layers)  # the input and the sigmoid; the weight stays
    assert offload.moved_bytes == 2 * len(layers) * NBYTES
    assert offload.are_here() == [False] * 10 + [True] * 2
    loss.backward()
    assert equal(wanted, gradients(layers))
    assert offload.most <= 3 * NBYTES  # the third is being packed, or in use
    assert not any(offload.are_here())


def test_what_is_asked_for_is_there_or_on_its_way_already(layers):
    offload, seen = Watched(), []
    bring = offload._bring

    def watch(view):
        seen.append(view.moved.on_device is not None)
        return bring(view)

    offload._bring = watch
    run(layers, offload).backward()
    assert len(seen) > 2 * len(layers)
    assert all(seen)


class Sum(torch.autograd.Function):
    """Asks for what it has saved in the order in which it has saved it."""

    @staticmethod
    def forward(ctx, x, *others):
        ctx.save_for_backward(*others)
        return x + sum(others)

    @staticmethod
    def backward(ctx, gradient):
        others = ctx.saved_tensors
        return gradient * sum(others), *(None for _ in others)


def test_what_was_asked_for_is_not_sent_for_again(monkeypatch):
    offload, sent = Watched(), []
    send_for = host_offload._Moved.send_for

    def watch(moved):
        before = moved.on_device
        send_for(moved)
        if before is None:
            sent.append(moved)

    monkeypatch.setattr(host_offload._Moved, "send_for", watch)

    def layer(x):
        return Sum.apply(x, *(torch.randn(ROWS, WIDTH) for _ in range(4)))

    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    y = x
    for _ in range(5):
        y = offload(layer, y)
    y.sum().backward()
    assert len(offload.moved) == 20
    assert len(sent) == len(set(sent)) == 16  # the last four never left


def test_a_second_backward_pass_finds_everything(layers):
    offload = Watched()
    loss = run(layers, offload)
    loss.backward(retain_graph=True)
    first = gradients(layers)
    loss.backward()
    assert equal(first, gradients(layers))


def test_forward_passes_without_backward_and_several_before_one_backward(layers):
    one, two, offload = expected(layers, 1), expected(layers, 2), Watched()
    run(layers, offload, 5)  # nobody asks for its gradients
    with torch.no_grad():
        run(layers, offload, 6)
    first, second = run(layers, offload, 1), run(layers, offload, 2)
    first.backward()
    assert equal(one, gradients(layers))
    second.backward()
    assert equal(two, gradients(layers))


def test_nothing_outlives_its_graph(layers):
    offload = HostOffload(everywhere=True, least_bytes=1)
    loss = run(layers, offload)
    loss.backward()
    del loss
    gc.collect()
    assert not offload._here
    assert not offload._known


def test_views_of_one_storage_come_back_as_they_were():
    offload = Watched()
    whole = torch.randn(4, 3 * WIDTH, requires_grad=True)

    def attend(x):
        one, two, three = (x * 1).split(WIDTH, 1)
        return (one * two.t().contiguous().t() * three.detach().t().clone().t()).sum() + (one * three).sum()

    (wanted,) = torch.autograd.grad(attend(whole), whole)
    (found,) = torch.autograd.grad(offload(attend, whole), whole)
    assert torch.equal(wanted, found)


def test_what_is_written_over_after_it_was_saved_is_refused_as_autograd_itself_does(layers):
    buffer = torch.zeros(ROWS, WIDTH)

    def layer(x):
        buffer.copy_(x.detach())
        first = x * buffer
        buffer.mul_(2)
        return first

    def at_once(offload, x):
        return offload(layer, x).sum().backward()

    def when_it_leaves(offload, x):
        offload(layer, x)
        run(layers, offload)

    for run_on in (at_once, when_it_leaves):
        with pytest.raises(RuntimeError, match="written over"):
            run_on(Watched(), torch.randn(ROWS, WIDTH, requires_grad=True))


def test_small_tensors_indices_and_slices_of_large_ones_stay():
    offload = HostOffload(everywhere=True, least_bytes=NBYTES)
    table = torch.randn(100, WIDTH)
    x = torch.randn(ROWS, WIDTH, requires_grad=True)

    def layer(x):
        small = x[:1] * x.detach()[:1]  # a slice of a moved one, and too little itself
        return small.sum() + (x * table[3 : 3 + ROWS]).sum() + x[torch.arange(ROWS)].sum()

    offload(layer, x).backward()
    assert offload.moved_bytes == 0


def test_tensors_of_other_classes_stay():
    class Other(torch.Tensor):
        pass

    offload = HostOffload(everywhere=True, least_bytes=1)
    x = torch.randn(ROWS, WIDTH).as_subclass(Other).requires_grad_()
    offload(lambda x: x.sin().sum(), x).backward()
    assert offload.moved_bytes == 0
    torch.testing.assert_close(x.grad.as_subclass(torch.Tensor), x.detach().cos().as_subclass(torch.Tensor))


def test_the_source_of_a_tensor_is_kept_in_its_place(monkeypatch):
    """A source as norms have it, here of plain arithmetic."""
    calls = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):
            calls.append(factor)
            return x * factor

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2, None

    monkeypatch.setattr(elementwise, "_RMSNorm", Double)
    x = torch.randn(ROWS, WIDTH, requires_grad=True)

    def layer(x):
        hidden = x * 1
        y = elementwise._note(Double.apply(hidden, 2.0), "norm", [hidden.detach()], 2.0)
        return (y * y.detach()).sum() + hidden.square().sum()

    wanted = torch.autograd.grad(layer(x), x)[0]
    for call in (formed_again, HostOffload(everywhere=True, least_bytes=1)):
        calls.clear()
        loss = call(layer, x)
        assert calls == [2.0]
        found = torch.autograd.grad(loss, x)[0]
        assert calls == [2.0, 2.0]
        assert torch.equal(found, wanted)


def test_a_formed_tensor_has_its_source_again(monkeypatch):
    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):
            return x * factor

    monkeypatch.setattr(elementwise, "_RMSNorm", Same)
    x = torch.ones(3, 4)
    formed = Source("norm", [x], [3.0]).form()
    assert elementwise.source_of(formed).tensors[0] is x
    assert elementwise.source_of(formed.view(12)) is not None
    assert elementwise.source_of(formed[:1]) is None


@given(st.integers(1, 10**12), st.sampled_from([1, 2, 4]))
def test_pieces_are_blocks_of_pinned_memory(numel, itemsize):
    sizes = host_offload._pieces(numel, itemsize)
    nbytes = [size * itemsize for size in sizes]
    assert sum(sizes) == numel
    assert min(sizes) > 0
    assert len(sizes) <= 16
    assert len(set(nbytes[:-1])) <= 1
    assert all(each.bit_count() == 1 for each in nbytes[:-1])
    blocks = sum(1 << (each - 1).bit_length() for each in nbytes)
    assert blocks < numel * itemsize + max(nbytes)
    if sum(nbytes) <= 2**28:
        assert max(nbytes) <= 2**24


def test_what_is_in_pieces_comes_back_as_it_was(monkeypatch):
    monkeypatch.setattr(host_offload, "_PIECE", 256)
    x, weight, offload = torch.randn(11, 37), nn.Parameter(torch.randn(37)), Watched()
    (expected,) = torch.autograd.grad((x * weight).sin().sum(), weight)
    (found,) = torch.autograd.grad(offload(lambda x: (x * weight).sin(), x).sum(), weight)
    assert [len(each.sizes) for each in offload.moved] == [7, 7]
    assert torch.equal(found, expected)
