"""A resumed run is bit for bit the run that was not interrupted: real data modules, real 4-bit base, dropout."""

import json

import lightning as L
import pytest
import torch
from tiny import tiny_tokenizer
from tiny_run import Record, TinyData, assert_equal, final_state, make_jobs, tiny_module, tiny_trainer

from lightning_qlora.callbacks import AdapterCheckpoint
from lightning_qlora.checkpoints.publishing import LocalStore
from lightning_qlora.data import PreferenceDataModule, SFTDataModule
from lightning_qlora.losses import DPOLoss, KTOLoss, ORPOLoss
from lightning_qlora.modules import PreferenceModule, SFTModule
from lightning_qlora.random_state import capture_random_state

QUESTIONS = ("What is {}?", "Please think about {} for a while, and then think again.", "{}")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_QLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with a base, an adapter of it, and files of chats and of pairs to train and validate on."""
    root = tmp_path_factory.mktemp("task")
    make_jobs(root, tokenizer=tiny_tokenizer("chatml"), num_hidden_layers=1)
    for name, count in (("train", 24), ("val", 4)):
        with open(root / f"{name}.jsonl", "w") as chats, open(root / f"{name}_pairs.jsonl", "w") as pairs:
            for i in range(count):
                question, answer = QUESTIONS[i % 3].format(f"{name} {i}"), f"It is {7 * i}."
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                chats.write(json.dumps({"messages": turns}) + "\n")
                pairs.write(json.dumps({"prompt": question, "chosen": answer, "rejected": f"{i}? Well."}) + "\n")
    return root


def fit(task, root, *, ckpt_path=None, seed=0, data=None, model=None, checkpoint=None, **trainer):
    """Train; on pairs where ``model`` holds options of PreferenceModule."""
    L.seed_everything(seed, workers=True)
    record = Record()
    kind, suffix = (SFTModule, "") if model is None else (PreferenceModule, "_pairs")
    data_kind, tokens = (SFTDataModule, 192) if model is None else (PreferenceDataModule, 384)
    options = {"max_length": 128, "tokens_per_batch": tokens, "cache_dir": str(task / "cache"), **(data or {})}
    files = [str(task / f"{name}{suffix}.jsonl") for name in ("train", "val")]
    rows = data_kind(*files, tokenizer=str(task / "base"), **options)
    model = dict(model or {})
    if "adapter" in model:
        model["adapter"] = str(task / model["adapter"])
    publish = AdapterCheckpoint(root, **{"every_n_train_steps": 1, "save_top_k": -1, **(checkpoint or {})})
    trainer = tiny_trainer(root, record, publish, **trainer)
    module = tiny_module(str(task / "base"), kind=kind, untrained_tokens="ignore", **model)
    trainer.fit(module, datamodule=rows, ckpt_path=ckpt_path)
    return trainer, record


CASES = {
    "packed, short last window": {"accumulate_grad_batches": 4, "checkpoint": {"every_n_train_steps": 1}},
    "workers, validation inside epochs": {"data": {"num_workers": 1}, "val_check_interval": 0.5},
    "published in validation, inside windows": {
        "checkpoint": {"every_n_train_steps": None, "every_n_epochs": 1},
        "accumulate_grad_batches": 2,
        "val_check_interval": 3,
    },
    "published at the end of epochs, max_steps": {
        "checkpoint": {"every_n_train_steps": None, "every_n_epochs": 1},
        "max_epochs": -1,
        "max_steps": 11,
    },
    "padded": {"data": {"packing": False, "batch_size": 4, "tokens_per_batch": None}, "accumulate_grad_batches": 2},
    "best of a metric": {"checkpoint": {"monitor": "val_loss", "every_n_train_steps": 2}, "val_check_interval": 3},
    "DPO after an adapter, shared prompts, short last window": {
        "model": {"loss": DPOLoss(), "adapter": "adapter"},
        "data": {"share_prompts": True},
        "accumulate_grad_batches": 4,
    },
    "ORPO, workers, validation inside epochs": {
        "model": {"loss": ORPOLoss()},
        "data": {"num_workers": 1},
        "val_check_interval": 0.5,
    },
    "KTO, reference computed beforehand, best of a metric": {
        "model": {"loss": KTOLoss(), "precompute_reference": True},
        "data": {"unpaired": True},
        "accumulate_grad_batches": 2,
        "checkpoint": {"monitor": "val_reward_margin", "mode": "max", "every_n_train_steps": 2},
        "val_check_interval": 3,
    },
}


def check(task, calm, root, published, **options):
    trainer, record = calm
    resumed, rest = fit(task, root, ckpt_path=published.path, seed=99, **options)
    done = len(record.rows) - len(rest.rows)
    assert rest.rows == record.rows[done:]
    assert rest.losses == record.losses[done:]
    assert_equal(final_state(trainer), final_state(resumed))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
@pytest.mark.parametrize("case", CASES)
def test_resumes_bit_exactly(task, tmp_path, case):
    options = CASES[case]
    calm = fit(task, tmp_path / "calm", **options)
    published = LocalStore(tmp_path / "calm").published()
    assert len(published) >= 2
    check(task, calm, tmp_path / "resumed", published[len(published) // 2], **options)


class LoggerSteps(L.Callback):
    """What loggers count by, at the end of each batch of the run."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        loop = trainer.fit_loop.epoch_loop
        self.seen[loop.batch_progress.total.ready] = loop._batches_that_stepped


BY_EPOCHS, BY_STEPS = {"max_epochs": 3}, {"max_epochs": -1, "max_steps": 6}
WITH_VALIDATION = {"max_epochs": 3, "max_steps": 6, "val_check_interval": 2}


@pytest.mark.parametrize(
    ("options", "accumulate"),
    [
        (BY_EPOCHS, 2),
        (BY_STEPS, 1),
        (WITH_VALIDATION, 2),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in ((BY_EPOCHS, 1), (BY_STEPS, 2), (WITH_VALIDATION, 1))
        ),
    ],
    ids=str,
)
def test_loggers_go_on_counting(task, tmp_path, options, accumulate):
    def run(root, **more):
        steps = LoggerSteps()
        publish = AdapterCheckpoint(root, every_n_train_steps=1, save_top_k=-1)
        trainer = tiny_trainer(root, steps, publish, **options, accumulate_grad_batches=accumulate)
        trainer.fit(tiny_module(str(task / "base")), datamodule=TinyData(4), **more)
        return steps.seen

    calm = run(tmp_path / "calm")
    published = LocalStore(tmp_path / "calm").published()
    assert len(published) >= 6
    for item in published:
        resumed = run(tmp_path / item.name, ckpt_path=item.path)
        assert resumed == {batch: calm[batch] for batch in resumed}, item.name


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_resumes_bit_exactly_from_every_checkpoint(task, tmp_path, case, accumulate):
    options = {**CASES[case], "accumulate_grad_batches": accumulate}
    calm = fit(task, tmp_path / "calm", **options)
    for published in LocalStore(tmp_path / "calm").published():
        check(task, calm, tmp_path / published.name, published, **options)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case", ["packed, short last window", "DPO after an adapter, shared prompts, short last window"]
)
def test_resumes_on_a_gpu(task, tmp_path, case, monkeypatch):
    """By deterministic algorithms: batches, learning rates and random numbers exactly, losses to 1e-6."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    options = {**CASES[case], "accelerator": "gpu", "precision": "bf16-mixed", "deterministic": "warn"}
    try:
        trainer, record = fit(task, tmp_path / "calm", **options)
        drawn = capture_random_state()
        for published in LocalStore(tmp_path / "calm").published()[1:-1]:
            resumed, rest = fit(task, tmp_path / published.name, ckpt_path=published.path, seed=99, **options)
            assert_equal(drawn, capture_random_state())
            done = len(record.rows) - len(rest.rows)
            assert rest.rows == record.rows[done:]
            assert rest.losses == pytest.approx(record.losses[done:], rel=1e-6, abs=1e-6)
            one, two = final_state(trainer), final_state(resumed)
            assert (one["schedule"], one["steps"]) == (two["schedule"], two["steps"])
    finally:
        torch.use_deterministic_algorithms(False)
