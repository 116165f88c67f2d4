"""Runs on CUDA take the steps of one device, of which one is enough: NCCL with one rank, gloo with two that share it.

    pytest -m gpu tests/strategies/test_devices.py

With two GPUs the same runs over NCCL. On CPUs, where the tests are only slow, it shows that all but CUDA is right.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import digests, save_tiny_model
from tiny_ranks import Processes
from tiny_run import TinyData, tiny_module, tiny_trainer
from torch.distributed.tensor import DTensor

from lightning_qlora.callbacks import AdapterCheckpoint
from lightning_qlora.checkpoints.publishing import LocalStore
from lightning_qlora.strategies import FSDP2Strategy, QLoRADDPStrategy

STEPS = 4
"""Of an epoch; a run has two, and stops between them."""
EXACT = {"dtype": "float32", "attn_implementation": "sdpa"}
STRATEGIES = {"ddp": QLoRADDPStrategy, "fsdp": FSDP2Strategy, "offload": partial(FSDP2Strategy, cpu_offload=True)}


@dataclass(frozen=True)
class Place:
    """Where two ranks run.

    Attributes:
        accelerator: Lightning's name.
        backend: Of torch.distributed between the two; ``None`` chooses by device.
        hosts: Two that are told to be alone on their hosts share a device.
        strategies: Of two ranks. Gloo's collectives of FSDP2 end in a segmentation fault on CUDA tensors (torch 2.11).
    """

    accelerator: str
    backend: str | None
    hosts: int
    strategies: tuple[str, ...] = ("ddp", "fsdp")


def on_gpus(count):
    return [pytest.mark.gpu, pytest.mark.skipif(f"torch.cuda.device_count() < {count}", reason=f"{count} GPUs")]


PLACES = [
    pytest.param(Place("cpu", None, 2), marks=pytest.mark.slow, id="CPU"),
    pytest.param(Place("gpu", "gloo", 2, ("ddp",)), marks=on_gpus(1), id="one GPU"),
    pytest.param(Place("gpu", None, 1), marks=on_gpus(2), id="two GPUs"),
]


class Look(L.Callback):
    """The loss of each optimizer step, and in the end, while all is where it was trained, what is there."""

    def __init__(self, steps):
        self.losses, self.end, self.replays = [0.0] * steps, {}, 0

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.replays = module.graph_replays
        if trainer.global_step > len(self.losses):
            self.losses.append(float(trainer.callback_metrics["train_loss"]))

    def on_train_end(self, trainer, module):
        trained = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
        self.end = {
            "trained": {n: (p.full_tensor() if isinstance(p, DTensor) else p).cpu() for n, p in trained.items()},
            "digests": digests(module.model.get_base_model()),
            "device": module.device.type,
            "replays": self.replays,
            "is_cut": any(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in module.parameters()),
        }


def fit(
    base, root, strategy, *, ranks, hosts, backend, accelerator, epochs, resume=False, precision="32-true", **model
):
    """Train on as many batches a step whatever the ranks are; return what :class:`Look` has seen."""
    L.seed_everything(0)
    look = Look(STEPS * resume)
    trainer = tiny_trainer(
        root, look, AdapterCheckpoint(root / "checkpoints"), max_epochs=epochs, precision=precision,
        accelerator=accelerator, devices=ranks // hosts, num_nodes=hosts, accumulate_grad_batches=2 // ranks,
        strategy="auto" if strategy is None else STRATEGIES[strategy](process_group_backend=backend),
    )  # fmt: skip
    module, data = tiny_module(base, dropout=0.0, lr_scheduler=None, **model), TinyData(batches=2 * STEPS)
    trainer.fit(module, datamodule=data, ckpt_path="last" if resume else None)
    used = torch.distributed.get_backend() if strategy is not None else None
    return {"losses": look.losses, "backend": used, **look.end}


def every_run(base, root, strategies, **where):
    """What one process does: it starts slowly, so that each does all its runs, one after the other."""
    found = {}
    for strategy in strategies:
        run = {"base": base, "strategy": strategy, **where}
        folder = root / str(strategy)
        if strategy is None:
            found["alone"] = fit(root=folder, epochs=2, **EXACT, **run)
            mixed = {"epochs": 2, "precision": "bf16-mixed", "cuda_graphs": False}
            found["alone mixed"] = fit(root=folder / "mixed", **mixed, **run)
            continue
        first = fit(root=folder, epochs=1, **EXACT, **run)
        resumed = fit(root=folder, epochs=2, resume=True, **EXACT, **run)
        found[strategy] = {**resumed, "losses": first["losses"] + resumed["losses"][STEPS:]}
        mixed = {"epochs": 2, "precision": "bf16-mixed", "cuda_graphs": True}
        found[f"{strategy} mixed"] = fit(root=folder / "mixed", **mixed, **run)
        if where["ranks"] == 1:  # each strategy chooses its own backend; two would have to meet at another port
            torch.distributed.destroy_process_group()
    return found


def distance(found, expected):
    """The largest of all tensors, relative."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - tensor).norm() / tensor.norm()) for name, tensor in expected.items())


def differences(strategy, run, mixed, alone, alone_mixed):
    """Say in what a run that stopped and resumed differs from one on one device that did not."""
    assert len(run["losses"]) == len(set(run["losses"])) == 2 * STEPS
    assert len(mixed["losses"]) == 2 * STEPS
    if (mixed["replays"] >= STEPS) != (mixed["device"] == "cuda" and strategy == "ddp"):
        yield f"{mixed['replays']} batches run by CUDA graphs"
    assert len(run["digests"]) == 3 * 7 + 2  # embedding and head
    if run["losses"] != pytest.approx(alone["losses"], rel=1e-3):
        yield f"losses {run['losses']}, not {alone['losses']}"
    if mixed["losses"] != pytest.approx(alone_mixed["losses"], rel=1e-2):
        yield f"losses of mixed precision {mixed['losses']}, not {alone_mixed['losses']}"
    if (far := distance(run["trained"], alone["trained"])) > 1e-3:
        yield f"what is trained, by {far:.1e}"
    if run["digests"] != alone["digests"] or mixed["digests"] != alone_mixed["digests"]:
        yield "bytes of the base"


def own_backend(accelerator, strategy):
    if accelerator == "cpu":
        return "gloo"
    return "cpu:gloo,cuda:nccl" if strategy == "offload" else "nccl"


def published(root, strategy):
    newest = LocalStore(root / strategy / "checkpoints").newest_valid()
    return load_file(Path(newest.path, "adapter_model.safetensors"))


def in_peft(trained):
    return {name.removeprefix("model.").replace(".default", ""): tensor for name, tensor in trained.items()}


@pytest.mark.parametrize("place", PLACES)
def test_runs_that_stop_and_resume_take_the_steps_of_one_device_that_does_not(place, tmp_path):
    base = save_tiny_model(tmp_path / "base", hidden_size=256, intermediate_size=512, num_hidden_layers=3)
    where = {"base": base, "accelerator": place.accelerator}
    alone_there = {"ranks": 1, "hosts": 1, "backend": None}
    one = Processes(__file__, tmp_path / "1", {**where, **alone_there, "strategies": [None, *STRATEGIES]}, ranks=1)
    settings = {**where, "ranks": 2, "hosts": place.hosts, "backend": place.backend, "strategies": place.strategies}
    two = Processes(__file__, tmp_path / "2", settings, ranks=2, hosts=place.hosts)
    failures = one.failures(timeout=200) + two.failures(timeout=60)
    assert not failures, "\n".join(failures)
    ranks = dict(zip(("1", "first of 2", "second of 2"), one.results() + two.results(), strict=True))
    alone = ranks["1"].pop("alone"), ranks["1"].pop("alone mixed")
    device = "cuda" if place.accelerator == "gpu" else "cpu"
    assert alone[0]["device"] == device
    found = []
    for rank, runs in ranks.items():
        for strategy in STRATEGIES if rank == "1" else place.strategies:
            run, own = runs[strategy], own_backend(place.accelerator, strategy)
            ran = run["device"], run["backend"], run["is_cut"]
            expected = device, (rank != "1" and place.backend) or own, rank != "1" and strategy == "fsdp"
            assert ran == expected, (rank, strategy)
            found += [
                f"{strategy}, rank {rank}: {d}" for d in differences(strategy, run, runs[f"{strategy} mixed"], *alone)
            ]
            if distance(published(tmp_path / rank[-1], strategy), in_peft(run["trained"])):
                found.append(f"{strategy}, rank {rank}: what is published")
    assert not found, "\n".join(found)


if __name__ == "__main__":
    import json
    import os

    folder = Path(sys.argv[1])
    torch.save(every_run(root=folder, **json.loads(sys.argv[2])), folder / f"{os.environ['RANK']}.pt")
