"""Recorded decoders: padding that nobody sees, gradients as of single kernels, and what is never recorded."""

import copy
import random

import lightning as L
import numpy as np
import pytest
import torch
from graph_tape import attend_by_starts, record_on_tape
from peft import LoraConfig
from tiny_models import random_batch, save_tiny_model
from tiny_run import tiny_module

from lightning_qlora.kernels.graphs import DecoderGraphs


class Decoder(torch.nn.Module):
    """Adds to each token the mean of its document, which it finds by where documents begin."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(50, 6, generator=generator)
        self.weight = torch.nn.Parameter(torch.randn(6, 6, generator=generator))
        self.unused = torch.nn.Parameter(torch.zeros(3))
        self.calls = 0
        self.extra = lambda hidden, documents: hidden

    def forward(self, input_ids, position_ids, documents):
        self.calls += 1
        hidden = torch.tanh(self.embedding[input_ids[0]] * (1 + 0.01 * position_ids[0, :, None])) @ self.weight
        owner = torch.bucketize(torch.arange(hidden.shape[0]), documents.starts[1:].long(), right=True)
        alike = (owner[:, None] == owner[None, :]).float()
        hidden = hidden + alike / alike.sum(1, keepdim=True) @ hidden
        return self.extra(hidden, documents)[None]


def graphs_of(decoder, **options):
    return DecoderGraphs(decoder, decoder, recorder=record_on_tape, **options)


def batch_of(*lengths, seed=0):
    batch = random_batch(lengths, vocab_size=50, seed=seed)
    return batch["input_ids"], batch["position_ids"], batch["document_lengths"]


def loss_of(hidden):
    return (hidden * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).square().sum()


def loss_of_tokens(hidden, batch):
    return loss_of(hidden[:, : sum(batch[2])])


def expected(decoder, batch):
    """Run a batch document by document."""
    found, start = [], 0
    for length in batch[2]:
        part = slice(start, start + length)
        documents = type("Documents", (), {"starts": torch.tensor([0, length])})
        found.append(decoder(batch[0][:, part], batch[1][:, part], documents))
        start += length
    hidden = torch.cat(found, 1)
    (gradient,) = torch.autograd.grad(loss_of(hidden), decoder.weight)
    return hidden.detach(), gradient


def check(graphs, decoder, batch):
    """Run a batch, compare, and return whether graphs took it."""
    decoder.weight.grad = None
    hidden = graphs(*batch)
    if hidden is None:
        return False
    loss_of_tokens(hidden, batch).backward()
    wanted, gradient = expected(decoder, batch)
    torch.testing.assert_close(hidden.detach()[:, : sum(batch[2])], wanted)
    torch.testing.assert_close(decoder.weight.grad, gradient, rtol=1e-4, atol=1e-4)
    assert decoder.unused.grad is None
    return True


def recorded(**options):
    """Return a decoder and graphs that have recorded it."""
    decoder = Decoder()
    graphs = graphs_of(decoder, **options)
    assert [check(graphs, decoder, batch_of(70, 20)) for _ in range(3)] == [False, True, True]
    assert graphs.replays == 1
    return decoder, graphs


def test_batches_of_many_sizes_are_computed_as_they_are_alone():
    decoder, graphs = recorded()
    calls = decoder.calls
    sizes = [(31, 35), (25, 41), (70,), (22, 22, 22), (3, 61), (128,)]
    for i, lengths in enumerate(sizes[:-1]):
        assert check(graphs, decoder, batch_of(*lengths, seed=i))
    assert graphs.replays == len(sizes)
    assert decoder.calls == calls + sum(map(len, sizes[:-1]))  # by the comparison alone
    taken = [check(graphs, decoder, batch_of(*lengths)) for lengths in [(200, 20), (180, 40), (90, 50), (200, 20)]]
    assert taken == [False, True, True, True]
    assert graphs.replays == len(sizes) + 2


def test_lengths_may_be_numbers_of_any_kind():
    decoder, graphs = recorded()
    ids, positions, lengths = batch_of(70, 20)
    for kind in (np.array, torch.tensor):
        assert check(graphs, decoder, (ids, positions, kind(lengths)))
    graphs.release()
    graphs._form = None
    assert not check(graphs, decoder, (ids, positions, np.array(lengths)))
    assert check(graphs, decoder, (ids, positions, np.array(lengths)))


def test_a_batch_that_would_be_padding_for_the_most_part_is_run_as_it_is():
    decoder = Decoder()
    graphs = graphs_of(decoder)
    taken = [check(graphs, decoder, batch_of(*lengths)) for lengths in [(300, 90), (300, 90), (100, 20), (250, 9)]]
    assert taken == [False, True, False, True]


def test_nothing_of_a_batch_is_left_for_the_next():
    """Neither positions, by whose largest some models choose frequencies, nor hidden states that are not finite."""
    decoder = Decoder()
    decoder.embedding[49] = torch.nan
    graphs = graphs_of(decoder)
    good, bad = batch_of(40, 30), batch_of(40, 60)
    for ids in (good[0], bad[0]):
        ids[ids == 49] = 48
    bad[0][0, -5:] = 49
    largest = []
    decoder.register_buffer("seen", torch.zeros(()))

    def run(ids, positions, documents):
        decoder.seen.copy_(positions.max())
        return decoder(ids, positions, documents)

    graphs.run = run
    for batch in (bad, bad, bad, good):
        decoder.weight.grad = None
        hidden = graphs(*batch)
        if hidden is not None:
            loss_of_tokens(hidden, batch).backward()
            largest.append((float(decoder.seen), bool(decoder.weight.grad.isfinite().all())))
    assert largest == [(59, False), (59, False), (39, True)]
    assert graphs.replays == 2


def test_parameters_may_change_in_place_and_gradients_add_up():
    decoder, graphs = recorded()
    for step in range(5):
        with torch.no_grad():
            decoder.weight.add_(0.1)
        assert check(graphs, decoder, batch_of(40, 30, seed=step))
    one, two = batch_of(40, 30, seed=7), batch_of(40, 28, seed=8)
    decoder.weight.grad = None
    for batch in (one, two):
        loss_of_tokens(graphs(*batch), batch).backward()
    torch.testing.assert_close(decoder.weight.grad, expected(decoder, one)[1] + expected(decoder, two)[1])


def test_gradients_that_are_kept_are_not_written_over():
    decoder, graphs = recorded()
    batches = [batch_of(40, 30, seed=seed) for seed in (1, 2)]
    kept = [torch.autograd.grad(loss_of_tokens(graphs(*batch), batch), decoder.weight)[0] for batch in batches]
    for gradient, batch in zip(kept, batches, strict=True):
        torch.testing.assert_close(gradient, expected(decoder, batch)[1])


def test_hooks_of_parameters_are_called_once():
    decoder = Decoder()
    decoder.weight.register_hook(lambda gradient: gradient * 0.5)
    graphs = graphs_of(decoder)
    batch = batch_of(40, 30)
    for _ in range(4):
        decoder.weight.grad = None
        hidden = graphs(*batch)
        if hidden is not None:
            loss_of_tokens(hidden, batch).backward()
            torch.testing.assert_close(decoder.weight.grad, expected(decoder, batch)[1])  # has the hook as well
    assert graphs.replays == 2


CHANGES = {
    "trained elsewhere": lambda decoder: setattr(decoder.weight, "data", decoder.weight.data.clone() + 1),
    "frozen elsewhere": lambda decoder: setattr(decoder.unused, "data", decoder.unused.data.clone() + 1),
    "another parameter": lambda decoder: setattr(
        decoder, "weight", torch.nn.Parameter(decoder.weight.detach().clone() + 1)
    ),
    "another adapter": lambda decoder: vars(decoder).__setitem__("state", "other"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_what_was_recorded_is_recorded_anew(change):
    decoder, graphs = recorded()
    graphs.state = lambda: vars(decoder).get("state")
    graphs.release()
    taken = [check(graphs, decoder, batch_of(40, 20)) for _ in range(2)]
    CHANGES[change](decoder)
    taken += [check(graphs, decoder, batch_of(40, 20)) for _ in range(3)]
    assert taken == [True] * 5
    assert graphs.replays == 1 + 1 + 2  # with a rehearsal each


def test_parameters_that_begin_to_be_trained_are_recorded_anew():
    decoder = Decoder()
    decoder.extra = lambda hidden, documents: hidden + decoder.unused.sum()
    graphs = graphs_of(decoder)
    batch = batch_of(40, 30)
    assert graphs(*batch) is None
    for is_trained in (False, False, True, True):
        decoder.unused.requires_grad_(is_trained)
        loss_of_tokens(graphs(*batch), batch).backward()
        assert (decoder.unused.grad is not None) == is_trained
        decoder.unused.grad = None
    assert graphs.replays == 2  # a rehearsal in between


def test_a_batch_whose_backward_pass_may_come_is_not_overwritten():
    decoder, graphs = recorded()
    batch, other = batch_of(40, 20), batch_of(50, 20, seed=1)
    first = graphs(*batch)
    assert graphs(*other) is None
    loss = loss_of_tokens(first, batch)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        loss.backward()
    assert check(graphs, decoder, other)
    graphs(*batch)  # nobody keeps it
    assert check(graphs, decoder, other)


def test_nothing_is_overwritten_that_an_earlier_backward_pass_needs():
    """Not before a recording is made either, where a loss is of several batches."""
    decoder = Decoder()
    decoder.table = torch.nn.Parameter(torch.zeros(50, 6))

    def run(ids, positions, documents):
        return decoder(ids, positions, documents) + torch.nn.functional.embedding(ids, decoder.table)  # keeps the ids

    graphs = DecoderGraphs(run, decoder, recorder=record_on_tape, pace=Pace)
    batches = [batch_of(40, 30, seed=seed) for seed in range(4)]
    assert graphs(*batches[0]) is None
    sum(loss_of_tokens(graphs(*batch), batch) for batch in batches).backward()
    assert graphs.replays == 1
    gradients = [expected(decoder, batch)[1] for batch in batches]
    torch.testing.assert_close(decoder.weight.grad, sum(gradients), rtol=1e-4, atol=1e-4)


class Pace:
    """Stands in for what times batches."""

    is_slow, seen = True, 0

    def __init__(self):
        self.times = 0

    def __enter__(self):
        self.times += 1
        Pace.seen += 1

    def __exit__(self, *_):
        pass

    @property
    def is_known(self):
        return self.times == 2

    def host_is_slow(self):
        return self.is_slow

    def __str__(self):
        return "3 ms beside 2"


@pytest.mark.parametrize("is_slow", [True, False])
def test_where_the_gpu_is_what_is_slow_nothing_is_recorded(monkeypatch, is_slow, caplog):
    monkeypatch.setattr(Pace, "is_slow", is_slow)
    monkeypatch.setattr(Pace, "seen", 0)
    decoder = Decoder()
    graphs = graphs_of(decoder, pace=Pace)
    taken = [check(graphs, decoder, batch_of(70, 20)) for _ in range(6)]
    assert taken == [False, True, True, True, is_slow, is_slow]
    assert Pace.seen == 2  # after the first in that form, which compiles kernels
    assert graphs.replays == 2 * is_slow
    assert graphs.refusal == (None if is_slow else "the GPU is what is slow: 3 ms beside 2")
    assert caplog.text.count("3 ms beside 2") == 1


def test_each_size_is_timed():
    decoder = Decoder()
    graphs = graphs_of(decoder, pace=Pace)
    for _ in range(6):
        check(graphs, decoder, batch_of(70, 20))
    before = Pace.seen
    taken = [check(graphs, decoder, batch_of(300, 20)) for _ in range(6)]
    assert taken == [False, True, True, True, True, True]
    assert graphs.replays == 2 + 2
    assert Pace.seen == before + 2


def test_a_gradient_of_a_gradient_is_refused_and_not_silently_nothing():
    decoder, graphs = recorded()
    with pytest.raises(RuntimeError, match="gradient of a gradient"):
        torch.autograd.grad(graphs(*batch_of(40, 20)).sum(), decoder.weight, create_graph=True)


def test_what_decides_by_lengths_is_left_alone():
    decoder = Decoder()
    decoder.extra = lambda hidden, documents: hidden * len(documents.lengths)
    graphs = graphs_of(decoder)
    assert [graphs(*batch_of(40, 20)) for _ in range(4)] == [None] * 4
    assert "cannot be recorded" in graphs.refusal
    assert "lengths" in graphs.refusal


@pytest.mark.parametrize("source", [torch.rand, lambda n: random.random(), lambda n: np.random.rand()])
def test_what_draws_random_numbers_is_left_alone_and_draws_what_it_would_have(source):
    decoder, plain = Decoder(), []
    decoder.extra = lambda hidden, documents: hidden * (1 + float(source(1)))
    for graphs in (None, graphs_of(decoder)):
        L.seed_everything(1)
        for _ in range(4):
            batch = batch_of(40, 20)
            hidden = None if graphs is None else graphs(*batch)
            assert hidden is None
            documents = type("Documents", (), {"starts": torch.tensor([0, 40, 60])})
            plain.append(decoder(batch[0], batch[1], documents).sum().item())
    assert plain[:4] == plain[4:]
    assert len(set(plain[:4])) == 4
    assert "random" in graphs.refusal


def test_what_has_no_memory_is_left_alone():
    decoder = Decoder()

    def extra(hidden, documents):
        if hidden.shape[0] > 60:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden

    decoder.extra = extra
    graphs = graphs_of(decoder)
    assert [check(graphs, decoder, batch_of(40, 20)) for _ in range(3)] == [False] * 3
    assert "out of memory" in graphs.refusal


def test_what_a_driver_does_not_record_ends_it():
    def recorder():
        raise torch.OutOfMemoryError("CUDA out of memory")

    decoder = Decoder()
    graphs = DecoderGraphs(decoder, decoder, recorder=recorder)
    assert [check(graphs, decoder, batch_of(40, 20)) for _ in range(4)] == [False, True, False, False]
    assert "out of memory" in graphs.refusal
    assert decoder.weight is dict(decoder.named_parameters())["weight"]


@pytest.mark.parametrize("place", ["inside", "outside", "everywhere"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_modules_end_it(place, when):
    outer = torch.nn.Identity()
    decoder = Decoder()
    graphs = graphs_of(decoder, outer=[outer])
    register = {
        "inside": decoder.register_forward_hook,
        "outside": outer.register_forward_pre_hook,
        "everywhere": torch.nn.modules.module.register_module_forward_hook,
    }[place]
    taken = [check(graphs, decoder, batch_of(40, 20)) for _ in range(3 * (when == "after"))]
    handle = register(lambda *_: None)
    taken += [check(graphs, decoder, batch_of(40, 20)) for _ in range(3)]
    handle.remove()
    assert taken == [False, *([True, True] if when == "after" else []), *[False] * (3 if when == "after" else 2)]
    assert "hooks" in graphs.refusal


def test_a_recording_that_loses_a_gradient_is_not_used():
    decoder = Decoder()
    held = decoder.weight
    decoder.extra = lambda hidden, documents: hidden @ held  # not by the module's name for it
    del decoder.weight
    decoder.weight = torch.eye(6)
    decoder.other = held
    graphs = graphs_of(decoder)
    for _ in range(3):
        hidden = graphs(*batch_of(40, 20))
        if hidden is not None:
            hidden.sum().backward()
    assert graphs.replays == 0
    assert "no parameter of its modules" in graphs.refusal


def test_what_is_kept_elsewhere_loses_no_gradient_either():
    """As nn.LSTM keeps its weights in a list: what it uses is not what a recording puts in their places."""
    decoder = Decoder()
    kept = [decoder.weight]
    decoder.extra = lambda hidden, documents: hidden @ kept[0]
    graphs = graphs_of(decoder)
    assert [check(graphs, decoder, batch_of(40, 20)) for _ in range(3)] == [False, True, False]
    assert "no parameter of its modules" in graphs.refusal


def test_where_nothing_is_trained_yet_it_is_recorded_later():
    decoder = Decoder()
    graphs = graphs_of(decoder)
    decoder.weight.requires_grad_(False)
    decoder.unused.requires_grad_(False)
    assert all(graphs(*batch_of(40, 20)) is None or not graphs.replays for _ in range(4))
    decoder.weight.requires_grad_(True)
    assert [check(graphs, decoder, batch_of(40, 20)) for _ in range(3)] == [True] * 3
    assert graphs.replays == 2


def test_batches_of_ever_other_sizes_end_it():
    decoder = Decoder()
    graphs = graphs_of(decoder)
    for number in range(60):  # three of one length each, which fits no other
        check(graphs, decoder, batch_of(*[5 + number // 3] * 2))
    assert "again and again" in graphs.refusal
    assert graphs.replays == 8


def test_nothing_is_recorded_without_gradients():
    decoder = Decoder()
    graphs = graphs_of(decoder)
    with torch.no_grad():
        assert all(graphs(*batch_of(40, 20)) is None for _ in range(4))
    assert decoder.calls == 0


# Whole models


def gradients(module, batch):
    module.zero_grad()
    loss = module.token_loss(batch)
    loss.loss_sum.backward()
    return loss.loss_sum.item(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def compare(module, batch):
    """Return how far the gradients of a recording are from those without."""
    forward = module._supervised_forward
    loss, found = gradients(module, batch)
    graphs, forward.graphs = forward.graphs, None
    plain_loss, plain = gradients(module, batch)
    forward.graphs = graphs
    assert found.keys() == plain.keys()
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    return max(float((found[name] - plain[name]).norm() / (plain[name].norm() + 1e-9)) for name in plain)


def build(folder, family="llama", lora=None, plan="none", **model):
    base = save_tiny_model(folder, family, **model)
    options = {"dropout": 0.0, "lora": lora, "activation_checkpointing": plan, "untrained_tokens": "ignore"}
    module = tiny_module(base, dtype="float32", **options)
    module.configure_model()
    module.train()
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    module._supervised_forward.record(True, plan, recorder=record_on_tape)
    return module


def rows(*lengths, seed=0):
    return random_batch(lengths, vocab_size=100, seed=seed)


SIZES = [(12, 70, 9), (25, 31, 30), (40, 30, 9), (80,), (30, 20, 15), (64, 10), (33, 33, 33)]
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "lora"),
    [
        ({}, {}),
        ({"plan": "selective"}, {}),
        ({"plan": "full"}, {"use_dora": True}),
        ({"family": "gemma3_text", "plan": "full"}, {}),
        ({"family": "qwen3"}, {"use_rslora": True}),
        ({"tied": True}, {"trainable_token_indices": [5, 6, 7]}),
        ({}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ({"family": "phi3", "rope_parameters": LONGROPE, "original_max_position_embeddings": 32,
          "sliding_window": None}, {}),
    ],
    ids=["llama", "selective", "full, DoRA", "gemma3, full", "qwen3, rsLoRA", "tokens, tied", "modules", "longrope"],
)  # fmt: skip
def test_models_have_the_gradients_of_single_kernels(tmp_path, monkeypatch, options, lora):
    attend_by_starts(monkeypatch)
    module = build(tmp_path, lora=lora, **options)
    distances = [compare(module, rows(*lengths, seed=i)) for i, lengths in enumerate(SIZES)]
    assert max(distances) < 1e-4
    assert module.graph_replays == len(SIZES) - 2
    assert module._supervised_forward.graphs.refusal is None


def test_adapters_may_be_scaled_added_and_switched(tmp_path, monkeypatch):
    attend_by_starts(monkeypatch)
    module = build(tmp_path)
    batches = [rows(40, 30, seed=seed) for seed in range(4)]

    def check_all():
        before = module.graph_replays
        assert max(compare(module, batch) for batch in batches) < 1e-4
        return module.graph_replays - before

    assert check_all() == 2
    for each in module.model.modules():
        if isinstance(vars(each).get("scaling"), dict):
            each.scaling["default"] *= 0.1
    assert check_all() == 3
    module.model.add_adapter("second", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    module.model.base_model.set_adapter(["default", "second"])
    check_all()
    module.model.set_adapter("second")
    check_all()
    assert module._supervised_forward.graphs.refusal is None


def test_a_copy_has_graphs_of_its_own(tmp_path, monkeypatch):
    attend_by_starts(monkeypatch)
    module = build(tmp_path)
    for seed in range(3):
        compare(module, rows(40, 30, seed=seed))
    forward = copy.copy(module._supervised_forward)
    assert module._supervised_forward.graphs.replays == 1
    assert forward.graphs is None
