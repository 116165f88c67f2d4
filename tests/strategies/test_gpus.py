"""What only two GPUs can show: bytes, equality over NCCL, memory of each device. Run with ``pytest -m gpu``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from tiny_models import save_tiny_model
from tiny_run import TinyData, tiny_module, tiny_trainer

from lightning_qlora.callbacks import RunGuard
from lightning_qlora.strategies import FSDP2Strategy

ROOT = Path(__file__).parents[2]
SCALING = ROOT / "examples" / "benchmark" / "scaling.py"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("torch.cuda.device_count() < 2"),
    pytest.mark.filterwarnings("ignore"),
]
GIB = 2**30


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Of 100 MB in four bits, so that what is sharded outweighs what is not."""
    size = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 8}
    return save_tiny_model(tmp_path_factory.mktemp("base"), **size)


class Watch(L.Callback):
    def __init__(self):
        self.losses, self.peak, self.held, self.loading = [], 0, 0, 0

    def on_fit_start(self, trainer, module):
        torch.mm(*2 * [torch.ones(64, 64, device=module.device)])  # now there is the workspace of cuBLAS, 32 MiB
        torch.cuda.empty_cache()
        self.held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.losses.append(float(trainer.callback_metrics["train_loss"]))
        self.peak = torch.cuda.max_memory_allocated()


def note_peak(watch, load_base):
    """Load, and note what that took; the kernels that are tried out afterwards take more, sharded or not."""

    def load(device):
        model = load_base(device)
        watch.loading = torch.cuda.max_memory_allocated()
        return model

    return load


def train(base, root, strategy, precision="32-true", offload=False, accelerator="gpu", batches=100):
    """What each rank does, in a process of its own: one that has used a GPU cannot be forked."""
    L.seed_everything(0)
    watch = Watch()
    module = tiny_module(base, dropout=0.0, lr=1e-3, activation_checkpointing="full")
    module.load_base = note_peak(watch, module.load_base)
    trainer = tiny_trainer(
        Path(root), watch, RunGuard(), accelerator=accelerator, devices=2, precision=precision, max_epochs=1,
        strategy=FSDP2Strategy(cpu_offload=True) if offload else strategy, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=TinyData(batches=batches))
    return {"losses": watch.losses, "peak": watch.peak, "held": watch.held, "loading": watch.loading}


def ranks(folder, base, strategy, **options):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    command.append(json.dumps({"base": base, "root": str(folder), "strategy": strategy, **options}))
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def ddp(base, tmp_path_factory):
    return ranks(tmp_path_factory.mktemp("ddp"), base, "ddp_qlora")


@pytest.mark.parametrize("offload", [False, True])
def test_fifty_steps_of_fsdp_are_those_of_ddp(base, ddp, tmp_path, offload):
    sharded = ranks(tmp_path, base, "fsdp_qlora", offload=offload)
    for found, expected in zip(sharded, ddp, strict=True):
        assert len(found["losses"]) == 50
        assert found["losses"][0] == pytest.approx(expected["losses"][0], rel=1e-3)
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-2)
        assert found["held"] < (0.3 if offload else 0.7) * expected["held"]
        assert found["peak"] < expected["peak"]
        assert found["loading"] < 0.8 * expected["loading"]  # no room is taken beforehand for all


def test_mixed_precision_over_nccl(base, tmp_path):
    found = {s: ranks(tmp_path / s, base, s, precision="bf16-mixed")[0] for s in ("ddp_qlora", "fsdp_qlora")}
    assert found["fsdp_qlora"]["losses"] == pytest.approx(found["ddp_qlora"]["losses"], rel=1e-2)


def scale(*options, out):
    command = [sys.executable, str(SCALING), "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_ddp_scales(tmp_path):
    """The 8B shape: at least 97 % of twice one GPU's speed."""
    records = scale("--only", "ddp", "--devices", "1", "2", "--no-resume", out=tmp_path / "ddp.jsonl")
    rates = [record["tokens_per_second"] for record in records]
    for one, two in zip(rates[::2], rates[1::2], strict=True):
        assert two >= 0.97 * 2 * one


def test_a_70b_shape_trains_on_two(tmp_path):
    records = scale("--only", "fsdp", "--devices", "2", "--tokens_per_batch", "2048", out=tmp_path / "fsdp.jsonl")
    capacity = torch.cuda.get_device_properties(0).total_memory / GIB
    assert max(records[0]["peak_memory_gib"]) < capacity
    assert records[-1]["optimizer_steps"] > records[-2]["optimizer_steps"]  # went on where it was published


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    Path(settings["root"], f"{os.environ['RANK']}.json").write_text(json.dumps(train(**settings)))
