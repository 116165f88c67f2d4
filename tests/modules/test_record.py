import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig
from tiny_models import random_batch, save_tiny_model
from tiny_run import TinyData, assert_equal, final_state, tiny_module, tiny_trainer
from transformers import BitsAndBytesConfig

from lightning_qlora.callbacks import AdapterCheckpoint
from lightning_qlora.modules import SFTModule, WarmupLinear
from lightning_qlora.modules.record import check_lora, check_quantization, plain_lora, plain_quantization

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # the saving callback is left out
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"))


def fit(base, root, *callbacks, ckpt_path=None, max_epochs=1, **options):
    L.seed_everything(0, verbose=False)
    module = tiny_module(base, **{"dropout": 0.0, **options})
    run = tiny_trainer(root, *callbacks, max_epochs=max_epochs, enable_checkpointing=bool(callbacks))
    run.fit(module, TinyData(), ckpt_path=ckpt_path)
    return run, module


def saved(base, root, **options):
    run, module = fit(base, root, **options)
    run.save_checkpoint(root / "x.ckpt")
    return root / "x.ckpt", module


@torch.no_grad()
def loss(module):
    return float(module.eval().token_loss(random_batch((9, 5, 12), vocab_size=100)).loss_sum)


@pytest.mark.parametrize(
    "options",
    [
        {"lora": {"lora_alpha": 256, "rank_pattern": {"q_proj": 2}}},
        {"lora": {"r": 2, "use_dora": True, "target_modules": ["v_proj", "q_proj"]}},
        {"lora": {"modules_to_save": ["norm"], "init_lora_weights": "pissa"}, "quantization": None},
        {"quantization": None},
        {"quantization": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")},
    ],
    ids=["alpha", "dora", "pissa", "unquantized", "fp4"],
)
def test_a_checkpoint_says_which_adapters_and_which_quantization_to_load(base, tmp_path, options):
    path, module = saved(base, tmp_path, **options)
    loaded = SFTModule.load_from_checkpoint(path)
    assert loss(loaded) == pytest.approx(loss(module), rel=1e-5)
    with open(path, "rb") as stream:
        assert loss(SFTModule.load_from_checkpoint(stream)) == loss(loaded)
    record = torch.load(path, weights_only=True)["lightning_qlora"]
    assert record["lora"] == plain_lora(loaded.model.active_peft_config)
    assert record["quantization"] == plain_quantization(loaded.quantization)
    resumed, _ = fit(base, tmp_path, ckpt_path=path, max_epochs=2, **options)
    assert resumed.global_step == 12


class Command(LightningCLI):
    """Makes a module as the command line does, and runs nothing."""

    def __init__(self, arguments):
        super().__init__(SFTModule, run=False, args=arguments, save_config_callback=None, seed_everything_default=0)


def test_so_does_one_of_a_module_that_the_command_line_made(base, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["fit"])  # LightningCLI warns where the process has arguments of its own
    lora = ["--model.lora=peft.LoraConfig", "--model.lora.r=3", "--model.lora.target_modules=all-linear"]
    command = Command([f"--model.model_name={base}", "--model.quantization=null", *lora])
    run = tiny_trainer(tmp_path, max_epochs=1)
    run.fit(command.model, TinyData())
    run.save_checkpoint(tmp_path / "x.ckpt")
    loaded = SFTModule.load_from_checkpoint(tmp_path / "x.ckpt")
    assert loss(loaded) == pytest.approx(loss(command.model), rel=1e-5)


def test_what_is_given_counts_and_older_checkpoints_load_as_they_did(base, tmp_path):
    path, module = saved(base, tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    for name in ("lora", "quantization", "optimizers"):
        del checkpoint["lightning_qlora"][name]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    loaded = SFTModule.load_from_checkpoint(tmp_path / "old.ckpt", lora=module.lora)
    assert loss(loaded) == pytest.approx(loss(module), rel=1e-5)
    fit(base, tmp_path, ckpt_path=tmp_path / "old.ckpt", max_epochs=2, lora={"lora_alpha": 9}, quantization=None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora": {"lora_alpha": 256}}, "trained with lora_alpha=8; this run's have lora_alpha=256"),
        ({"lora": {"r": 2}}, "trained with r=4; this run's have r=2"),
        ({"quantization": None}, "quantization=nf4; this run has quantization=None"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_other_options_are_named(base, tmp_path, options, said):
    path, _ = saved(base, tmp_path)
    with pytest.raises(MisconfigurationException, match=said):
        fit(base, tmp_path, ckpt_path=path, max_epochs=2, **options)
    with pytest.raises(MisconfigurationException, match=said):
        tiny_trainer(tmp_path).validate(tiny_module(base, **options), TinyData(), ckpt_path=path)


def test_another_quantization_may_be_meant(base, tmp_path):
    path, _ = saved(base, tmp_path)
    fit(base, tmp_path, ckpt_path=path, max_epochs=2, quantization=None, allow_mismatch=["quantization"])
    lenient = AdapterCheckpoint(allow_mismatch=["quantization", "adapter"])
    fit(base, tmp_path, lenient, ckpt_path=path, max_epochs=2, quantization=None, lora={"lora_alpha": 9})


def test_what_only_looks_different_is_the_same():
    given = LoraConfig(r=4, target_modules=["b", "a"], task_type="CAUSAL_LM", init_lora_weights="gaussian")
    completed = LoraConfig(r=4, target_modules={"a", "b"}, task_type="CAUSAL_LM", lora_dropout=0.1)
    check_lora({"lora": plain_lora(given)}, completed)
    with pytest.raises(MisconfigurationException, match="init_lora_weights=True; this run's have init_lora_weights=p"):
        check_lora({"lora": plain_lora(given)}, LoraConfig(r=4, init_lora_weights="pissa"))
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    check_quantization({"quantization": plain_quantization(nf4)}, "nf4")
    check_quantization({"quantization": "int8"}, BitsAndBytesConfig(load_in_8bit=True))


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimizer": sgd}, "with optimizer=torch.AdamW; this run has optimizer=torch.SGD"),
        ({"lr_scheduler": None}, "with lr_scheduler=lightning_qlora.WarmupCosine; this run has lr_scheduler=None"),
        ({"lr_scheduler": WarmupLinear}, "this run has lr_scheduler=lightning_qlora.WarmupLinear, which cannot go on"),
    ],
    ids=["optimizer", "constant", "schedule"],
)
def test_another_optimizer_or_schedule_does_not_go_on_from_a_checkpoint(base, tmp_path, options, said):
    path, _ = saved(base, tmp_path)
    with pytest.raises(MisconfigurationException, match=f"{said}.*model.adapter="):
        fit(base, tmp_path, ckpt_path=path, max_epochs=2, **options)
    tiny_trainer(tmp_path).validate(tiny_module(base, **options), TinyData(), ckpt_path=path)


@pytest.mark.filterwarnings("ignore:.*lr_find.*:UserWarning")
def test_a_module_that_is_trained_again_may_have_another_optimizer(base, tmp_path):
    _, module = fit(base, tmp_path)
    module.optimizer, module.lr_scheduler = sgd, None
    finder = LearningRateFinder(num_training_steps=3, early_stop_threshold=None)
    tiny_trainer(tmp_path, finder, max_epochs=1).fit(module, TinyData())


def test_averaged_weights_are_resumed(base, tmp_path):
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    whole, _ = fit(base, tmp_path, EMAWeightAveraging(decay=0.5), saving)
    resumed, _ = fit(base, tmp_path, EMAWeightAveraging(decay=0.5), ckpt_path=tmp_path / "step=4.ckpt")
    assert_equal(final_state(resumed), final_state(whole))


def test_trained_tensors_that_are_missing_are_still_missed(base, tmp_path):
    _, module = fit(base, tmp_path)
    state = module.state_dict()
    gone = next(iter(state))
    del state[gone]
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict(state)
    assert module.load_state_dict(state, strict=False).missing_keys == [gone]


def test_an_average_of_nothing_is_refused(base, tmp_path):
    with pytest.raises(MisconfigurationException, match="EMAWeightAveraging"):
        fit(base, tmp_path, StochasticWeightAveraging(1e-3))


class Counting(SFTModule):
    def on_model_built(self):
        self.register_buffer("tokens", torch.zeros(()))
        self.register_buffer("scratch", torch.zeros(()), persistent=False)

    def training_step(self, batch, batch_idx):
        self.tokens += batch["input_ids"].numel()
        return super().training_step(batch, batch_idx)


def test_buffers_of_a_subclass_are_kept(base, tmp_path):
    path, module = saved(base, tmp_path, kind=Counting)
    assert set(module.state_dict()) == {*module._adapter_keys, "tokens"}
    assert 0 < module.tokens == Counting.load_from_checkpoint(path).tokens
    _, resumed = fit(base, tmp_path, ckpt_path=path, max_epochs=2, kind=Counting)
    assert resumed.tokens == 2 * module.tokens


class Fixed(SFTModule):
    """Somebody's module with adapters of its own."""

    def __init__(self, model_name, **options):
        super().__init__(model_name, lora=LoraConfig(r=2, lora_alpha=64, task_type="CAUSAL_LM"), **options)


def test_a_subclass_with_adapters_of_its_own_loads(base, tmp_path):
    module, run = Fixed(base, lr_scheduler=None, untrained_tokens="ignore"), tiny_trainer(tmp_path, max_epochs=1)
    run.fit(module, TinyData())
    run.save_checkpoint(tmp_path / "x.ckpt")
    assert loss(Fixed.load_from_checkpoint(tmp_path / "x.ckpt")) == pytest.approx(loss(module), rel=1e-5)
