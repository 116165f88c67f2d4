"""A base that is cut up while it loads is the one that is loaded whole, and is nowhere whole; on gloo processes."""

import os
import shutil
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig
from tiny_adapters import write_adapter
from tiny_models import save_tiny_model
from tiny_ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, modeling_utils

from lightning_qlora.checkpoints.identity import IdentityMismatchError, check_adapter
from lightning_qlora.memory import MemoryModel, build_skeleton
from lightning_qlora.memory.optimizer import OptimizerMemory
from lightning_qlora.memory.tracking import MemoryTracker
from lightning_qlora.model import attach_adapters, load_base_model
from lightning_qlora.strategies.sharded_load import ShardedLoad

pytestmark = pytest.mark.filterwarnings("ignore")  # of the forked processes; nothing here depends on warnings

CPU = torch.device("cpu")
FP4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_blocksize=64, bnb_4bit_quant_storage=torch.bfloat16
)


@contextmanager
def ranks_that_load():
    """The context of a run's building, without a run."""
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    with ShardedLoad(mesh, CPU).watching():
        yield
    torch.distributed.destroy_process_group()


def whole_state(model):
    """Every parameter, whole, and the constants of those in 4 bits."""
    state = {}
    for name, parameter in model.named_parameters():
        state[name] = (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
        quantised = getattr(parameter, "quant_state", None)
        if quantised is not None:
            state |= {f"{name}.absmax": quantised.absmax, f"{name}.code": quantised.code}
            if quantised.nested:
                state |= {f"{name}.absmax2": quantised.state2.absmax, f"{name}.offset": quantised.offset}
    return {name: torch.as_tensor(tensor).view(torch.uint8) for name, tensor in state.items() if tensor.ndim}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def cut_layers(model):
    return [any(isinstance(p, DTensor) for p in layer.parameters()) for layer in model.get_decoder().layers]


def save_quantised(folder):
    load_base_model(save_tiny_model(folder / "plain", num_hidden_layers=3)).save_pretrained(folder / "nf4")
    return str(folder / "nf4")


def save_in_files(folder):
    base = save_tiny_model(folder / "one", "qwen3", num_hidden_layers=3, tied=True)
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder / "many", max_shard_size="100KB")
    assert len(list((folder / "many").glob("*.safetensors"))) > 2
    return str(folder / "many")


BASES = {
    "odd sizes": (lambda f: save_tiny_model(f, num_hidden_layers=3, intermediate_size=90), "nf4"),
    "quantised before": (save_quantised, "nf4"),
    "many files, tied": (save_in_files, "nf4"),
    "fused projections": (lambda f: save_tiny_model(f, "phi3", num_hidden_layers=3), FP4),
    "experts": (
        lambda f: save_tiny_model(f, "qwen3_moe", num_hidden_layers=3, num_experts=4, moe_intermediate_size=32,
                                  num_experts_per_tok=2, head_dim=16, decoder_sparse_step=1),
        "nf4",
    ),
    "not quantised": (lambda f: save_tiny_model(f, "gemma3_text", num_hidden_layers=3), None),
}  # fmt: skip


def test_every_base_is_the_one_that_is_loaded_whole(tmp_path):
    paths = {name: save(tmp_path / name.replace(" ", "-")) for name, (save, _) in BASES.items()}

    def load():
        states = {}
        with ranks_that_load():
            for name, (_, quantization) in BASES.items():
                model = load_base_model(paths[name], quantization=quantization, device=CPU)
                assert cut_layers(model) == [False, True, True], name
                states[name] = whole_state(model)
        return states

    for states in run_ranks(tmp_path / "ranks", load, ranks=3):
        for name, (_, quantization) in BASES.items():
            assert_same(states[name], whole_state(load_base_model(paths[name], quantization=quantization)))


ADAPTERS = {
    "plain": ({}, "nf4"),
    "dora": ({"use_dora": True}, "nf4"),
    "changes the base": ({"init_lora_weights": "pissa"}, None),
    "copies of layers": ({"target_modules": ["q_proj"], "modules_to_save": ["down_proj"]}, None),
}


def attach(base, options, quantization):
    torch.manual_seed(5)
    model = load_base_model(base, quantization=quantization, device=CPU)
    lora = LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})
    model = attach_adapters(model, lora)
    model.add_adapter("second", lora)
    with torch.no_grad():
        return model, model.eval()(input_ids=torch.tensor([[5, 6, 7]])).logits


def test_adapters_that_read_the_base_are_the_same(tmp_path):
    base = save_tiny_model(tmp_path / "base", num_hidden_layers=3)

    def load():
        found = {}
        with ranks_that_load():
            for name, (options, quantization) in ADAPTERS.items():
                model, logits = attach(base, options, quantization)
                cut = [p for p in model.parameters() if isinstance(p, DTensor)]
                assert len(cut) >= 12, "what PEFT has wrapped is cut up again, all but the last"
                found[name] = {**whole_state(model), "logits": logits}
        return found

    for found in run_ranks(tmp_path / "ranks", load):
        for name, (options, quantization) in ADAPTERS.items():
            model, logits = attach(base, options, quantization)
            assert_same(found[name], {**whole_state(model), "logits": logits})


def test_an_adapter_knows_its_base_in_parts(tmp_path):
    """By its tensors, whichever folder they lie in."""
    one, two = save_tiny_model(tmp_path / "one", num_hidden_layers=3), str(tmp_path / "two")
    adapter = write_adapter(tmp_path / "adapter", one, manifest=True, task_type="CAUSAL_LM")
    shutil.copytree(one, tmp_path / "copy")
    other = AutoModelForCausalLM.from_pretrained(one)
    other.model.layers[2].mlp.up_proj.weight.data[-1, -1] += 1
    other.save_pretrained(two)

    def check():
        with ranks_that_load():
            check_adapter(adapter, load_base_model(str(tmp_path / "copy"), device=CPU))
            try:
                check_adapter(adapter, load_base_model(two, device=CPU))
            except IdentityMismatchError as error:
                return str(error)

    for message in run_ranks(tmp_path / "ranks", check):
        assert "base.quantized_tensors" in message
        assert "base.tensors" not in message


class HeldMemory(TorchDispatchMode):
    """The most bytes that were alive at once in tensors that operators returned, those of DTensors by their parts."""

    def __init__(self):
        super().__init__()
        self.tracker = MemoryTracker(())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                self.tracker._add(tensor.untyped_storage())
        self.tracker._peak = max(self.tracker._peak, self.tracker.live)
        return result


def loaded_bytes(base, held):
    with held:
        model = load_base_model(base, device=CPU)
    return model, held.tracker.take_peak()


def test_no_rank_holds_more_than_its_part_and_a_layer(tmp_path):
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 32, "vocab_size": 128}
    base = save_tiny_model(tmp_path / "base", **size)
    whole, whole_peak = loaded_bytes(base, HeldMemory())
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in whole.get_decoder().layers]
    outside = sum(p.nbytes for p in whole.parameters()) - sum(layers)
    quantising = 4 * 128 * 256 * 4  # one matrix in float32, and what packing it takes on a CPU
    bound = sum(layers) / 2 + outside + layers[0] + quantising
    assert whole_peak > 1.3 * bound

    def load():
        with ranks_that_load():
            return loaded_bytes(base, HeldMemory())[1]

    lora = LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    skeleton = build_skeleton(whole.config, lora, dtype=torch.float32)
    options = {"autocast": None, "device": "cpu", "sharding": "fsdp", "world_size": 2}
    estimated = MemoryModel(skeleton, OptimizerMemory(0), **options).loading
    peaks = run_ranks(tmp_path / "ranks", load)
    assert max(peaks) < bound
    assert max(peaks) == pytest.approx(estimated, rel=0.1)


def test_transformers_is_as_it_was_after_a_load_that_failed(monkeypatch):
    """It neither reads ahead in threads nor reserves the model's size meanwhile."""
    warmup = modeling_utils.caching_allocator_warmup
    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD", raising=False)

    def fail():
        with ShardedLoad(None, CPU).watching():  # no rank is asked for anything
            assert os.environ["HF_DEACTIVATE_ASYNC_LOAD"] == "1"
            assert modeling_utils.caching_allocator_warmup is not warmup
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ
    assert modeling_utils.caching_allocator_warmup is warmup
    assert not torch.nn.modules.module._global_parameter_registration_hooks
