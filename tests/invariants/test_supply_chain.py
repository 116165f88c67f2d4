"""Nothing that is loaded runs: no pickle, no remote code, no import. Only a configuration is code."""

import functools
import http.server
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny import tiny_tokenizer
from tiny_models import save_tiny_model
from tiny_run import TinyData, tiny_module, tiny_trainer

from lightning_qlora.callbacks import AdapterCheckpoint
from lightning_qlora.checkpoints.identity import identify
from lightning_qlora.checkpoints.publishing import LocalStore
from lightning_qlora.model import attach_adapters, load_adapter, load_base_model
from lightning_qlora.modules.sft import SFTModule
from lightning_qlora.pretrained import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"), tokenizer=tiny_tokenizer("chatml"))


@pytest.fixture(autouse=True)
def sentinel(tmp_path, monkeypatch):
    """A folder that exists only if something ran that must not, and a module on the path that would make it."""
    path = tmp_path / "it-ran"
    monkeypatch.setenv("SENTINEL", str(path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "sentinel_module.py").write_text("import os; os.mkdir(os.environ['SENTINEL'])\nclass Anything: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield path
    sys.modules.pop("sentinel_module", None)
    assert not path.exists()


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["SENTINEL"],)


def test_the_sentinel_works(sentinel):
    pickle.loads(pickle.dumps(Payload()))
    assert sentinel.exists()
    sentinel.rmdir()
    __import__("sentinel_module")
    assert sentinel.exists()
    sentinel.rmdir()


@pytest.fixture
def served(tmp_path):
    """The address of a web server for the folder ``www``."""
    (tmp_path / "www").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


# Pickles


class Data(TinyData):
    test_dataloader = predict_dataloader = TinyData.val_dataloader


@pytest.mark.parametrize("place", ["file", "address"])
@pytest.mark.parametrize("callbacks", [(AdapterCheckpoint,), ()], ids=["AdapterCheckpoint", "no callback"])
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_pickled_checkpoint_does_not_run(base, tmp_path, served, stage, callbacks, place):
    torch.save({"state_dict": {}, "payload": Payload()}, tmp_path / "www" / "evil.ckpt")
    path = f"{served}/evil.ckpt" if place == "address" else str(tmp_path / "www" / "evil.ckpt")
    trainer = tiny_trainer(
        tmp_path, *(kind(tmp_path / "c") for kind in callbacks), enable_checkpointing=bool(callbacks)
    )
    with pytest.raises(pickle.UnpicklingError, match="(?i)weights.only"):
        getattr(trainer, stage)(tiny_module(base), datamodule=Data(), ckpt_path=path)


@pytest.mark.parametrize("place", ["file", "address"])
def test_load_from_checkpoint_does_not_run_pickles(tmp_path, served, place):
    torch.save({"state_dict": {}, "payload": Payload()}, tmp_path / "www" / "evil.ckpt")
    path = f"{served}/evil.ckpt" if place == "address" else str(tmp_path / "www" / "evil.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="(?i)weights.only"):
        SFTModule.load_from_checkpoint(path)


def test_a_published_checkpoint_with_true_digests_is_still_not_run(base, tmp_path):
    def write(staging):
        torch.save({"state_dict": {}, "payload": Payload()}, staging / "trainer.ckpt")

    LocalStore(tmp_path / "c").publish("epoch=0-step=1", write, {"step": 1})
    checkpoint = AdapterCheckpoint(tmp_path / "c", allow_mismatch=["quantization"])
    with pytest.raises(pickle.UnpicklingError, match="(?i)weights.only"):
        tiny_trainer(tmp_path, checkpoint).fit(tiny_module(base), datamodule=Data(), ckpt_path="last")


def test_a_pickled_adapter_is_refused(base, tmp_path):
    LoraConfig(r=4, task_type="CAUSAL_LM", base_model_name_or_path=base).save_pretrained(tmp_path / "a")
    torch.save({"payload": Payload()}, tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"holds no adapter_model\.safetensors"):
        load_adapter(load_base_model(base), tmp_path / "a")


def test_a_pickled_base_is_refused(base, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(Path(base, "config.json").read_text())
    torch.save({"payload": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="could not be loaded"):
        load_base_model(str(folder))


# Code that repositories bring


def with_remote_code(base, folder, file, key, classes):
    """Copy a base, and let one of its JSON files name classes in a Python file beside it."""
    folder.mkdir()
    for path in Path(base).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "remote.py").write_text("import os; os.mkdir(os.environ['SENTINEL'])\nclass Remote: pass\n")
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, key: classes}))
    return str(folder)


def test_code_of_a_base_does_not_run(base, tmp_path):
    classes = {"AutoConfig": "remote.Remote", "AutoModelForCausalLM": "remote.Remote"}
    folder = with_remote_code(base, tmp_path / "base", "config.json", "auto_map", classes)
    content = json.loads(Path(folder, "config.json").read_text())
    Path(folder, "config.json").write_text(json.dumps({**content, "model_type": "of_its_own"}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_base_model(folder)


def test_code_of_a_tokenizer_does_not_run(base, tmp_path):
    classes = {"AutoTokenizer": ["remote.Remote", "remote.Remote"]}
    folder = with_remote_code(base, tmp_path / "base", "tokenizer_config.json", "auto_map", classes)
    try:
        load_tokenizer(folder)  # with the class that transformers has for it, or not at all
    except ValueError as error:
        assert "trust_remote_code" in str(error)  # noqa: PT017 - either is right; that no code ran is checked after


def test_code_for_generation_does_not_run(base, tmp_path):
    folder = with_remote_code(base, tmp_path / "base", "config.json", "custom_generate", "remote")
    (Path(folder) / "custom_generate").mkdir()
    (Path(folder) / "custom_generate" / "generate.py").write_text("import sentinel_module\n")
    module = tiny_module(folder)
    module.configure_model()
    ids = torch.arange(5)[None]
    assert len(module.generate(ids, torch.ones_like(ids), max_new_tokens=2)[0]) <= 2


# Which base it was


def test_the_commit_that_a_branch_meant_is_recorded(base, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for path in Path(base).iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    module = tiny_module("org/tiny", model_kwargs={"cache_dir": str(tmp_path / "hub")})
    tiny_trainer(tmp_path, AdapterCheckpoint(tmp_path / "c"), max_steps=1).fit(module, TinyData())
    identity = LocalStore(tmp_path / "c").newest_valid().metadata["identity"]
    assert identity["base"]["name"] == "org/tiny"
    assert identity["base"]["revision"] == commit


# Imports: only a configuration may ask for them


def test_the_manual_says_that_a_configuration_is_code():
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert "A configuration is code" in text


@pytest.mark.parametrize(
    "options",
    [
        {"megatron_core": "sentinel_module.x", "megatron_config": {"a": 1}},
        {"auto_mapping": {"base_model_class": "Anything", "parent_library": "sentinel_module"}},
        {"peft_type": "sentinel_module.Anything"},
        {"task_type": "sentinel_module.Anything"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_adapters_configuration_imports_nothing(base, tmp_path, options):
    model = attach_adapters(load_base_model(base), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    try:
        identify(load_adapter(load_base_model(base), tmp_path / "a"))
    except (ValueError, KeyError, ImportError) as error:
        named = "sentinel_module" in str(error) or "megatron" in str(error)
        assert named  # loading it without the module is right too


HYPER_PARAMETERS = [
    {"_class_path": "sentinel_module.Anything"},
    {"_class_path": "sentinel_module.Anything", "_instantiator": "lightning.pytorch.cli.instantiate_module"},
    {"_instantiator": "sentinel_module.Anything"},
    {"optimizer": {"class_path": "sentinel_module.Anything"}},
]


@pytest.fixture
def innocent(base, tmp_path):
    """A checkpoint of Lightning's own kind."""
    trainer = tiny_trainer(tmp_path, max_steps=1, enable_checkpointing=False)
    trainer.fit(tiny_module(base), TinyData())
    trainer.save_checkpoint(tmp_path / "innocent.ckpt")
    return torch.load(tmp_path / "innocent.ckpt", weights_only=True)


@pytest.mark.parametrize("more", HYPER_PARAMETERS, ids=lambda more: "+".join(more))
def test_hyperparameters_of_a_checkpoint_import_nothing(base, tmp_path, innocent, more):
    path = tmp_path / "asks.ckpt"
    torch.save({**innocent, "hyper_parameters": {**innocent["hyper_parameters"], **more}}, path)
    tiny_trainer(tmp_path, max_steps=2, enable_checkpointing=False).fit(tiny_module(base), TinyData(), ckpt_path=path)
    if "_instantiator" in more:
        with pytest.raises(ValueError, match="blocked to prevent arbitrary code execution"):
            SFTModule.load_from_checkpoint(path)


def test_a_checkpoint_cannot_ask_for_remote_code(base, tmp_path, innocent):
    classes = {"AutoConfig": "remote.Remote", "AutoModelForCausalLM": "remote.Remote"}
    folder = with_remote_code(base, tmp_path / "evil", "config.json", "auto_map", classes)
    content = json.loads(Path(folder, "config.json").read_text())
    Path(folder, "config.json").write_text(json.dumps({**content, "model_type": "of_its_own"}))
    asked = {**innocent["hyper_parameters"], "model_name": folder, "trust_remote_code": True}
    torch.save({**innocent, "hyper_parameters": asked}, tmp_path / "asks.ckpt")
    with pytest.raises(ValueError, match="trust_remote_code"):
        SFTModule.load_from_checkpoint(tmp_path / "asks.ckpt")


def test_a_refused_checkpoint_path_is_not_parsed_for_classes(base, tmp_path, innocent):
    """LightningCLI would read the hyperparameters of ``--ckpt_path`` into the configuration, class paths and all."""
    asked = {**innocent["hyper_parameters"], "_class_path": "sentinel_module.Anything"}
    torch.save({**innocent, "hyper_parameters": asked}, tmp_path / "asks.ckpt")
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    arguments = [f"--model.model_name={base}", "--data.train=train.jsonl", "--trainer.max_steps=1"]
    arguments += ["--trainer.accelerator=cpu", f"--ckpt_path={tmp_path / 'asks.ckpt'}", "--print_config"]
    command = [sys.executable, "-m", "lightning_qlora", "fit", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "sentinel_module" not in done.stdout
