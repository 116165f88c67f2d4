"""Recorded decoders: padding that nobody sees, gradients as of single kernels, and what is never recorded."""

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import random_batch, save_tiny_model
from tiny_run import tiny_module, tiny_trainer
from torch.utils.data import DataLoader

from lightning_qlora.kernels.graphs import DecoderGraphs, Form

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@given(LENGTHS, st.none() | st.integers(1, 9000))
def test_a_form_has_room_for_the_documents_it_was_made_for_and_pads_them_to_its_size(lengths, most_tokens):
    form = Form.around(lengths, most_tokens=most_tokens)
    padded = form.padded(lengths)
    assert padded[: len(lengths)] == lengths
    assert (sum(padded), len(padded)) == (form.tokens, form.documents)
    assert max(padded) <= form.longest
    assert (len(set(padded)) == 1) == form.are_alike == (len(set(lengths)) == 1)
    assert max(form.largest()) == form.longest
    assert (sum(form.largest()), len(form.largest())) == (form.tokens, form.documents)
    assert (len(set(form.largest())) == 1) == form.are_alike


@given(LENGTHS, LENGTHS)
def test_a_later_form_has_room_for_what_the_one_before_was_made_for(one, two):
    form = Form.around(two, Form.around(one))
    assert form.padded(two) is not None
    assert form.padded(one) is not None or form.are_alike


def test_where_the_most_tokens_of_a_batch_are_known_no_more_are_padded():
    assert Form.around([700, 290], most_tokens=1000).tokens == 1000
    assert Form.around([700, 290], most_tokens=980).tokens == 1024  # a longer one all the same
    assert Form.around([70, 29], most_tokens=1000).tokens == 128  # most batches are perhaps as short


@pytest.mark.parametrize("lengths", [[40] * 4, [50] * 3, [100], [50, 50, 1]])
def test_documents_of_one_length_are_recorded_as_the_batch_they_are(lengths):
    form = Form.around([50, 50], Form.around([30, 30]))
    assert form.padded([50, 50]) == form.padded([50]) == [50, 50]
    assert form.padded(lengths) is None
    assert not Form.around([50, 50], Form.around([30, 20])).are_alike


def record_on_cpu():
    def record(work):
        found = [None if each is None else each.detach().clone() for each in work()]

        def replay():
            for old, new in zip(found, work(), strict=True):
                if old is not None:
                    old.copy_(new.detach())

        return replay, found

    return record


class Decoder:
    """Adds to each token the mean of its document, which it finds by where documents begin."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(50, 6, generator=generator)
        self.weight = torch.nn.Parameter(torch.randn(6, 6, generator=generator))
        self.unused = torch.nn.Parameter(torch.zeros(3))
        self.calls = 0
        self.extra = lambda hidden, documents: hidden

    def __call__(self, input_ids, position_ids, documents):
        self.calls += 1
        hidden = torch.tanh(self.embedding[input_ids[0]] * (1 + 0.01 * position_ids[0, :, None])) @ self.weight
        owner = torch.bucketize(torch.arange(hidden.shape[0]), documents.starts[1:].long(), right=True)
        alike = (owner[:, None] == owner[None, :]).float()
        hidden = hidden + alike / alike.sum(1, keepdim=True) @ hidden
        return self.extra(hidden, documents)[None]


def graphs_of(decoder):
    return DecoderGraphs(decoder, [decoder.weight, decoder.unused], record_on_cpu)


def batch_of(*lengths, seed=0):
    batch = random_batch(lengths, vocab_size=50, seed=seed)
    return batch["input_ids"], batch["position_ids"], batch["document_lengths"]


def loss_of(hidden):
    return (hidden * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).square().sum()


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
    own = hidden[:, : sum(batch[2])]
    loss_of(own).backward()
    wanted, gradient = expected(decoder, batch)
    torch.testing.assert_close(own.detach(), wanted)
    torch.testing.assert_close(decoder.weight.grad, gradient, rtol=1e-4, atol=1e-4)
    assert decoder.unused.grad is None
    return True


def test_batches_of_many_sizes_are_computed_as_they_are_alone():
    decoder = Decoder()
    graphs = graphs_of(decoder)
    taken = [check(graphs, decoder, batch_of(*lengths)) for lengths in [(30, 20), (31, 9), (25, 25), (1,), (5, 4, 3)]]
    assert taken == [False, True, True, True, True]
    assert graphs.replays == 3
    calls = decoder.calls
    assert not check(graphs, decoder, batch_of(200, 20))  # does not fit
    assert decoder.calls == calls
    taken = [check(graphs, decoder, batch_of(*lengths)) for lengths in [(180, 40), (30, 20), (200, 20), (2, 3, 4, 5)]]
    assert taken == [True] * 4
    assert graphs.replays == 6


def test_parameters_may_change_in_place_and_gradients_add_up():
    decoder = Decoder()
    graphs = graphs_of(decoder)
    for step in range(5):
        check(graphs, decoder, batch_of(30, 20, seed=step))
        with torch.no_grad():
            decoder.weight.add_(0.1)
    one, two = batch_of(30, 20, seed=7), batch_of(10, 20, seed=8)
    decoder.weight.grad = None
    for batch in (one, two):
        loss_of(graphs(*batch)[:, : sum(batch[2])]).backward()
    torch.testing.assert_close(decoder.weight.grad, expected(decoder, one)[1] + expected(decoder, two)[1])


def test_a_parameter_that_is_elsewhere_is_recorded_anew():
    decoder = Decoder()
    graphs = graphs_of(decoder)
    taken = [check(graphs, decoder, batch_of(30, 20)) for _ in range(4)]
    decoder.weight.data = decoder.weight.data.clone() + 1
    taken += [check(graphs, decoder, batch_of(30, 20)) for _ in range(3)]
    assert taken == [False] + [True] * 6
    assert graphs.replays == 4  # a rehearsal in between


def test_a_batch_whose_backward_pass_may_come_is_not_overwritten():
    decoder, batch, other = Decoder(), batch_of(30, 20), batch_of(10, 20, seed=1)
    graphs = graphs_of(decoder)
    for _ in range(3):
        check(graphs, decoder, batch)
    first = graphs(*batch)
    assert graphs(*other) is None
    loss = loss_of(first[:, :50])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        loss.backward()
    assert check(graphs, decoder, other)
    graphs(*batch)  # nobody keeps it
    assert check(graphs, decoder, other)


def test_what_cannot_be_recorded_is_said_once_and_left_alone(capsys):
    refused = {
        "draws random numbers": lambda hidden, documents: torch.nn.functional.dropout(hidden, 0.5),
        "cannot be recorded: .*lengths": lambda hidden, documents: hidden * len(documents.lengths),
    }
    for reason, extra in refused.items():
        decoder = Decoder()
        decoder.extra = extra
        graphs = graphs_of(decoder)
        for _ in range(4):
            graphs(*batch_of(30, 20))
        assert graphs.replays == 0
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(graphs.refusal)


def test_what_a_driver_does_not_record_or_has_no_memory_for_ends_it():
    def recorder():
        raise torch.OutOfMemoryError("CUDA out of memory")

    decoder = Decoder()
    graphs = DecoderGraphs(decoder, [decoder.weight], recorder)
    assert [check(graphs, decoder, batch_of(30, 20)) for _ in range(4)] == [False, True, False, False]
    assert "out of memory" in graphs.refusal


def test_parameters_that_begin_to_be_trained_are_recorded_anew():
    decoder = Decoder()
    decoder.unused.requires_grad_(False)
    decoder.extra = lambda hidden, documents: hidden + decoder.unused.sum()
    graphs = graphs_of(decoder)
    assert graphs(*batch_of(30, 20)) is None
    for is_trained in (False, False, True, True):
        decoder.unused.requires_grad_(is_trained)
        loss_of(graphs(*batch_of(30, 20))).backward()
        assert (decoder.unused.grad is not None) == is_trained
        decoder.unused.grad = None
    assert graphs.replays == 2  # a rehearsal in between


def test_batches_of_ever_other_sizes_end_it():
    decoder = Decoder()
    graphs = graphs_of(decoder)
    for number in range(60):  # three of one length each, which fits no other
        check(graphs, decoder, batch_of(*[5 + number // 3] * 2))
    assert "differ too much" in graphs.refusal
    assert graphs.replays == 8


def test_nothing_is_recorded_without_gradients():
    decoder = Decoder()
    graphs = graphs_of(decoder)
    with torch.no_grad():
        assert all(graphs(*batch_of(30, 20)) is None for _ in range(4))
    assert decoder.calls == 0


# On a GPU


class Data(L.LightningDataModule):
    def __init__(self, lengths):
        super().__init__()
        self.batches = [random_batch(each, vocab_size=100, seed=i) for i, each in enumerate(lengths)]

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)

    def val_dataloader(self):
        return DataLoader(self.batches[:2], batch_size=None)


class Losses(L.Callback):
    def __init__(self):
        self.losses, self.replays = [], 0

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.losses.append(float(outputs["loss"]) / len(batch["targets"]))
        self.replays = module.graph_replays

    def on_validation_epoch_end(self, trainer, module):
        self.losses.append(float(trainer.callback_metrics["val_loss"]))


MIXED = [(50 + 10 * (i % 4), 90 + i, *[7] * (i % 3)) for i in range(14)]
FIRST_TOO_SHORT = [(20, 10), *MIXED]
ALIKE = [(64, 64)] * 10


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("lengths", [MIXED, FIRST_TOO_SHORT, ALIKE], ids=["mixed", "grows", "alike"])
@pytest.mark.parametrize("plan", ["none", "selective", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_recorded_training_is_training(tmp_path, family, plan, lengths, accumulate):
    base, found = save_tiny_model(tmp_path / "base", family), {}
    for graphs in (False, True):
        L.seed_everything(0)
        module = tiny_module(base, dropout=0.0, activation_checkpointing=plan, cuda_graphs=graphs, lr=1e-3)
        watch = Losses()
        options = {"accelerator": "gpu", "precision": "bf16-mixed", "max_epochs": 2}
        trainer = tiny_trainer(tmp_path, watch, accumulate_grad_batches=accumulate, **options)
        trainer.fit(module, datamodule=Data(lengths))
        found[graphs] = watch
    assert found[False].replays == 0
    assert found[True].replays >= 2 * len(lengths) - 6
    assert found[True].losses == pytest.approx(found[False].losses, rel=2e-3)
    assert len({round(loss, 5) for loss in found[True].losses}) > len(lengths)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_with_dropout_a_run_goes_on_without_graphs(tmp_path, capfd):
    module = tiny_module(save_tiny_model(tmp_path / "base"), dropout=0.1, cuda_graphs=True)
    trainer = tiny_trainer(tmp_path, Losses(), accelerator="gpu", precision="bf16-mixed", max_epochs=1)
    trainer.fit(module, datamodule=Data(MIXED))
    assert trainer.global_step == len(MIXED)
    assert trainer.callbacks[0].replays == 0
