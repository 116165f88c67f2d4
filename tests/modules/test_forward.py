"""When a module's passes are recorded, and what is said where they are not."""

import pytest
import torch
from graph_tape import attend_by_starts, record_on_tape
from tiny_models import random_batch, save_tiny_model
from tiny_run import tiny_module

from lightning_qlora.kernels.checkpointing import MixedPlan


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    module = tiny_module(save_tiny_model(tmp_path_factory.mktemp("base")), dropout=0.0)
    module.configure_model()
    return module


@pytest.fixture
def forward(module):
    yield module._supervised_forward
    module._supervised_forward.graphs = None


def record(forward, wanted=True, plan="none", *, compiled=False, recorder=lambda: None):
    forward.record(wanted, plan, is_compiled=compiled, recorder=recorder)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"recorder": None}, "there are none on a CPU"),
        ({"plan": "offload"}, "host memory"),
        ({"plan": MixedPlan("selective_offload", 1, "none")}, "host memory"),
        ({"compiled": True}, "compile_layers"),
    ],
)
def test_what_stands_in_the_way_is_said_to_who_asked(forward, options, reason, caplog):
    for wanted in (False, "auto", True):
        record(forward, wanted, **options)
        assert forward.graphs is None
        assert (reason in caplog.text) == (wanted is True)


def test_results_that_are_to_be_the_same_to_the_last_bit_are_not_recorded_unasked(forward):
    torch.use_deterministic_algorithms(True)
    try:
        record(forward, "auto")
        assert forward.graphs is None
        record(forward)
        assert forward.graphs is not None
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("place", ["lora_dropout", "attention"])
def test_dropout_is_seen_before_any_number_is_drawn(forward, module, place, monkeypatch):
    layer = module.model.get_base_model().get_decoder().layers[1]
    if place == "attention":
        monkeypatch.setattr(layer.self_attn, "attention_dropout", 0.1)
    else:
        monkeypatch.setitem(layer.mlp.up_proj.lora_dropout._modules, "default", torch.nn.Dropout(0.1))
    record(forward)
    assert forward.graphs is None


def test_anomaly_detection_is_noticed_before_recording(forward):
    record(forward)
    assert forward.graphs.obstacle() is None
    with torch.autograd.set_detect_anomaly(True):
        assert "detect_anomaly" in forward.graphs.obstacle()


def test_graphs_of_a_fit_that_broke_off_are_forgotten(forward):
    for wanted, options in [(False, {}), ("auto", {"compiled": True}), (True, {"plan": "offload"})]:
        record(forward)
        before = forward.graphs
        assert before is not None
        record(forward, wanted, **options)
        assert forward.graphs is None
    record(forward)
    assert forward.graphs is not before


def test_a_batch_that_is_padded_or_evaluated_is_left_to_the_model(forward, module):
    record(forward)
    module.train()
    forward(random_batch((9, 5), packed=False))
    with torch.no_grad():
        forward(random_batch((9, 5)))
    module.eval()
    forward(random_batch((9, 5)))
    module.train()
    assert forward.graphs._batches == 0


def test_room_is_made_once(forward, module, monkeypatch):
    """Before the first validation, of which nobody knows what it takes; with the next batches there is another one."""
    attend_by_starts(monkeypatch)
    record(forward, recorder=record_on_tape)
    module.train()
    replays = []
    for _ in range(2):
        for _ in range(3):
            forward(random_batch((9, 5)))[0].sum().backward()
        replays.append(module.graph_replays)
        module.on_validation_start()
    forward(random_batch((9, 5)))
    assert replays == [1, 1 + 2]
    assert module.graph_replays == 1 + 2 + 1


def test_attention_that_goes_document_by_document_refuses_and_the_run_goes_on(forward, module):
    record(forward)
    module.train()
    expected = [forward(random_batch((9, 5)))[0] for _ in range(3)]
    assert "lengths" in forward.graphs.refusal  # on a CPU there is no other attention
    assert torch.equal(expected[0], expected[1])
    assert torch.equal(expected[0], expected[2])
    assert module.graph_replays == 0
