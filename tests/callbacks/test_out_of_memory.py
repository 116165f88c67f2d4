"""Out of memory: what did not fit is said, no half-done update is published, and batches stay as they were."""

import logging

import lightning as L
import pytest
import torch
from tiny_models import save_tiny_model
from tiny_run import TinyData, assert_equal, fit_to_exit, tiny_module, tiny_trainer, trained_tensors

from lightning_qlora.callbacks import AdapterCheckpoint, RunGuard
from lightning_qlora.callbacks.run_guard import _out_of_memory_note
from lightning_qlora.checkpoints.publishing import LocalStore
from lightning_qlora.modules.sft import SFTModule


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"))


def checkpoint(root, **kwargs):
    return AdapterCheckpoint(root / "checkpoints", **{"every_n_train_steps": 100, **kwargs})


PLACES = {"training_step": 3, "backward": 3, "optimizer_step": 3, "validation_step": 1}


def hungry(base, place, error=None, at=None):
    """A module that runs out of memory at the n-th call of a hook."""
    calls = []

    def fail(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == (at or PLACES.get(place, 1)):
            raise error or torch.OutOfMemoryError("CUDA out of memory.")
        return getattr(SFTModule, place)(self, *args, **kwargs)

    module = tiny_module(base)
    module.__class__ = type("Hungry", (SFTModule,), {place: fail})
    return module


class Sizes(L.Callback):
    """How many tokens the batches have, and the weights after each step."""

    def __init__(self):
        self.batches, self.weights = [], {}

    def on_train_batch_start(self, trainer, module, batch, index):
        self.batches.append(batch["input_ids"].shape)

    def on_train_batch_end(self, trainer, module, *args):
        self.weights[trainer.global_step] = trained_tensors(module)


@pytest.mark.parametrize("place", PLACES)
def test_out_of_memory_says_what_did_not_fit(base, tmp_path, place, caplog):
    module = hungry(base, place)
    with caplog.at_level(logging.ERROR), pytest.raises(torch.OutOfMemoryError) as raised:
        fit_to_exit(base, tmp_path, RunGuard(), checkpoint(tmp_path, every_n_train_steps=1), module=module)
    note = "".join(raised.value.__notes__)
    assert "tokens, 2 documents of at most" in note
    assert "tokens_per_batch" in note
    assert ("validation" in note.splitlines()[0]) == (place == "validation_step")
    assert note in caplog.text
    expected = 6 if place == "validation_step" else 2
    assert LocalStore(tmp_path / "checkpoints").newest_valid().metadata["step"] == expected


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("place", ["training_step", "backward", "optimizer_step"])
def test_out_of_memory_leaves_no_partial_update_and_the_batches_as_they_were(base, tmp_path, place, accumulate):
    options = {"accumulate_grad_batches": accumulate, "max_epochs": 2}
    whole = Sizes()
    fit_to_exit(base, tmp_path / "calm", whole, checkpoint(tmp_path / "calm"), **options)
    module, sizes = hungry(base, place, at=4), Sizes()
    publish = checkpoint(tmp_path, every_n_train_steps=1, save_on_exception=True)
    with pytest.raises(torch.OutOfMemoryError):
        fit_to_exit(base, tmp_path, sizes, RunGuard(), publish, module=module, **options)
    assert_equal(trained_tensors(module), whole.weights[max(sizes.weights)])
    resumed = Sizes()
    trainer, _, _ = fit_to_exit(base, tmp_path, resumed, RunGuard(), publish, ckpt_path="last", seed=5, **options)
    assert resumed.batches == whole.batches[-len(resumed.batches) :]
    assert_equal(trained_tensors(trainer.lightning_module), whole.weights[max(whole.weights)])


class TornAdamW(torch.optim.AdamW):
    """Runs out of memory in its n-th step, when half of the tensors are updated."""

    def __init__(self, parameters, fails_at):
        super().__init__(parameters, lr=1e-2)
        self.fails_at = fails_at

    def step(self, closure):
        self.fails_at -= 1
        if self.fails_at:
            return super().step(closure)
        with torch.enable_grad():
            closure()
        (group,) = self.param_groups
        for parameter in group["params"][len(group["params"]) // 2 :]:
            parameter.grad = None
        super().step()
        raise torch.OutOfMemoryError("CUDA out of memory.")


class PublishAnyway(L.Callback):
    """What a callback of one's own may try when training fails."""

    def on_exception(self, trainer, module, exception):
        (publish,) = (c for c in trainer.checkpoint_callbacks if isinstance(c, AdapterCheckpoint))
        assert not publish.may_publish_now
        with pytest.raises(RuntimeError, match="step after step 3 is not finished, so there is nothing whole"):
            publish.publish(trainer)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_half_done_update_is_never_published(base, tmp_path, accumulate):
    def run(root, *callbacks, fails_at=0, **options):
        module = tiny_module(base, optimizer=lambda parameters: TornAdamW(parameters, fails_at))
        publish = checkpoint(root, every_n_train_steps=2, save_on_exception=True)
        sizes = Sizes()
        options |= {"max_epochs": 2, "accumulate_grad_batches": accumulate}
        fit_to_exit(base, root, sizes, RunGuard(), publish, *callbacks, module=module, **options)
        return sizes.weights, trained_tensors(module)

    steps, calm = run(tmp_path / "calm")
    seen = {}

    class Torn(L.Callback):
        def on_exception(self, trainer, module, exception):
            seen.update(trained_tensors(module))

    with pytest.raises(torch.OutOfMemoryError) as raised:
        run(tmp_path, Torn(), PublishAnyway(), fails_at=4)
    assert "some tensors in memory may be updated and others not" in "".join(raised.value.__notes__)
    changed = [not torch.equal(tensor, steps[3][name]) for name, tensor in seen.items()]
    assert any(changed)
    assert not all(changed)
    assert [p.metadata["step"] for p in LocalStore(tmp_path / "checkpoints").published()] == [2]
    assert_equal(run(tmp_path, ckpt_path="last", seed=5)[1], calm)


@pytest.mark.parametrize(("stage", "place"), [("test", "test_step"), ("predict", "predict_step")])
def test_out_of_memory_in_other_stages(base, tmp_path, stage, place):
    class Data(TinyData):
        test_dataloader = predict_dataloader = TinyData.val_dataloader

    module = hungry(base, place)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        getattr(tiny_trainer(tmp_path, RunGuard()), stage)(module, datamodule=Data())
    note = "".join(raised.value.__notes__)
    assert f"Out of memory in {stage[:4]}" in note
    assert "tokens, 2 documents" in note
    assert "checkpoint" not in note


def test_out_of_memory_of_a_cpu(base, tmp_path):
    error = RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory")
    with pytest.raises(RuntimeError) as raised:
        fit_to_exit(base, tmp_path, RunGuard(), checkpoint(tmp_path), module=hungry(base, "backward", error))
    assert "Out of memory in training at step 2" in "".join(raised.value.__notes__)


def test_out_of_memory_of_a_gpu_shows_its_memory(base, tmp_path, monkeypatch):
    trainer, _, _ = fit_to_exit(base, tmp_path, max_steps=1)
    figures = {"memory_allocated": 3, "memory_reserved": 5, "max_memory_allocated": 4}
    for name, gib in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, gib=gib: gib * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**29, 8 * 2**30))
    monkeypatch.setattr(type(trainer.strategy), "root_device", torch.device("cuda:0"))
    table = _out_of_memory_note(trainer, {"input_ids": torch.zeros(2, 7)})
    for words in (
        "2 x 7 = 14 tokens",
        "allocated     3.00 GiB",
        "reserved      5.00",
        "free          0.50 GiB of 8.00",
    ):
        assert words in table
