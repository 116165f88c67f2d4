import types

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig
from tiny_models import save_tiny_model
from tiny_ranks import run_ranks
from tiny_run import TinyData, tiny_module, tiny_trainer
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lightning_qlora.model import attach_adapters, load_base_model, nf4
from lightning_qlora.strategies import (
    FSDP2Strategy,
    QLoRADDPStrategy,
    check_is_sharded,
    check_strategy,
    default_strategy,
)


def deepspeed(stage):
    strategy = object.__new__(DeepSpeedStrategy)  # it cannot be made without the package
    strategy.config = {"zero_optimization": {"stage": stage}}
    return strategy


class OtherStrategy(Strategy):
    """Of another package."""


OtherStrategy.__abstractmethods__ = frozenset()


def of_precision(strategy, plugin):
    strategy.precision_plugin = plugin
    return strategy


@pytest.mark.parametrize(
    "strategy",
    [
        SingleDeviceStrategy(),
        DDPStrategy(),
        DDPStrategy(find_unused_parameters=True),
        QLoRADDPStrategy(),
        FSDP2Strategy(),
        ModelParallelStrategy(2, 1),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_strategies_that_have_an_equality_test(strategy):
    check_strategy(strategy)


@pytest.mark.parametrize(
    ("strategy", "reason", "instead"),
    [
        (FSDPStrategy(), "flattens all weights", "fsdp_qlora"),
        (deepspeed(1), "an engine of its own", "ddp"),
        (deepspeed(2), "an engine of its own", "ddp"),
        (deepspeed(3), "ZeRO stage 3", "fsdp_qlora"),
        (ModelParallelStrategy(1, 2), "tensor_parallel_size=2", "fsdp_qlora"),
        (ModelParallelStrategy(), "tensor_parallel_size='auto'", "tensor_parallel_size: 1"),
        (
            of_precision(FSDP2Strategy(), MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))),
            "16-mixed",
            "bf16-mixed",
        ),
        (object.__new__(OtherStrategy), "OtherStrategy", "ddp"),
    ],
    ids=["fsdp1", "zero1", "zero2", "zero3", "tensor parallel", "model parallel", "16-mixed", "unknown"],
)
def test_every_other_strategy_is_refused_with_what_to_write_instead(strategy, reason, instead):
    with pytest.raises(MisconfigurationException, match=reason) as raised:
        check_strategy(strategy)
    assert instead in str(raised.value)


@pytest.mark.filterwarnings("ignore")  # of the forked processes
def test_fsdp1_cannot_hold_a_layer_of_qlora(tmp_path):
    """What torch itself says, as packed bytes come and as if they were of the norms' dtype."""
    base = save_tiny_model(tmp_path / "base", num_hidden_layers=1)

    def wrap(storage):
        options = nf4(torch.bfloat16)
        options.bnb_4bit_quant_storage = storage
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = attach_adapters(load_base_model(base, quantization=options, dtype=torch.bfloat16), lora)
        policy = ModuleWrapPolicy({LlamaDecoderLayer})
        try:
            FullyShardedDataParallel(
                model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
            )
        except ValueError as error:
            return str(error)

    def run():
        torch.distributed.init_process_group("gloo")
        return [wrap(torch.uint8), wrap(torch.bfloat16)]

    for packed, floating in run_ranks(tmp_path / "ranks", run):
        assert "integer dtype" in packed
        assert "uniform dtype but got torch.bfloat16 and torch.float32" in floating


def test_a_module_refuses_before_it_loads_anything(tmp_path):
    module = tiny_module(save_tiny_model(tmp_path / "base", num_hidden_layers=1))
    trainer = tiny_trainer(tmp_path, max_epochs=1)
    module.trainer = types.SimpleNamespace(strategy=FSDPStrategy(), precision="32-true", precision_plugin=None)
    with pytest.raises(MisconfigurationException, match="FSDP1"):
        module.setup("fit")
    assert module.model is None
    module.trainer = trainer
    trainer.fit(module, datamodule=TinyData(batches=1))  # what is supported still runs


def test_sharding_left_to_a_module_that_does_none_is_refused():
    whole = [nn.Parameter(torch.zeros(2))]
    with pytest.raises(MisconfigurationException, match="train by itself"):
        check_is_sharded(ModelParallelStrategy(2, 1), whole)
    check_is_sharded(DDPStrategy(), whole)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"strategy": "ddp"}, "ddp_qlora"),
        ({"strategy": "auto"}, "auto"),
        ({"strategy": "auto", "devices": 2}, "ddp_qlora"),
        ({"strategy": "auto", "devices": "2"}, "ddp_qlora"),
        ({"strategy": "auto", "num_nodes": 2}, "ddp_qlora"),
        ({"strategy": "auto", "devices": 2, "accelerator": "tpu"}, "auto"),
        ({"strategy": "ddp_spawn", "devices": 2}, "ddp_spawn"),
        ({"strategy": "fsdp_qlora", "devices": 2}, "fsdp_qlora"),
    ],
    ids=str,
)
def test_what_plain_names_mean_on_cpus(given, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_strategy(**{"accelerator": "auto", "devices": "auto", "num_nodes": 1, **given}) == expected


@pytest.mark.parametrize(
    ("devices", "expected"), [("auto", "ddp_qlora"), (1, "auto"), ([0, 3], "ddp_qlora"), (-1, "ddp_qlora")]
)
def test_what_auto_means_on_gpus(devices, expected, monkeypatch):
    for name in ("torch.cuda.is_available", "lightning.fabric.accelerators.cuda.CUDAAccelerator.is_available"):
        monkeypatch.setattr(name, lambda: True)
    for name in (
        "lightning.pytorch.accelerators.cuda.num_cuda_devices",
        "lightning.fabric.accelerators.cuda.num_cuda_devices",
    ):
        monkeypatch.setattr(name, lambda: 4)
    assert default_strategy("auto", accelerator="auto", devices=devices, num_nodes=1) == expected


def test_an_own_strategy_is_taken_as_it_is():
    own = DDPStrategy(find_unused_parameters=True)
    assert default_strategy(own, accelerator="cpu", devices=2, num_nodes=1) is own


def test_strategies_are_chosen_by_name():
    assert isinstance(StrategyRegistry.get("ddp_qlora"), QLoRADDPStrategy)
    assert isinstance(StrategyRegistry.get("fsdp_qlora"), FSDP2Strategy)
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="fsdp_qlora", logger=False, enable_checkpointing=False)
    assert isinstance(trainer.strategy, FSDP2Strategy)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(2, 2)])


@pytest.mark.parametrize(
    ("module", "given", "expected"),
    [
        (nn.Linear(2, 2), {}, {}),
        (Expert(), {}, {"find_unused_parameters": True}),
        (Expert(), {"find_unused_parameters": False}, {"find_unused_parameters": False}),
        (nn.Linear(2, 2), {"broadcast_buffers": True}, {"broadcast_buffers": True}),
        (nn.Linear(2, 2), {"bucket_cap_mb": 25}, {"bucket_cap_mb": 25}),
        (nn.Linear(2, 2), {"num_nodes": 2}, {"bucket_cap_mb": None}),
    ],
)
def test_options_of_ddp(module, given, expected, monkeypatch):
    """What torch's wrapper is given, and that it is told to leave frozen weights where they are."""
    seen = {}

    def wrap(**options):
        seen.update(options)

    monkeypatch.setattr("lightning.pytorch.strategies.ddp.DistributedDataParallel", wrap)
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), module)
    model[0].register_buffer("constant", torch.zeros(1))
    asked = {name: value for name, value in given.items() if name != "num_nodes"}
    strategy = QLoRADDPStrategy(parallel_devices=[torch.device("cpu")], **asked)
    strategy.num_nodes = given.get("num_nodes", 1)  # as Lightning's connector does
    monkeypatch.setattr(type(strategy), "root_device", torch.device("cpu"))
    strategy._setup_model(model)
    options = {k: v for k, v in seen.items() if k not in ("module", "device_ids")}
    assert {"bucket_cap_mb": None, **options} == {"gradient_as_bucket_view": True, "bucket_cap_mb": 256, **expected}
    buffers = [] if given.keys() & {"broadcast_buffers"} else ["0.constant"]
    assert model._ddp_params_and_buffers_to_ignore == ["0.weight", "0.bias", *buffers]
