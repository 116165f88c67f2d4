"""However a batch is cut into micro-batches and ranks, the optimizer sees the same gradient."""

import lightning as L
import pytest
import torch
from peft import LoraConfig
from tiny_models import pack_batch, pad_batch, save_tiny_model
from torch.utils.data import DataLoader

from lightning_qlora.modules import SFTModule

LENGTHS = (3, 14, 5, 9, 2, 21, 7, 11)  # ragged on purpose: a mean of means is off by over 20 % here


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"))


def documents():
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 500, (n,), generator=generator) for n in LENGTHS]
    masks = [torch.rand(n, generator=generator) < torch.rand(1, generator=generator) for n in LENGTHS]
    for mask in masks:
        mask[0] = False
        mask[-1] = True
    return ids, masks


def micro_batches(per_batch, collate=pack_batch):
    ids, masks = documents()
    starts = range(0, len(ids), per_batch)
    return [collate(ids[i : i + per_batch], masks[i : i + per_batch]) for i in starts]


class Recorder(L.Callback):
    """Keeps the loss that is logged for each optimizer step, and at the end the trained tensors of rank 0."""

    def __init__(self, path=None):
        self.losses, self.path = [], path

    def on_train_batch_end(self, trainer, *_):
        if "train_loss" in trainer.callback_metrics:
            self.losses.append(float(trainer.callback_metrics["train_loss"]))

    def on_train_end(self, trainer, pl_module):
        if self.path is not None and trainer.is_global_zero:
            trained = {n: p.detach() for n, p in pl_module.named_parameters() if p.requires_grad}
            torch.save({"trained": trained, "losses": self.losses}, self.path)


class SeedAll(L.Callback):
    """The adapters of every rank begin alike, as seed_everything makes them."""

    def setup(self, trainer, pl_module, stage):
        torch.manual_seed(0)


class Ranks(L.LightningDataModule):
    """Rank r of n trains on the micro-batches r, r + n, ...; a rank that has fewer gets one without targets."""

    def __init__(self, batches, filler):
        super().__init__()
        self.batches, self.filler = batches, filler

    def train_dataloader(self):
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        mine = self.batches[rank::ranks]
        longest = -(-len(self.batches) // ranks)
        return DataLoader(mine + [self.filler] * (longest - len(mine)), batch_size=None)


def train(base, batches, accumulate, **options):
    torch.manual_seed(0)
    recorder = Recorder()
    module = SFTModule(
        base,
        lora=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        lr_scheduler=None,
    )
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, accumulate_grad_batches=accumulate, callbacks=[recorder], **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}, recorder


def assert_same(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize(
    ("per_batch", "accumulate", "collate"),
    [
        (1, 8, pack_batch),
        (2, 4, pack_batch),
        (4, 2, pad_batch),
        (8, 1, pad_batch),
        (1, 16, pack_batch),
        (3, 3, pack_batch),
    ],
    ids=["1x8", "2x4", "padded4x2", "padded8", "short-window", "ragged-window"],
)
def test_micro_batches_and_packing_do_not_change_the_step(base, per_batch, accumulate, collate, clip):
    expected, one = train(base, micro_batches(8), 1, gradient_clip_val=clip)
    found, cut = train(base, micro_batches(per_batch, collate), accumulate, gradient_clip_val=clip)
    assert_same(found, expected)
    assert cut.losses[-1] == pytest.approx(one.losses[-1], rel=1e-5)


def test_the_step_is_the_mean_over_all_supervised_tokens(base):
    """Against transformers' own mean loss on the padded batch."""
    found, _ = train(base, micro_batches(2), 4)
    torch.manual_seed(0)
    module = SFTModule(base, lora=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    module.configure_model()
    batch = micro_batches(8, pad_batch)[0]
    module.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"], use_cache=False
    ).loss.backward()
    expected = {n: p.detach() - 0.1 * p.grad for n, p in module.named_parameters() if p.requires_grad}
    assert_same(found, expected)


@pytest.mark.parametrize(("per_batch", "accumulate"), [(4, 1), (1, 4), (3, 2)], ids=["2x4", "8x1", "uneven"])
def test_two_ranks_take_the_step_of_one(base, per_batch, accumulate, tmp_path):
    expected, one = train(base, micro_batches(8), 1, gradient_clip_val=0.05)
    ids, masks = documents()
    filler = pack_batch([ids[0]], [torch.zeros_like(masks[0])])
    torch.manual_seed(0)
    module = SFTModule(
        base,
        lora=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        lr_scheduler=None,
    )
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", use_distributed_sampler=False, max_epochs=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, gradient_clip_val=0.05,
        accumulate_grad_batches=accumulate, callbacks=[SeedAll(), Recorder(tmp_path / "rank0.pt")],
    )  # fmt: skip
    module.load_state_dict = lambda *_, **__: None  # the parent process, to which spawned weights return, has no model
    trainer.fit(module, datamodule=Ranks(micro_batches(per_batch), filler))
    found = torch.load(tmp_path / "rank0.pt", weights_only=True)
    assert_same(found["trained"], expected)
    assert found["losses"][-1] == pytest.approx(one.losses[-1], rel=1e-5)


def test_a_micro_batch_without_targets_changes_nothing(base):
    ids, masks = documents()
    filler = pack_batch([ids[0]], [torch.zeros_like(masks[0])])
    expected, _ = train(base, micro_batches(4), 2)
    found, _ = train(base, [*micro_batches(4), filler], 3)
    assert_same(found, expected)
