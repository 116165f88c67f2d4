from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from tiny_models import save_tiny_model
from torch.utils.flop_counter import FlopCounterMode

from lightning_qlora.accounting import count_storage, logical_numel, step_flops
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
