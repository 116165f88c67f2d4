import json
import logging
import os
import shutil
from datetime import timedelta
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from tiny_models import save_tiny_model
from tiny_run import Job, TinyData, make_jobs, tiny_module, tiny_trainer

from lightning_qlora.callbacks import AdapterCheckpoint
from lightning_qlora.callbacks.adapter_checkpoint import NonFiniteAdapterError
from lightning_qlora.checkpoints.adapter_folder import saved_adapter_state, write_adapter_folder
from lightning_qlora.checkpoints.identity import IdentityMismatchError
from lightning_qlora.checkpoints.publishing import (
    DamagedCheckpointError,
    LocalStore,
    NoValidCheckpointError,
    open_store,
    verify,
)
from lightning_qlora.model import load_base_model

PEFT_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "generation_config.json"}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return make_jobs(tmp_path_factory.mktemp("jobs"), tokenizer=tiny_tokenizer("chatml"))


@pytest.fixture(scope="module")
def base(jobs):
    return jobs["SFT"].base


def fit(job, root, checkpoint, *callbacks, data=None, module=None, ckpt_path=None, **trainer):
    """Train; ``job`` may be the base of a supervised one."""
    job = Job(job) if isinstance(job, str) else job
    trainer = tiny_trainer(root, checkpoint, *callbacks, **{"max_epochs": 1, **trainer})
    module = module or job.module(untrained_tokens="ignore")
    trainer.fit(module, datamodule=data or job.data(), ckpt_path=ckpt_path)
    return trainer


def names(root):
    return [p.name for p in reversed(LocalStore(root).published())]


@pytest.fixture(scope="module", params=["SFT", "DPO", "ORPO"])
def job(jobs, request):
    return jobs[request.param]


@pytest.fixture(scope="module")
def run(job, tmp_path_factory):
    """A finished run of 6 steps that published after steps 3 and 6."""
    root = tmp_path_factory.mktemp("run")
    checkpoint = AdapterCheckpoint(every_n_train_steps=3)
    trainer = fit(job, root, checkpoint)
    return trainer, checkpoint, root / "checkpoints"


# The folder


def test_a_checkpoint_is_a_peft_folder_and_the_resumable_rest(run):
    _, checkpoint, root = run
    assert names(root) == ["epoch=0-step=3", "epoch=0-step=6"]
    assert {p.name for p in (root / "epoch=0-step=6").iterdir()} == PEFT_FILES | {"trainer.ckpt", "manifest.json"}
    assert (root / "LATEST").read_text() == "epoch=0-step=6\n"
    published = verify(root / "epoch=0-step=6")
    assert published.metadata["step"] == 6
    assert published.metadata["metrics"]["train_loss"] > 0
    assert published.num_bytes == checkpoint.last_save_bytes
    assert 0 < checkpoint.last_save_seconds < 10


def test_any_peft_program_gets_the_same_logits(run, base):
    trainer, _, root = run
    model = trainer.lightning_module.model.eval()
    loaded = PeftModel.from_pretrained(load_base_model(base), root / "epoch=0-step=6").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert (model(input_ids=ids).logits - loaded(input_ids=ids).logits).abs().max() == 0


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_dora": True},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"trainable_token_indices": [3, 4]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"bias": "all"},
        {"rank_pattern": {"q_proj": 2}, "use_rslora": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer")
@pytest.mark.filterwarnings("ignore:.*target_modules.*embed")
def test_every_kind_of_adapter_is_saved_as_peft_saves_it(tmp_path, lora, tied):
    base = save_tiny_model(tmp_path / "base", tied=tied)
    module = tiny_module(base, lora=lora)
    short = {"limit_train_batches": 2, "limit_val_batches": 0}
    fit(base, tmp_path, AdapterCheckpoint(), module=module, **short)
    published = Path(LocalStore(tmp_path / "checkpoints").newest_valid().path)
    module.model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (published, tmp_path / "peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert_saved_weights_are_written(module, theirs, tmp_path / "saved")
    loaded = PeftModel.from_pretrained(load_base_model(base), published).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert (module.model.eval()(input_ids=ids).logits - loaded(input_ids=ids).logits).abs().max() == 0
    resumed = tiny_module(base, lora=lora)
    fit(
        base,
        tmp_path,
        AdapterCheckpoint(),
        module=resumed,
        limit_train_batches=2,
        limit_val_batches=0,
        ckpt_path="last",
    )
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key


def assert_saved_weights_are_written(module, own, folder):
    """Of a checkpoint that holds others than the model's own, as Lightning's WeightAveraging makes it."""
    assert saved_adapter_state(module, module.state_dict()) is None
    state = saved_adapter_state(module, {key: tensor + 1 for key, tensor in module.state_dict().items()})
    write_adapter_folder(folder, module.model, state=state)
    written = load_file(folder / "adapter_model.safetensors")
    assert written.keys() == own.keys()
    assert all(torch.equal(written[key], own[key] + 1) for key in own)


def test_no_file_holds_base_weights(run, base):
    trainer, _, root = run
    adapters = sum(p.numel() for p in trainer.lightning_module.parameters() if p.requires_grad)
    checkpoint = torch.load(root / "epoch=0-step=6" / "trainer.ckpt", weights_only=True)
    assert sum(t.numel() for t in checkpoint["state_dict"].values()) == adapters
    assert all("lora_" in key for key in checkpoint["state_dict"])
    with safe_open(root / "epoch=0-step=6" / "adapter_model.safetensors", "pt") as file:
        assert all("lora_" in key for key in file.keys())  # noqa: SIM118 - not a dictionary


class ChatData(TinyData):
    """A data module with what SFTDataModule has besides."""

    tokenizer = tiny_tokenizer("chatml")
    stop_token_ids = (7, 8)
    control_token_ids = ()


def test_tokenizer_template_and_stop_tokens_are_there(base, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    fit(base, tmp_path, AdapterCheckpoint(), data=ChatData(), max_steps=1)
    published = LocalStore(tmp_path / "checkpoints").newest_valid().path
    loaded = AutoTokenizer.from_pretrained(published)
    assert loaded.chat_template == ChatData.tokenizer.chat_template
    assert loaded("a b").input_ids == ChatData.tokenizer("a b").input_ids
    config = GenerationConfig.from_pretrained(published)
    assert config.eos_token_id[:2] == [7, 8]
    assert ChatData.tokenizer.eos_token_id in config.eos_token_id


def test_secrets_are_not_written(base, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "correct-horse-battery")
    secrets = ("hf_abcdefghijklmnopqrstuvwx", "correct-horse-battery")
    module = tiny_module(base)
    module.save_hyperparameters({"hub": {"token": secrets[0]}, "note": f"see {secrets[1]}", "lr": 0.5})
    fit(base, tmp_path, AdapterCheckpoint(), module=module, max_steps=1)
    folder = Path(LocalStore(tmp_path / "checkpoints").newest_valid().path)
    for path in folder.iterdir():
        for secret in secrets:
            assert secret.encode() not in path.read_bytes(), path.name
    checkpoint = torch.load(folder / "trainer.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["hub"] == {"token": "<secret>"}
    assert checkpoint["hyper_parameters"]["lr"] == 0.5


# What is kept


def test_keeps_the_newest_two_by_default(base, tmp_path):
    fit(base, tmp_path, AdapterCheckpoint(every_n_train_steps=1))
    assert names(tmp_path / "checkpoints") == ["epoch=0-step=5", "epoch=0-step=6"]


def test_keeps_all_or_one_if_asked(base, tmp_path):
    fit(base, tmp_path / "all", AdapterCheckpoint(every_n_train_steps=2, save_top_k=-1))
    assert len(names(tmp_path / "all/checkpoints")) == 3
    fit(base, tmp_path / "one", AdapterCheckpoint(every_n_train_steps=2, keep_at_least=1))
    assert len(names(tmp_path / "one/checkpoints")) == 1


class Scripted(L.Callback):
    """Logs a given value of a metric in each validation."""

    def __init__(self, *values):
        self.values = list(values)

    def on_validation_epoch_end(self, trainer, module):
        module.log("score", self.values.pop(0))


def test_keeps_the_best_and_the_newest(base, tmp_path):
    checkpoint = AdapterCheckpoint(monitor="score", mode="max", save_top_k=2, filename="{step}-{score:.1f}")
    fit(base, tmp_path, checkpoint, Scripted(0.1, 0.9, 0.3, 0.8, 0.2, 0.1), val_check_interval=1 / 6)
    assert names(tmp_path / "checkpoints") == ["step=2-score=0.9", "step=4-score=0.8", "step=6-score=0.1"]
    assert checkpoint.best_model_path == str(tmp_path / "checkpoints/step=2-score=0.9/trainer.ckpt")
    assert checkpoint.best_model_score == pytest.approx(0.9)
    assert checkpoint.last_model_path.endswith("step=6-score=0.1/trainer.ckpt")


def test_only_the_best_if_asked(base, tmp_path):
    checkpoint = AdapterCheckpoint(monitor="score", save_top_k=2, save_last=False, filename="{step}")
    fit(base, tmp_path, checkpoint, Scripted(0.1, 0.9, 0.3, 0.8, 0.2, 0.5), val_check_interval=1 / 6)
    assert names(tmp_path / "checkpoints") == ["step=1", "step=5"]


def test_a_metric_that_comes_later_does_not_delay_saving(base, tmp_path):
    checkpoint = AdapterCheckpoint(
        monitor="val/loss", every_n_train_steps=2, save_top_k=-1, filename="{step}-{val/loss:.0f}"
    )

    class LogsSlash(L.Callback):
        def on_validation_epoch_end(self, trainer, module):
            module.log("val/loss", 3.0)

    fit(base, tmp_path, checkpoint, LogsSlash())
    assert names(tmp_path / "checkpoints") == [
        "step=2-val_loss=0",
        "step=4-val_loss=0",
        "step=6-val_loss=0",  # the state is safe before validation begins
        "step=6-val_loss=3",
    ]
    assert [Path(p).parent.name for p in checkpoint.best_k_models] == ["step=6-val_loss=3"]


@pytest.mark.parametrize(
    ("options", "trainer", "kept"),
    [
        ({}, {"val_check_interval": 2, "max_steps": 4}, [2, 4]),
        ({}, {"max_epochs": 2, "max_steps": 12}, [6, 12]),
        ({"every_n_train_steps": 2}, {"val_check_interval": 4, "max_steps": 4}, [2, 4]),
    ],
)
def test_a_step_published_twice_counts_once(base, tmp_path, options, trainer, kept):
    fit(base, tmp_path, AdapterCheckpoint(monitor="score", **options), Scripted(0.2, 0.1), **trainer)
    steps = [published.metadata["step"] for published in LocalStore(tmp_path / "checkpoints").published()]
    assert steps == [*reversed(kept)]


def test_time_interval_and_accumulation(base, tmp_path):
    checkpoint = AdapterCheckpoint(train_time_interval=timedelta(0), save_top_k=-1)
    fit(base, tmp_path, checkpoint, accumulate_grad_batches=4)
    assert names(tmp_path / "checkpoints") == ["epoch=0-step=1", "epoch=0-step=2"]


def test_validation_inside_a_window_publishes_at_its_end(base, tmp_path):
    fit(base, tmp_path, AdapterCheckpoint(save_top_k=-1), accumulate_grad_batches=2, val_check_interval=3)
    assert names(tmp_path / "checkpoints") == ["epoch=0-step=2", "epoch=0-step=3"]


def test_the_end_of_training_is_published(base, tmp_path):
    fit(base, tmp_path / "steps", AdapterCheckpoint(every_n_train_steps=4), max_steps=5)
    assert names(tmp_path / "steps/checkpoints") == ["epoch=0-step=4", "epoch=0-step=5"]
    stop = EarlyStopping("val_loss", patience=0, min_delta=1e6)
    fit(base, tmp_path / "early", AdapterCheckpoint(every_n_train_steps=100), stop, max_epochs=9)
    assert names(tmp_path / "early/checkpoints") == ["epoch=1-step=12"]


def test_a_checkpoint_of_another_run_is_never_pruned(base, tmp_path):
    fit(base, tmp_path, AdapterCheckpoint(every_n_train_steps=1), max_steps=3)
    before = names(tmp_path / "checkpoints")
    with pytest.warns(UserWarning, match="holds 2 checkpoints of another run"):
        fit(base, tmp_path, AdapterCheckpoint(every_n_train_steps=1), max_steps=4)
    assert names(tmp_path / "checkpoints") == [*before, "epoch=0-step=3-v1", "epoch=0-step=4"]


def test_nothing_is_written_in_a_trial_run(base, tmp_path):
    fit(base, tmp_path, AdapterCheckpoint(every_n_train_steps=1), fast_dev_run=True)
    assert not (tmp_path / "checkpoints").exists()


# Going on


def test_last_best_directory_and_file(job, tmp_path, run):
    _, _, root = run
    shutil.copytree(root, tmp_path / "checkpoints")
    for path in ("last", str(tmp_path / "checkpoints/epoch=0-step=6"), root / "epoch=0-step=6/trainer.ckpt"):
        trainer = fit(job, tmp_path, AdapterCheckpoint(), ckpt_path=path, max_epochs=1)
        assert trainer.global_step == 6
    trainer, _, _ = run
    assert trainer.validate(datamodule=job.data(), ckpt_path="best", verbose=False)[0]["val_loss"] > 0


def test_last_without_any_starts_afresh_and_says_so(base, tmp_path, caplog):
    with caplog.at_level(logging.INFO), pytest.warns(UserWarning, match="no last checkpoint available"):
        trainer = fit(base, tmp_path, AdapterCheckpoint(), ckpt_path="last", max_steps=1)
    assert trainer.global_step == 1
    assert "training starts from the beginning" in caplog.text


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_last_without_any_is_refused_where_nothing_is_trained(base, tmp_path, stage):
    trainer = tiny_trainer(tmp_path, AdapterCheckpoint(), AdapterCheckpoint(tmp_path / "typo", filename="other"))
    with pytest.raises(MisconfigurationException, match=f"no checkpoint in {tmp_path}/(checkpoints|typo), so"):
        getattr(trainer, stage)(tiny_module(base), datamodule=TinyData(), ckpt_path="last")


def test_last_may_be_that_of_another_callback(job, tmp_path, run):
    _, _, root = run
    trainer = tiny_trainer(tmp_path, AdapterCheckpoint(), AdapterCheckpoint(root, filename="other"))
    module = job.module(untrained_tokens="ignore")
    trainer.validate(module, datamodule=job.data(), ckpt_path="last", verbose=False)
    assert trainer.ckpt_path == str(root / "epoch=0-step=6/trainer.ckpt")


def test_last_passes_over_damage_or_refuses(job, tmp_path, run):
    _, _, root = run
    copy = Path(shutil.copytree(root, tmp_path / "checkpoints"))
    (copy / "epoch=0-step=6" / "adapter_model.safetensors").write_bytes(b"x")
    trainer = fit(job, tmp_path, AdapterCheckpoint(), ckpt_path="last", max_steps=4)
    assert trainer.global_step == 4
    shutil.rmtree(copy / "epoch=0-step=4")
    (copy / "epoch=0-step=3" / "manifest.json").unlink()
    with pytest.raises(NoValidCheckpointError, match="No checkpoint in .* is whole"):
        fit(job, tmp_path, AdapterCheckpoint(), ckpt_path="last")


def test_a_damaged_checkpoint_named_itself_is_refused(job, tmp_path, run):
    _, _, root = run
    copy = Path(shutil.copytree(root / "epoch=0-step=6", tmp_path / "c"))
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(DamagedCheckpointError, match=r"adapter_config\.json"):
        fit(job, tmp_path, AdapterCheckpoint(), ckpt_path=copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json"):
        fit(job, tmp_path, AdapterCheckpoint(), ckpt_path=copy)


@pytest.mark.parametrize("job", ["SFT"], indirect=True)
@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"lora": {"lora_alpha": 9}}, "adapter.lora_alpha: published with 8, found 9"),
        ({"quantization": None}, "quantization"),
        ({"data": TinyData(fingerprint="other")}, "data: published with tiny, found other"),
    ],
    ids=["adapter", "quantization", "data"],
)
def test_a_checkpoint_of_something_else_is_refused(base, tmp_path, run, change, field):
    _, _, root = run
    options = dict(change)
    data = options.pop("data", None)

    def resume(**kwargs):
        checkpoint = AdapterCheckpoint(tmp_path / "c", every_n_train_steps=3, **kwargs)
        module = tiny_module(base, **options)
        return fit(base, tmp_path, checkpoint, module=module, data=data, ckpt_path=root / "epoch=0-step=3", max_steps=4)

    with pytest.raises(IdentityMismatchError, match=field):
        resume()
    if not field.startswith("quantization"):
        assert resume(allow_mismatch=[field.partition(".")[0].partition(":")[0]]).global_step == 4


def test_evaluation_may_use_other_data(job, tmp_path, run):
    _, _, root = run
    trainer = tiny_trainer(tmp_path, AdapterCheckpoint())
    data = job.data(fingerprint="other")
    trainer.validate(
        job.module(untrained_tokens="ignore"), datamodule=data, ckpt_path=root / "epoch=0-step=3", verbose=False
    )


def test_a_moved_folder_goes_on_and_knows_its_best(base, tmp_path):
    checkpoint = AdapterCheckpoint(tmp_path / "here", monitor="score", mode="max", filename="{step}")
    fit(base, tmp_path, checkpoint, Scripted(0.1, 0.9, 0.3), val_check_interval=1 / 3)
    (tmp_path / "here").rename(tmp_path / "there")
    checkpoint = AdapterCheckpoint(tmp_path / "there", monitor="score", mode="max", filename="{step}")
    later = {"val_check_interval": 1 / 3, "max_epochs": 2, "ckpt_path": "last"}
    trainer = fit(base, tmp_path, checkpoint, Scripted(0.2, 0.4, 0.5), **later)
    assert trainer.global_step == 12
    assert names(tmp_path / "there") == ["step=4", "step=12"]
    assert checkpoint.best_model_path == str(tmp_path / "there/step=4/trainer.ckpt")


def test_a_run_may_branch_into_another_folder(job, tmp_path, run):
    _, _, root = run
    checkpoint = AdapterCheckpoint(tmp_path / "branch")
    trainer = fit(job, tmp_path, checkpoint, ckpt_path=root / "epoch=0-step=3", max_epochs=2)
    assert trainer.global_step == 12
    assert names(tmp_path / "branch") == ["epoch=0-step=6", "epoch=1-step=12"]
    assert names(root) == ["epoch=0-step=3", "epoch=0-step=6"]


class Sentinel:
    def __reduce__(self):
        return os.mkdir, (os.environ["SENTINEL"],)


def test_pickles_are_not_run(base, tmp_path, monkeypatch):
    monkeypatch.setenv("SENTINEL", str(tmp_path / "pwned"))
    torch.save({"state_dict": {}, "x": Sentinel()}, tmp_path / "evil.ckpt")
    with pytest.raises(Exception, match="(?i)weights.only"):
        fit(base, tmp_path, AdapterCheckpoint(), ckpt_path=tmp_path / "evil.ckpt")
    assert not (tmp_path / "pwned").exists()


# Failing


def test_a_failed_save_raises_and_leaves_the_last_one(base, tmp_path, monkeypatch):
    data = TinyData()
    checkpoint = AdapterCheckpoint(every_n_train_steps=1)
    real = torch.save

    def full_disk(state, stream, *args, **kwargs):
        if state["global_step"] == 3:
            raise OSError(28, "No space left on device")
        real(state, stream, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        fit(base, tmp_path, checkpoint, data=data)
    root = tmp_path / "checkpoints"
    assert names(root) == ["epoch=0-step=1", "epoch=0-step=2"]
    assert not [p for p in root.iterdir() if p.name.startswith(".")]
    monkeypatch.undo()
    assert fit(base, tmp_path, AdapterCheckpoint(), ckpt_path="last").global_step == 6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_nonfinite_adapter_is_never_published(base, tmp_path, value):
    class Spoil(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            if trainer.global_step == 3:
                next(p for p in module.parameters() if p.requires_grad).data.view(-1)[5] = value

    with pytest.raises(NonFiniteAdapterError, match=r"not published at step 3.*lora_A"):
        fit(base, tmp_path, AdapterCheckpoint(every_n_train_steps=1), Spoil())
    assert names(tmp_path / "checkpoints") == ["epoch=0-step=1", "epoch=0-step=2"]


@pytest.mark.parametrize(
    ("hook", "published"),
    [("on_after_backward", False), ("on_train_batch_end", False), ("on_validation_start", True)],
)
def test_an_exception_between_steps_may_publish(base, tmp_path, hook, published):
    class Fails(L.Callback):
        def __init__(self, hook):
            setattr(self, hook, self.fail)

        def fail(self, trainer, *args):
            if trainer.global_step == 2:
                raise KeyError("x")

    checkpoint = AdapterCheckpoint(every_n_train_steps=100, save_on_exception=True)
    with pytest.raises(KeyError):
        fit(base, tmp_path, checkpoint, Fails(hook), val_check_interval=2)
    assert (tmp_path / "checkpoints").exists() == published
    if published:
        assert names(tmp_path / "checkpoints") == ["epoch=0-step=2"]


def test_what_a_kill_left_is_swept_at_the_start(base, tmp_path):
    (tmp_path / "checkpoints/.staging-epoch=0-step=1-abc").mkdir(parents=True)
    fit(base, tmp_path, AdapterCheckpoint(), max_steps=1)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["LATEST", "epoch=0-step=1"]


# Options and neighbours


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allow_mismatch": ["weights"]}, "allow_mismatch names weights; allowed are base"),
        ({"keep_at_least": 0}, "keep_at_least is 0"),
        ({"save_top_k": 3}, "No quantity for top_k"),
        ({"mode": "best"}, "`mode` can be"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        AdapterCheckpoint(**options)


def test_a_module_without_adapters_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"BoringModel holds no peft\.PeftModel"):
        tiny_trainer(tmp_path, AdapterCheckpoint(every_n_train_steps=1), max_steps=1).fit(BoringModel())


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
def test_beside_a_stock_checkpoint(base, tmp_path):
    stock = ModelCheckpoint(tmp_path / "stock", every_n_train_steps=2, save_last=True)
    fit(base, tmp_path, AdapterCheckpoint(every_n_train_steps=2), stock)
    assert (tmp_path / "stock/last.ckpt").is_file()
    assert not list((tmp_path / "stock").glob("*/manifest.json"))
    stock = ModelCheckpoint(tmp_path / "stock", every_n_train_steps=2, save_last=True)
    path = tmp_path / "stock/last.ckpt"
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint need to be provided"):
        trainer = fit(base, tmp_path / "new", stock, ckpt_path=path, max_epochs=2)
    assert trainer.global_step == 12


def test_remote_folder(base, tmp_path):
    root = f"memory://{tmp_path.name}/checkpoints"
    fit(base, tmp_path, AdapterCheckpoint(root, every_n_train_steps=1))
    store = open_store(root)
    assert [p.metadata["step"] for p in store.published()] == [6, 5]
    trainer = fit(base, tmp_path, AdapterCheckpoint(root), ckpt_path="last", max_epochs=2)
    assert trainer.global_step == 12
    assert store.newest_valid().metadata["step"] == 12
    trainer = fit(
        base, tmp_path, AdapterCheckpoint(root), ckpt_path=f"{root}/epoch=0-step=6", max_epochs=2, max_steps=7
    )
    assert trainer.global_step == 7


def test_manifest_names_no_machine_secret_and_is_readable(run, job):
    _, _, root = run
    manifest = json.loads((root / "epoch=0-step=6/manifest.json").read_text())
    metadata = manifest["metadata"]
    assert metadata["identity"]["adapter"]["r"] == 4
    assert metadata["versions"]["peft"]
    assert metadata["config"]["module"]["lr"] == 0.01
    assert metadata["continued_from"] == (job.adapter if job.kind == "DPO" else None)
