"""On a GPU: recorded runs are the runs without, also where a driver refuses to record them."""

import lightning as L
import pytest
import torch
from tiny_models import random_batch, save_tiny_model
from tiny_run import tiny_module, tiny_trainer
from torch.utils.data import DataLoader


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
    assert found[True].replays >= 2 * len(lengths) - 8
    assert found[True].losses == pytest.approx(found[False].losses, rel=2e-3)
    assert len({round(loss, 5) for loss in found[True].losses}) > len(lengths)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_a_small_model_is_recorded_unasked(tmp_path):
    module, watch = tiny_module(save_tiny_model(tmp_path / "base"), dropout=0.0), Losses()
    tiny_trainer(tmp_path, watch, accelerator="gpu", precision="bf16-mixed", max_epochs=1).fit(
        module, datamodule=Data(MIXED)
    )
    assert watch.replays >= len(MIXED) - 8


def fit_on_gpu(folder, base, *callbacks, **options):
    L.seed_everything(0)
    watch = Losses()
    trainer = tiny_trainer(folder, *callbacks, watch, accelerator="gpu", precision="bf16-mixed", max_epochs=1)
    trainer.fit(tiny_module(base, dropout=0.0, lr=1e-3, **options), datamodule=Data(MIXED))
    return watch


class WaitBehind(torch.autograd.Function):
    """Waits for the GPU: in a forward pass torch notices that of streams, but not of events."""

    @staticmethod
    def forward(ctx, hidden, way):
        ctx.way = way
        if way == "stream":
            torch.cuda.current_stream().synchronize()
        if way == "event":
            event = torch.cuda.Event()
            event.record()
            event.synchronize()
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.way == "backward":
            torch.cuda.current_stream().synchronize()
        return gradient, None


class Waiting(L.Callback):
    def __init__(self, way):
        self.way = way

    def on_train_start(self, trainer, module):
        norm = module.model.get_base_model().get_decoder().norm
        plain = norm.forward
        norm.forward = lambda hidden: WaitBehind.apply(plain(hidden), self.way)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("graphs", ["auto", True])
@pytest.mark.parametrize("way", ["stream", "event", "backward"])
def test_a_run_outlives_a_recording_that_its_driver_refuses(tmp_path, way, graphs, caplog):
    base = save_tiny_model(tmp_path / "base")
    plain = fit_on_gpu(tmp_path, base, cuda_graphs=False)
    found = fit_on_gpu(tmp_path, base, Waiting(way), cuda_graphs=graphs)
    said = "not used, the model decides by numbers" if way == "stream" else "not used, recording failed"
    assert (said in caplog.text) == (graphs is True)
    assert found.replays == 0
    assert found.losses == pytest.approx(plain.losses, rel=2e-3)
    assert torch.rand(3, device="cuda").unique().numel() == 3  # nobody waits for the end of a recording
    assert torch.ones(3).pin_memory().cuda(non_blocking=True).sum() == 3
    again = fit_on_gpu(tmp_path, base, cuda_graphs=True)  # in the same process
    assert again.replays >= len(MIXED) - 8
    assert again.losses == pytest.approx(plain.losses, rel=2e-3)


KINDS = {
    "eight bits": {"quantization": "int8"},
    "sixteen bits": {"quantization": None, "dtype": "bfloat16"},
    "DoRA": {"lora": {"use_dora": True}},
    "rank-stabilised, of few layers": {"lora": {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]}},
    "plain PEFT": {"fused_lora": False, "fused_elementwise": False},
    "a trained head": {"lora": {"modules_to_save": ["lm_head", "embed_tokens"]}},
    "trained rows": {"lora": {"trainable_token_indices": [7, 9]}},
    "transformers' attention": {"attn_implementation": "sdpa"},
}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_other_models_are_trained_unasked_as_without(tmp_path, kind):
    base = save_tiny_model(tmp_path / "base")
    plain, found = (fit_on_gpu(tmp_path, base, cuda_graphs=graphs, **KINDS[kind]) for graphs in (False, "auto"))
    assert plain.replays == 0
    assert found.losses == pytest.approx(plain.losses, rel=2e-3)
    assert len({round(loss, 5) for loss in found.losses}) > len(MIXED) - 1


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_with_dropout_a_run_goes_on_without_graphs(tmp_path, capfd):
    module = tiny_module(save_tiny_model(tmp_path / "base"), dropout=0.1, cuda_graphs=True)
    trainer = tiny_trainer(tmp_path, Losses(), accelerator="gpu", precision="bf16-mixed", max_epochs=1)
    trainer.fit(module, datamodule=Data(MIXED))
    assert trainer.global_step == len(MIXED)
    assert trainer.callbacks[0].replays == 0
