"""What FSDP2 keeps: the bytes of 4-bit weights, host memory, checkpoints, generation; on two gloo processes."""

import lightning as L
import pytest
import torch
from bitsandbytes.optim import PagedAdamW8bit
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel
from tiny_models import digests, random_batch, save_tiny_model
from tiny_ranks import run_ranks
from tiny_run import TinyData, tiny_module, tiny_trainer
from torch.distributed.tensor import DTensor

from lightning_qlora.callbacks import AdapterCheckpoint, RunSummary
from lightning_qlora.checkpoints.publishing import LocalStore
from lightning_qlora.model import load_base_model
from lightning_qlora.ranks import RankZeroError
from lightning_qlora.strategies import FSDP2Strategy

pytestmark = pytest.mark.filterwarnings("ignore")  # of the forked processes; nothing here depends on warnings

SEVERAL = {"devices": 2, "max_epochs": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"))


class Look(L.Callback):
    """Looks at the base before and after training."""

    def __init__(self):
        self.digests, self.bytes = [], []

    def look(self, module):
        base = module.model.get_base_model()
        self.digests.append(digests(base))
        frozen = [p for p in base.parameters() if not p.requires_grad]
        self.bytes.append(sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in frozen))

    def on_fit_start(self, trainer, module):
        self.look(module)

    def on_train_end(self, trainer, module):
        self.look(module)


def test_the_bytes_of_the_base_stay_and_each_rank_holds_half(base, tmp_path, capfd):
    def run():
        look = Look()
        module = tiny_module(base)
        tiny_trainer(tmp_path, look, RunSummary(), strategy=FSDP2Strategy(), enable_checkpointing=False, **SEVERAL).fit(
            module, datamodule=TinyData(batches=4)
        )
        prompts = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.int64)
        batch = random_batch((5, 7))
        with torch.no_grad():
            loss = float(module.token_loss(batch).loss_sum)
        # Ranks that stop at different lengths must still go through the same forward passes.
        module.stop_token_ids = tuple(range(400)) if module.global_rank else ()
        answer = module.generate(*prompts, max_new_tokens=6)
        return {"digests": look.digests, "bytes": look.bytes, "loss": loss, "length": len(answer[0])}

    whole = load_base_model(base)
    expected, size = digests(whole), sum(p.nbytes for p in whole.parameters())
    ranks = run_ranks(tmp_path / "ranks", run)
    for found in ranks:
        assert found["digests"] == [expected, expected]
        assert found["bytes"] == [pytest.approx(size / 2, rel=0.01)] * 2
        assert found["loss"] == ranks[0]["loss"]
    assert f"{base} (LlamaForCausalLM)" in capfd.readouterr().out  # not the class that FSDP2 makes of it
    assert ranks[0]["length"] == 6
    assert ranks[1]["length"] < 6


class WhatIsWhole(L.Callback):
    """Whether embedding and head are gathered when a decoder layer runs, when the head does, when the loss is there."""

    def on_train_start(self, trainer, module):
        base = module.model.get_base_model()
        self.both = base.get_input_embeddings(), base.get_output_embeddings()
        self.whole = {}
        for name, part in (("layer", base.get_decoder().layers[0]), ("head", self.both[1])):
            part.register_forward_pre_hook(lambda *_, name=name: self.look(name))

    def look(self, moment):
        self.whole[moment] = [not isinstance(next(each.parameters()), DTensor) for each in self.both]

    def on_before_backward(self, trainer, module, loss):
        self.look("loss")


ALONE, EMBEDDING_KEPT, HEAD_KEPT, BOTH_KEPT = (
    {"layer": [embedding, head], "head": [embedding, True], "loss": [embedding, head]}
    for embedding, head in ((False, False), (True, False), (False, True), (True, True))
)


@pytest.mark.parametrize(
    ("tied", "lora", "whole"),
    [
        (False, {}, ALONE),
        (False, {"trainable_token_indices": {"embed_tokens": [3]}}, EMBEDDING_KEPT),
        (False, {"modules_to_save": ["lm_head"]}, HEAD_KEPT),
        (True, {}, BOTH_KEPT),  # one matrix is both
    ],
    ids=["frozen", "trained embedding", "trained head", "tied"],
)
def test_frozen_embedding_and_head_are_whole_for_their_own_use(tmp_path, tied, lora, whole):
    base = save_tiny_model(tmp_path / "base", tie_word_embeddings=tied)

    def run():
        look = WhatIsWhole()
        trainer = tiny_trainer(tmp_path, look, strategy=FSDP2Strategy(), enable_checkpointing=False, **SEVERAL)
        trainer.fit(tiny_module(base, lora=lora, untrained_tokens="ignore"), datamodule=TinyData(batches=2))
        return look.whole

    assert run_ranks(tmp_path / "ranks", run) == [whole] * 2


class Answers(L.Callback):
    """What is generated between steps, and the loss of validation."""

    def __init__(self):
        self.answers, self.losses = [], []

    def on_validation_end(self, trainer, module):
        prompts = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.int64)
        self.answers.append(module.generate(*prompts, max_new_tokens=6)[0])
        self.losses.append(float(trainer.callback_metrics["val_loss"]))


@pytest.mark.parametrize("family", ["llama", pytest.param("granite", marks=pytest.mark.slow)])
def test_validation_and_generation_are_those_of_one_device(tmp_path, family):
    """Granite scales its logits, so that they are not just a head of hidden states: its own forward calls the head."""
    options = {"logits_scaling": 4.0} if family == "granite" else {}
    base = save_tiny_model(tmp_path / "base", family, **options)

    def run(devices=2, accumulate=1, strategy=None):
        L.seed_everything(0)
        look = Answers()
        module = tiny_module(base, dropout=0.0, optimizer=lambda params: torch.optim.SGD(params, lr=0.1), lr=None)
        trainer = tiny_trainer(
            tmp_path, look, strategy=strategy or FSDP2Strategy(), devices=devices, max_epochs=2,
            accumulate_grad_batches=accumulate, val_check_interval=2 * accumulate, enable_checkpointing=False,
            use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(module, datamodule=TinyData(batches=8))
        return {"answers": look.answers, "losses": look.losses}

    alone = run(devices=1, accumulate=2, strategy="auto")
    assert len(set(alone["losses"])) == 4
    for found in run_ranks(tmp_path / "ranks", run):
        assert found["answers"] == alone["answers"]
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)


# Checkpoints


class State(L.Callback):
    """The losses of each micro-batch, and what is trained in the end."""

    def __init__(self):
        self.rows, self.losses = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.rows.append(list(batch["row_ids"]))
        self.losses.append(float(outputs["loss"]))


def train(base, root, *callbacks, strategy, devices, ckpt_path=None, seed=0, **options):
    L.seed_everything(seed)
    state = State()
    module = tiny_module(base, dropout=0.0, lr_scheduler=None)
    checkpoint = AdapterCheckpoint(root / "checkpoints", every_n_train_steps=2, save_top_k=-1)
    trainer = tiny_trainer(root, checkpoint, state, *callbacks, strategy=strategy, devices=devices, **options)
    trainer.fit(module, datamodule=TinyData(batches=8), ckpt_path=ckpt_path)
    trained = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    trained = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in trained.items()}
    return {"trained": trained, "rows": state.rows, "losses": state.losses, "step": trainer.global_step}


def fit_on(ranks, folder, make_strategy, run):
    if ranks == 1:
        return [run(strategy="auto", devices=1)]
    return run_ranks(folder, lambda: run(strategy=make_strategy(), devices=ranks))


def newest(root):
    return LocalStore(root / "checkpoints").newest_valid()


def ddp():
    return "ddp_qlora"


@pytest.mark.parametrize(
    ("ranks", "strategy"),
    [
        (2, FSDP2Strategy),
        pytest.param(1, None, marks=pytest.mark.slow),
        pytest.param(2, ddp, marks=pytest.mark.slow),
    ],
    ids=["2 sharded", "1", "2 whole"],
)
def test_a_checkpoint_of_two_shards_resumes_on(base, tmp_path, ranks, strategy):
    """The end of an epoch is where any number of ranks may go on."""

    def fit(root, **options):
        return lambda **where: train(base, root, **where, **options)

    first = run_ranks(tmp_path / "1", lambda: fit(tmp_path / "a", max_epochs=1)(strategy=FSDP2Strategy(), devices=2))
    published = newest(tmp_path / "a")
    resumed = fit_on(
        ranks,
        tmp_path / "2",
        strategy,
        fit(tmp_path / "a", max_epochs=2, ckpt_path=f"{published.path}/trainer.ckpt", seed=9),
    )
    assert resumed[0]["step"] == first[0]["step"] + 8 // ranks
    if ranks == 2:  # the same steps as without a stop
        calm = run_ranks(tmp_path / "3", lambda: fit(tmp_path / "b", max_epochs=2)(strategy=FSDP2Strategy(), devices=2))
        for a, b in zip(resumed, calm, strict=True):
            assert a["losses"] == pytest.approx(b["losses"][4:], rel=1e-5)
            for name, value in b["trained"].items():
                torch.testing.assert_close(a["trained"][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_distributed_checkpoints_resume(base, tmp_path):
    def fit(name, **options):
        make = lambda: FSDP2Strategy(save_distributed_checkpoint=True)  # noqa: E731
        return run_ranks(tmp_path / name, lambda: train(base, tmp_path / "run", strategy=make(), devices=2, **options))

    fit("first", max_epochs=1)
    resumed = fit("second", max_epochs=2, ckpt_path="last", seed=9)
    assert [r["step"] for r in resumed] == [8, 8]


def test_it_publishes_the_folder_that_ddp_publishes(base, tmp_path):
    """Steps are equal up to rounding, so values are; names, shapes and dtypes are the same, and PEFT loads both."""
    adapters = {}
    for name, make in (("ddp", ddp), ("fsdp", FSDP2Strategy)):
        fit = lambda m=make, n=name: train(base, tmp_path / n, strategy=m(), devices=2, max_epochs=1)  # noqa: E731
        run_ranks(tmp_path / f"{name}-ranks", fit)
        published = newest(tmp_path / name)
        model = PeftModel.from_pretrained(load_base_model(base), published.path)
        adapters[name] = {n: p for n, p in model.named_parameters() if "lora_" in n}, sorted(published.files)
    assert adapters["fsdp"][1] == adapters["ddp"][1]
    assert adapters["fsdp"][0].keys() == adapters["ddp"][0].keys()
    for name, value in adapters["ddp"][0].items():
        torch.testing.assert_close(adapters["fsdp"][0][name], value, rtol=1e-2, atol=1e-4)


class FullDisk(AdapterCheckpoint):
    def _describe(self, trainer):
        raise OSError(28, "No space left on device")


@pytest.mark.slow
def test_no_rank_hangs_when_saving_fails_on_one(base, tmp_path):
    def run():
        checkpoint = FullDisk(tmp_path / "checkpoints", every_n_train_steps=1)
        trainer = tiny_trainer(tmp_path, checkpoint, strategy=FSDP2Strategy(), **SEVERAL)
        try:
            trainer.fit(tiny_module(base), datamodule=TinyData(batches=4))
        except (OSError, RankZeroError) as error:
            return type(error).__name__
        return "trained"

    assert run_ranks(tmp_path / "ranks", run) == ["OSError", "RankZeroError"]


@pytest.mark.slow
def test_offloaded_parts_train_alike(base, tmp_path):
    found = {}
    for offload in (False, True):

        def run(offload=offload):
            strategy = FSDP2Strategy(cpu_offload=offload)
            return train(base, tmp_path / str(offload), strategy=strategy, devices=2, max_epochs=1)

        found[offload] = run_ranks(tmp_path / f"{offload}-ranks", run)[0]
    assert found[True]["losses"] == pytest.approx(found[False]["losses"], rel=1e-5)


def test_optimizers_of_bitsandbytes_are_refused(base, tmp_path):
    """In the first step they would fail with the name of an operator."""

    def run():
        module = tiny_module(base, optimizer=PagedAdamW8bit)
        trainer = tiny_trainer(tmp_path, strategy=FSDP2Strategy(), enable_checkpointing=False, **SEVERAL)
        try:
            trainer.fit(module, datamodule=TinyData(batches=2))
        except MisconfigurationException as error:
            return str(error)

    for message in run_ranks(tmp_path / "ranks", run):
        assert "PagedAdamW8bit" in message
        assert "torch.optim.AdamW" in message
