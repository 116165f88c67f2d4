"""Reference log-probabilities computed once: by content, over ranks, and the same as those of each step."""

import json

import lightning as L
import pytest
import torch
from peft import LoraConfig
from tiny import tiny_tokenizer
from tiny_models import save_tiny_model

from lightning_qlora.data import PreferenceDataModule
from lightning_qlora.losses import DPOLoss, KTOLoss
from lightning_qlora.model import attach_adapters, load_base_model, save_adapter
from lightning_qlora.modules import PreferenceModule
from lightning_qlora.modules.reference import ReferenceTable

QUESTIONS = ("What is {}?", "Please think about {} for a while, and then think again.", "{}")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A base, an adapter of it, and pairs to train and validate on."""
    root = tmp_path_factory.mktemp("task")
    base = save_tiny_model(root / "base", tokenizer=tiny_tokenizer("chatml"), num_hidden_layers=1)
    torch.manual_seed(5)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = attach_adapters(load_base_model(base), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save_adapter(model, root / "adapter")
    for name, count in (("train", 9), ("val", 3)):
        rows = [
            {
                "prompt": QUESTIONS[i % 3].format(f"{name} {i}"),
                "chosen": f"It is {7 * i}.",
                "rejected": f"Well, {i} of course; what else would it be?",
            }
            for i in range(count)
        ]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_QLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


def data_of(task, **options):
    options = {"max_length": 128, "tokens_per_batch": 384, "cache_dir": str(task / "cache"), **options}
    files = str(task / "train.jsonl"), str(task / "val.jsonl")
    return PreferenceDataModule(*files, tokenizer=str(task / "base"), **options)


def module_of(task, **options):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    defaults = {"lora": lora, "lr": 1e-2, "lr_scheduler": None, "activation_checkpointing": "none"}
    return PreferenceModule(str(task / "base"), **{**defaults, "untrained_tokens": "ignore", **options})


def fit(module, data, **options):
    defaults = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", enable_progress_bar=False, num_sanity_val_steps=0, **{**defaults, **options})
    trainer.fit(module, datamodule=data)
    return trainer


def trained(module):
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("loss", "data", "continued"),
    [
        (DPOLoss(), {}, False),
        (DPOLoss(), {"share_prompts": True}, True),
        (DPOLoss(), {"packing": False, "batch_size": 2, "tokens_per_batch": None}, False),
        (KTOLoss(), {"unpaired": True}, True),
    ],
    ids=["dpo", "shared-continued", "padded", "kto-continued"],
)
def test_the_run_is_that_without_it_and_no_step_runs_the_reference(task, monkeypatch, cache, loss, data, continued):
    options = {"loss": loss, **({"adapter": str(task / "adapter")} if continued else {})}
    plain = module_of(task, **options)
    expected = fit(plain, data_of(task, **data)).callback_metrics
    first = module_of(task, precompute_reference=True, **options)
    fit(first, data_of(task, **data))
    for name, value in trained(plain).items():
        torch.testing.assert_close(trained(first)[name], value, rtol=1e-3, atol=1e-4)
    assert len(list(cache.iterdir())) == 2

    monkeypatch.setattr(PreferenceModule, "reference_log_probs", None)  # from here on the cache must do
    again = module_of(task, precompute_reference=True, **options)
    found = fit(again, data_of(task, **data)).callback_metrics
    assert all(torch.equal(value, trained(first)[name]) for name, value in trained(again).items())
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=2e-2, abs=2e-2), name


def test_another_base_adapter_or_text_is_computed_anew(task, cache, tmp_path):
    def files():
        return {path.name for path in cache.iterdir()}

    fit(module_of(task, precompute_reference=True), data_of(task), max_steps=1)
    known = files()
    fit(module_of(task, precompute_reference=True, loss=DPOLoss(0.7), lr=1e-3), data_of(task, seed=4), max_steps=1)
    assert files() == known  # what does not matter to the reference
    fit(module_of(task, precompute_reference=True, adapter=str(task / "adapter")), data_of(task), max_steps=1)
    assert len(files()) == 4
    fit(module_of(task, precompute_reference=True, quantization=None), data_of(task), max_steps=1)
    assert len(files()) == 6
    fit(module_of(task, precompute_reference=True), data_of(task, max_length=120), max_steps=1)
    assert len(files()) == 6  # all rows are shorter
    (tmp_path / "train.jsonl").write_text((task / "train.jsonl").read_text().replace("It is", "That is"))
    changed = PreferenceDataModule(
        str(tmp_path / "train.jsonl"), str(task / "val.jsonl"), tokenizer=str(task / "base"), max_length=128,
        tokens_per_batch=384, cache_dir=str(task / "cache"),
    )  # fmt: skip
    fit(module_of(task, precompute_reference=True), changed, max_steps=1)
    assert len(files()) == 7  # the training texts; those for validation are the same


class Keep(L.Callback):
    """The numbers that rank 0 was given, before the first step."""

    def __init__(self, path):
        self.path = path

    def setup(self, trainer, pl_module, stage):
        torch.manual_seed(0)  # the adapters of every rank begin alike

    def on_train_start(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save(trainer.datamodule._reference["train"], self.path)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_two_ranks_share_the_work(task, cache, tmp_path):
    fit(module_of(task, precompute_reference=True), data_of(task), callbacks=[Keep(tmp_path / "one.pt")], max_steps=1)
    for path in cache.iterdir():
        path.unlink()
    module = module_of(task, precompute_reference=True)
    module.load_state_dict = lambda *_, **__: None  # the parent process, to which spawned weights return, has no model
    options = {"devices": 2, "strategy": "ddp_fork", "max_steps": 1, "callbacks": [Keep(tmp_path / "two.pt")]}
    fit(module, data_of(task), **options)
    one, two = (torch.load(tmp_path / name) for name in ("one.pt", "two.pt"))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-4)
    assert torch.isfinite(one).all()


def test_a_table_is_found_by_all_that_it_depends_on(tmp_path):
    values = torch.tensor([1.0, float("nan")])
    table = ReferenceTable({"base": "a", "documents": "b"}, tmp_path)
    assert table.read() is None
    table.write(values)
    found = ReferenceTable({"documents": "b", "base": "a"}, tmp_path).read()
    torch.testing.assert_close(found, values, equal_nan=True)
    assert ReferenceTable({"base": "a", "documents": "c"}, tmp_path).read() is None
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_predicts_answers_like_any_module(task, tmp_path):
    (tmp_path / "questions.jsonl").write_text('{"prompt": "Hi?"}\n{"prompt": "Well?"}\n')
    data = data_of(task, predict=str(tmp_path / "questions.jsonl"))
    module = module_of(task, max_new_tokens=3, adapter=str(task / "adapter"))
    trainer = fit(module, data, max_steps=1)
    (answers,) = trainer.predict(module, datamodule=data)
    assert [row["prompt"] for row in answers] == ["Hi?", "Well?"]
    assert all(isinstance(row["answer"], str) for row in answers)
