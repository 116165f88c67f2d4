"""Every supported strategy takes, on two ranks, the steps that one device takes on the same batches."""

import functools

import lightning as L
import pytest
import torch
from graph_tape import attend_by_starts, record_on_tape
from peft import LoraConfig
from tiny_adapters import write_adapter
from tiny_models import pack_batch, save_tiny_model
from tiny_preferences import filler_batch, pair_batches, tiny_preference_module
from tiny_ranks import run_ranks
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_qlora.losses import DPOLoss
from lightning_qlora.modules import SFTModule
from lightning_qlora.modules.forward import SupervisedForward
from lightning_qlora.strategies import FSDP2Strategy, QLoRADDPStrategy

pytestmark = pytest.mark.filterwarnings("ignore")  # of the forked processes; nothing here depends on warnings

LENGTHS = (3, 14, 5, 9, 2, 21, 7, 11)
STRATEGIES = {"ddp": QLoRADDPStrategy, "fsdp": FSDP2Strategy}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tied"), tied=True)


def documents():
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 500, (n,), generator=generator) for n in LENGTHS]
    masks = [torch.rand(n, generator=generator) < torch.rand(1, generator=generator) for n in LENGTHS]
    for mask in masks:
        mask[0] = False
        mask[-1] = True
    return ids, masks


def sft_batches(per_batch):
    ids, masks = documents()
    return [pack_batch(ids[i : i + per_batch], masks[i : i + per_batch]) for i in range(0, len(ids), per_batch)]


def sft_filler():
    return pack_batch([torch.tensor([5])], [torch.tensor([False])])


def sft_module(base, **options):
    lora = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options.pop("lora", {})}
    sgd = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.5), "lr_scheduler": None}
    return SFTModule(base, lora=LoraConfig(**lora), untrained_tokens="ignore", **{**sgd, **options})


def dpo_module(base, **options):
    sgd = {"optimizer": lambda params: torch.optim.SGD(params, lr=1.0)}
    return tiny_preference_module(base, loss=DPOLoss(0.5), **{**sgd, **options})


class Ranks(L.LightningDataModule):
    """Rank r of n trains on the micro-batches r, r + n, ...; a rank that has fewer gets fillers."""

    def __init__(self, batches, filler):
        super().__init__()
        self.batches, self.filler = batches, filler

    def train_dataloader(self):
        ranks = self.trainer.world_size
        mine = self.batches[self.trainer.global_rank :: ranks]
        longest = -(-len(self.batches) // ranks)
        return DataLoader(mine + [self.filler] * (longest - len(mine)), batch_size=None)

    def val_dataloader(self):
        return DataLoader(self.batches[:1], batch_size=None)


class Losses(L.Callback):
    def __init__(self):
        self.values, self.norms, self.replays = [], [], 0

    def on_train_batch_end(self, trainer, module, *_):
        self.replays = module.graph_replays
        if "train_loss" in trainer.callback_metrics:
            self.values.append(float(trainer.callback_metrics["train_loss"]))
            self.norms.append(float(trainer.callback_metrics["gradient_norm"]))


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fit(module, data, accumulate=1, **options):
    """Train; return losses, norms of gradients, and the trained tensors, whole."""
    L.seed_everything(0)
    losses = Losses()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, gradient_clip_val=0.05, accumulate_grad_batches=accumulate, callbacks=[losses],
        use_distributed_sampler=False, **options,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    trained = {n: whole(p.detach()) for n, p in module.named_parameters() if p.requires_grad}
    return {"losses": losses.values, "norms": losses.norms, "trained": trained, "replays": losses.replays}


def assert_same_steps(found, expected):
    assert found["losses"][-1] == pytest.approx(expected["losses"][-1], rel=1e-4)
    assert found["norms"][-1] == pytest.approx(expected["norms"][-1], rel=1e-3)
    assert found["trained"].keys() == expected["trained"].keys()
    for name, value in expected["trained"].items():
        torch.testing.assert_close(
            found["trained"][name], value, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


# Micro-batches that are cut unevenly, so that in the last step of an epoch one rank has nothing to learn from.
CASES = {
    "one batch": (sft_module, lambda: sft_batches(4), sft_filler, 1, {}),
    "short window": (sft_module, lambda: sft_batches(1), sft_filler, 3, {}),
    "filler": (sft_module, lambda: sft_batches(3), sft_filler, 1, {}),
    "kept activations": (sft_module, lambda: sft_batches(3), sft_filler, 2, {"activation_checkpointing": "none"}),
    "selective": (sft_module, lambda: sft_batches(3), sft_filler, 2, {"activation_checkpointing": "selective"}),
    "offload": (sft_module, lambda: sft_batches(3), sft_filler, 2, {"activation_checkpointing": "offload"}),
    "auto": (sft_module, lambda: sft_batches(3), sft_filler, 2, {"activation_checkpointing": "auto"}),
    "trained rows": (sft_module, lambda: sft_batches(3), sft_filler, 2, {"lora": {"trainable_token_indices": [7, 9]}}),
    "trained head": (sft_module, lambda: sft_batches(3), sft_filler, 2, {"lora": {"modules_to_save": ["lm_head"]}}),
    "fused adapters": (sft_module, lambda: sft_batches(3), sft_filler, 2, {"fused_lora": True}),
    "preferences": (dpo_module, lambda: pair_batches(2), filler_batch, 2, {}),
}
FAST = [
    ("fused adapters", "fsdp"),
    ("short window", "ddp"),
    ("filler", "fsdp"),
    ("preferences", "ddp"),
    ("preferences", "fsdp"),
]
ALL = [(case, strategy) for case in CASES for strategy in STRATEGIES]


def check(case, strategy, base, folder, **more):
    make, batches, filler, accumulate, options = CASES[case]
    options = options | more
    data = Ranks(batches(), filler())
    # One device takes the whole step of two ranks: twice the micro-batches, in the same order.
    steps = -(-len(data.batches) // (2 * accumulate))
    expected = fit(make(base, **options), data, accumulate=2 * accumulate)
    assert len(set(expected["losses"])) == 3 * steps
    ranks = run_ranks(
        folder,
        lambda: fit(make(base, **options), data, accumulate, devices=2, strategy=STRATEGIES[strategy]()),
    )
    for found in ranks:
        assert_same_steps(found, expected)
    return ranks


@pytest.mark.parametrize(("case", "strategy"), FAST)
def test_two_ranks_take_the_steps_of_one(base, tmp_path, case, strategy):
    check(case, strategy, base, tmp_path)


@pytest.mark.parametrize("case", ["filler", "selective"])
def test_ranks_that_replay_what_they_recorded_take_the_steps_of_one(base, tmp_path, monkeypatch, case):
    attend_by_starts(monkeypatch)
    record = functools.partialmethod(SupervisedForward.record, recorder=record_on_tape)
    monkeypatch.setattr(SupervisedForward, "record", record)
    ranks = check(case, "ddp", base, tmp_path, cuda_graphs=True)
    assert [found["replays"] for found in ranks] == [3 * 2 - 3] * 2  # a rehearsal more after the first validation


@pytest.mark.slow
@pytest.mark.parametrize(("case", "strategy"), sorted({*ALL} - {*FAST}))
def test_two_ranks_take_the_steps_of_one_in_every_case(base, tmp_path, case, strategy):
    check(case, strategy, base, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_shared_embedding_and_head_stay_one(tied, tmp_path, strategy):
    check("trained rows", strategy, tied, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_preferences_from_an_adapter(base, tmp_path, strategy):
    """The reference is a second adapter then, frozen, and switched to in each step."""
    adapter = write_adapter(tmp_path / "adapter", base, task_type="CAUSAL_LM")
    check("preferences", strategy, base, tmp_path / "ranks", adapter=adapter)
