import importlib

import pytest
import torch
from torch import nn

from lightning_qlora.strategies import integer_parameters as module


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu"])
def test_parameters_of_integers_ask_for_no_gradient_where_torch_would(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    fsdp = importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_param")
    with module.integer_parameters():
        assert (fsdp.nn is nn) == (version == "2.13.0+cpu")
        assert fsdp.nn.Module is nn.Module
        assert fsdp.nn.Parameter(torch.ones(2)).requires_grad
        if fsdp.nn is not nn:
            assert not fsdp.nn.Parameter(torch.ones(2, dtype=torch.uint8)).requires_grad
    assert fsdp.nn is nn
