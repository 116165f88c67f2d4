from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from tiny_models import save_tiny_model
from torch.utils.flop_counter import FlopCounterMode

from lightning_qlora.accounting import count_storage, estimate_memory, logical_numel, optimizer_state_bytes, step_flops
from lightning_qlora.model import attach_adapters, load_base_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"))


def lora_model(folder, quantization="nf4"):
    model = load_base_model(folder, quantization=quantization)
    return attach_adapters(model, LoraConfig(r=4, target_modules="all-linear"))


def test_four_bit_weights_are_counted_unpacked(folder):
    plain = sum(p.numel() for p in load_base_model(folder, quantization=None).parameters())
    quantised = lora_model(folder)

    storages = {(s.kind, s.trainable): s for s in count_storage(quantised)}

    assert sum(s.numel for s in storages.values() if not s.trainable) == plain
    nf4 = storages["nf4", False]
    assert 0 < nf4.nbytes - nf4.numel // 2 < 14 * 1300  # half a byte each, and the constants of 14 layers
    adapters = storages["float32", True]
    assert (adapters.numel, adapters.nbytes) == (quantised.num_parameters(only_trainable=True), 4 * adapters.numel)
    assert [s.trainable for s in count_storage(quantised)] == [False, False, True]
    assert sum(logical_numel(p) for p in quantised.parameters()) == sum(s.numel for s in storages.values())


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_flops_are_those_that_torch_counts(folder, quantization):
    """torch's counter sees the products of an unquantised model; attention is left out, which it counts uncausally.

    The first layer's queries, keys and values need no gradient of their input, the frozen embedding's output.
    """
    tokens, supervised = 24, 24
    flops = step_flops(lora_model(folder, quantization))
    model = lora_model(folder, None)
    ids = torch.arange(tokens)[None] + 3
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "attention" not in str(op))

    counted = flops([tokens], supervised)

    unneeded = 2 * tokens * (64 * (64 + 32 + 32) + 3 * 4 * 64)
    assert counted - tokens**2 * flops.per_squared_length - unneeded == pytest.approx(products, rel=1e-4)
    assert flops.per_squared_length == 6 * 2 * 64


def test_flops_grow_with_the_square_of_each_document(folder):
    flops = step_flops(lora_model(folder))

    assert flops([10, 10], 0) - 20 * flops.per_token == 200 * flops.per_squared_length
    assert flops([20], 5) - flops([20], 0) == 5 * flops.per_supervised_token


def test_memory_by_item(folder):
    model = lora_model(folder)
    trainable = [p for p in model.parameters() if p.requires_grad]
    numel = sum(p.numel() for p in trainable)
    arguments = {"optimizers": [torch.optim.AdamW(trainable)], "dtype": torch.float32}

    full = estimate_memory(model, num_tokens=100, checkpointing=False, **arguments)
    checkpointed = estimate_memory(model, num_tokens=100, checkpointing=True, **arguments)

    assert (full.gradients, full.optimizer) == (4 * numel, 8 * numel)
    assert checkpointed.activations < full.activations
    assert checkpointed[:3] == full[:3]
    assert full.total == sum(full)
    assert estimate_memory(model, num_tokens=200, checkpointing=False, **arguments).activations == 2 * full.activations


def test_activations_are_near_what_autograd_keeps(folder):
    """The estimate of what a layer keeps, against the bytes that autograd really saves."""
    model = lora_model(folder, None)
    ids = torch.randint(3, 500, (1, 256))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.get_base_model().get_decoder()(input_ids=ids, use_cache=False)
    estimate = estimate_memory(model, num_tokens=256, optimizers=[], dtype=torch.float32, checkpointing=False)

    assert output.last_hidden_state.requires_grad
    assert 0.6 < estimate.activations / sum(saved.values()) < 1.4


@pytest.mark.parametrize(
    ("optimizer", "bytes_per_parameter"),
    [
        (torch.optim.AdamW, 8),
        (torch.optim.SGD, 0),
        (lambda params: torch.optim.SGD(params, momentum=0.9), 4),
        (torch.optim.Adagrad, 4),
    ],
)
def test_optimizer_state_is_what_the_optimizer_allocates(optimizer, bytes_per_parameter):
    parameter = torch.nn.Parameter(torch.zeros(1000))
    built = optimizer([parameter])
    assert optimizer_state_bytes(built) == 1000 * bytes_per_parameter

    parameter.grad = torch.ones(1000)
    built.step()
    state = [v for v in built.state[parameter].values() if isinstance(v, torch.Tensor) and v.numel() == 1000]
    assert sum(v.nbytes for v in state) == 1000 * bytes_per_parameter
