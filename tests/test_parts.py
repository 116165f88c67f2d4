"""Parameters in parts are whole while they are used, and only then; on gloo processes."""

import time
import weakref

import pytest
import torch
from tiny_ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lightning_qlora import parts
from lightning_qlora.losses import log_probs as log_probs_module
from lightning_qlora.losses.log_probs import head_log_probs
from lightning_qlora.parts import cut_until_used, whole

pytestmark = pytest.mark.filterwarnings("ignore")  # of the forked processes; nothing here depends on warnings

CPU = torch.device("cpu")
ROWS = 7  # of which three ranks hold three, three and one


class Fails(nn.Linear):
    fails = False

    def forward(self, hidden):
        if self.fails:
            raise ValueError("broken")
        return super().forward(hidden)


def a_head(rows=ROWS):
    torch.manual_seed(0)
    return Fails(4, rows).requires_grad_(False)


def cut_head(rows=ROWS):
    torch.distributed.init_process_group("gloo")
    head = a_head(rows)
    cut_until_used(head, init_device_mesh("cpu", (torch.distributed.get_world_size(),)), CPU)
    return head


def local_rows(head):
    """Of weight and bias; minus one for what is whole."""
    return [p.to_local().shape[0] if isinstance(p, DTensor) else -1 for p in (head.weight, head.bias)]


@pytest.mark.parametrize(("rows", "parts_of"), [(ROWS, [3, 3, 1]), (2, [1, 1, 0])])
def test_whole_for_a_call_and_for_a_context(tmp_path, rows, parts_of):
    def run():
        head, hidden, seen = cut_head(rows), torch.ones(2, 4), []
        head.register_forward_pre_hook(lambda *_: seen.append(local_rows(head)))
        cut = head.weight, head.bias
        results = [head(hidden)]
        seen.append(local_rows(head))
        with whole(head):
            results += [head(hidden), head(hidden)]
            seen.append(local_rows(head))
            with torch.no_grad():
                assert torch.equal(head.weight, a_head(rows).weight)
            assert type(head.weight) is nn.Parameter
            assert not head.weight.requires_grad
        seen.append(local_rows(head))
        assert (head.weight, head.bias) == cut
        with torch.inference_mode():
            results.append(head(hidden))
        results.append(head.to(CPU)(hidden))  # which puts other parameters in their place
        return seen, torch.stack(results)

    expected = a_head(rows)(torch.ones(2, 4))
    for part, (seen, results) in zip(parts_of, run_ranks(tmp_path, run, ranks=3), strict=True):
        gathered, let_go = [-1, -1], [part, part]
        assert seen == [gathered, let_go, gathered, gathered, gathered, let_go, gathered, gathered]
        assert all(torch.equal(result, expected) for result in results)


def test_it_is_let_go_after_an_error(tmp_path):
    def run():
        head = cut_head()
        cut = local_rows(head)
        head.fails = True
        with pytest.raises(ValueError, match="broken"):
            head(torch.ones(2, 4))
        assert local_rows(head) == cut
        with pytest.raises(ValueError, match="broken"):
            head_log_probs(torch.ones(2, 4, requires_grad=True), head, torch.tensor([1, 2]))
        assert local_rows(head) == cut
        head.fails = False
        return head(torch.ones(2, 4))

    for result in run_ranks(tmp_path, run):
        assert torch.equal(result, a_head()(torch.ones(2, 4)))


def test_nothing_holds_the_whole_until_the_backward_pass(tmp_path):
    def run():
        torch.distributed.init_process_group("gloo")
        head, seen = a_head(), []
        seen.append(weakref.ref(head.weight.untyped_storage()))
        cut_until_used(head, init_device_mesh("cpu", (torch.distributed.get_world_size(),)), CPU)
        head.register_forward_pre_hook(lambda *_: seen.append(weakref.ref(head.weight.untyped_storage())))
        hidden = torch.ones(5, 4, requires_grad=True)
        log_probs, _ = head_log_probs(hidden, head, torch.tensor([1, 2, 0, 3, 1]), chunk_size=2)
        deadline = time.monotonic() + 10  # the thread that has received a tensor lets go of it in its own time
        while any(each() is not None for each in seen) and time.monotonic() < deadline:
            time.sleep(0.01)
        alive = [each() is not None for each in seen]
        log_probs.sum().backward()
        return alive

    assert run_ranks(tmp_path, run) == [[False] * 4] * 2


@pytest.mark.parametrize("grad", [True, False])
def test_one_gather_a_loss_whatever_a_rank_has(tmp_path, monkeypatch, grad):
    """No chunk on the first rank, one on the second, four on the third."""
    monkeypatch.setattr(log_probs_module, "chunk_positions", lambda *_, **__: 2)
    counts, generator = (0, 1, 8), torch.Generator().manual_seed(1)
    hidden = [torch.randn(n, 4, generator=generator, requires_grad=True) for n in counts]
    targets = [torch.randint(0, ROWS, (n,), generator=generator) for n in counts]

    def loss(head, rank):
        with torch.set_grad_enabled(grad):
            log_probs, _ = head_log_probs(hidden[rank], head, targets[rank])
        cut = local_rows(head)
        gradient = torch.autograd.grad(log_probs.sum(), hidden[rank])[0] if grad else torch.zeros(())
        return log_probs.detach(), gradient, cut

    def run():
        gathered, gather = [], parts._whole
        monkeypatch.setattr(parts, "_whole", lambda *args: gathered.append(args[1]) or gather(*args))
        log_probs, gradient, cut = loss(cut_head(), torch.distributed.get_rank())
        return log_probs, gradient, cut, gathered

    for rank, found in enumerate(run_ranks(tmp_path, run, ranks=3)):
        log_probs, gradient, _ = loss(a_head(), rank)
        torch.testing.assert_close(found[0], log_probs)
        torch.testing.assert_close(found[1], gradient)
        assert found[2:] == ([(3, 3, 1)[rank]] * 2, ["weight", "bias"])


def test_what_is_in_no_parts_is_left_alone():
    head = a_head()
    before = head.weight
    with whole(head), whole(lambda hidden: hidden):
        assert head.weight is before
    assert head.weight is before
