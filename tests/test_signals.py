"""Signals on several ranks: nobody waits to be told, and all end at the same micro-batch."""

import types

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tiny_models import save_tiny_model
from tiny_ranks import run_ranks
from tiny_run import TinyData, tiny_module, tiny_trainer

from lightning_qlora.ranks import add_up
from lightning_qlora.signals import _Relay

pytestmark = pytest.mark.filterwarnings("ignore")  # of the forked processes; nothing here depends on warnings


class Between(L.Callback):
    """Lets rank 0 notice SIGTERM where Lightning's loop asks for it next: as it takes a micro-batch."""

    def __init__(self, calls):
        self.calls, self.last = calls, -1

    def on_train_epoch_start(self, trainer, module):
        loop = trainer.fit_loop.epoch_loop
        relay, count = loop._broadcast_sigterm_tensor, 0
        assert isinstance(relay, _Relay)

        def counted():
            nonlocal count
            count += 1
            noticed = trainer.global_rank == 0 and count == self.calls
            trainer._signal_connector.received_sigterm = noticed
            relay()
            trainer._signal_connector.received_sigterm = False  # the loop has another question at the end

        loop._broadcast_sigterm_tensor = counted

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.last = index


def train(base, folder, calls):
    watch = Between(calls)
    trainer = tiny_trainer(folder, watch, max_epochs=1, devices=2, strategy="ddp_qlora", enable_checkpointing=False)
    ended = False
    try:
        trainer.fit(tiny_module(base), datamodule=TinyData(batches=12))
    except SIGTERMException:
        ended = True
    return {"ended": ended, "last": watch.last}


@pytest.mark.parametrize(("calls", "found"), [(3, {"ended": True, "last": 2}), (99, {"ended": False, "last": 5})])
def test_all_ranks_end_at_the_same_micro_batch(calls, found, tmp_path):
    base = save_tiny_model(tmp_path / "base")
    assert run_ranks(tmp_path / "ranks", lambda: train(base, tmp_path, calls)) == [found, found]


def test_an_answer_is_rank_zeros_and_read_one_call_later(tmp_path):
    def calls():
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
        trainer = types.SimpleNamespace(strategy=types.SimpleNamespace(root_device=torch.device("cpu")))
        relay = _Relay(trainer)
        for number in range(10):
            trainer.received_sigterm = rank == 1 or number == 5
            try:
                relay()
            except SIGTERMException:
                return number
        return None

    assert run_ranks(tmp_path, calls) == [6, 6]


def test_sums_are_those_of_all_ranks(tmp_path):
    def sums():
        torch.distributed.init_process_group("gloo")
        return add_up(torch.tensor([1.0, float(torch.distributed.get_rank())]))

    assert torch.equal(add_up(torch.ones(2)), torch.ones(2))
    for found in run_ranks(tmp_path, sums):
        assert found.tolist() == [2.0, 1.0]


@pytest.mark.gpu
def test_a_gpu_that_is_busy_keeps_nobody_waiting(tmp_path):
    store = {"init_method": f"file://{tmp_path / 'store'}", "rank": 0, "world_size": 1}
    torch.distributed.init_process_group("nccl", **store)
    try:
        root = types.SimpleNamespace(root_device=torch.device("cuda", torch.cuda.current_device()))
        trainer = types.SimpleNamespace(received_sigterm=False, strategy=root)
        relay, numbers = _Relay(trainer), torch.ones(2, device=root.root_device)
        relay()
        add_up(numbers)  # now NCCL has begun
        torch.cuda.synchronize()
        torch.cuda._sleep(10**9)  # clock cycles
        is_idle = torch.cuda.Event()
        is_idle.record()
        relay()
        add_up(numbers)
        assert not is_idle.query()
        trainer.received_sigterm = True
        relay()
        with pytest.raises(SIGTERMException):
            relay()
    finally:
        torch.distributed.destroy_process_group()
