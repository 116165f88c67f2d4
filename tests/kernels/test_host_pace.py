"""A GPU that is done before its host is told from one that is not."""

import pytest
import torch

from lightning_qlora.kernels import host_pace
from lightning_qlora.kernels.host_pace import HostPace

CLOCK = {"host": 0.0, "gpu": 0.0}
"""In milliseconds: until when each is busy."""
ENDS = []
"""When kernels are done."""
MOST = 1000  # that may wait


class Event:
    def __init__(self, enable_timing):
        self.at = 0.0

    def record(self):
        self.at = CLOCK["gpu"] = max(CLOCK["gpu"], CLOCK["host"])

    def query(self):
        return self.at <= CLOCK["host"]

    def synchronize(self):
        CLOCK["host"] = max(CLOCK["host"], self.at)

    def elapsed_time(self, other):
        return other.at - self.at


def launch(host_ms, gpu_ms, kernels=10):
    for _ in range(kernels):
        CLOCK["host"] += host_ms / kernels
        if len(ENDS) >= MOST:
            CLOCK["host"] = max(CLOCK["host"], ENDS[-MOST])
        CLOCK["gpu"] = max(CLOCK["gpu"], CLOCK["host"]) + gpu_ms / kernels
        ENDS.append(CLOCK["gpu"])


@pytest.fixture
def clock(monkeypatch):
    """Stands in for a GPU, whose cycles are unlike any."""
    CLOCK.update(host=0.0, gpu=0.0)
    ENDS.clear()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: CLOCK.update(host=max(CLOCK.values())))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: CLOCK.update(gpu=CLOCK["gpu"] + cycles / 123_456))
    monkeypatch.setattr(host_pace.time, "perf_counter", lambda: CLOCK["host"] / 1000)


def paced(*works):
    pace = HostPace()
    for work in works:
        launch(100, 1000, 900)  # what a step does besides
        assert not pace.is_known
        with pace:
            launch(*work)
    return pace


@pytest.mark.parametrize(("host_ms", "gpu_ms", "is_slow"), [(100, 30, True), (100, 150, False), (100, 96, False)])
def test_both_are_timed_alone(clock, host_ms, gpu_ms, is_slow):
    pace = paced(*[(host_ms, gpu_ms)] * 2)
    assert pace.is_known
    assert pace.host_is_slow() == is_slow
    assert (pace.host_ms, pace.gpu_ms) == pytest.approx((host_ms, gpu_ms), rel=0.01)
    assert str(pace).split(" ms")[0] == str(gpu_ms)


def test_a_host_that_was_busy_otherwise_is_timed_again(clock):
    pace = paced((100, 60), (400, 60), (100, 60))  # the GPU woke in the middle of the second
    assert pace.is_known
    assert pace.host_is_slow()
    assert pace.gpu_ms == pytest.approx(60, rel=0.01)


@pytest.mark.parametrize(("host_ms", "gpu_ms", "is_slow"), [(200, 100, True), (200, 400, False), (200, 1000, False)])
def test_of_more_kernels_than_may_wait_it_is_known_as_well(clock, host_ms, gpu_ms, is_slow):
    pace = paced(*[(host_ms, gpu_ms, 2500)] * 3)
    assert pace.is_known
    assert pace.host_is_slow() == is_slow


@pytest.mark.gpu
def test_who_is_slow_is_seen():
    numbers, square = torch.zeros(8, device="cuda"), torch.ones(4096, 4096, device="cuda")
    many_kernels, long_kernels = HostPace(), HostPace()
    for _ in range(3):
        for _ in range(800):  # compiled or loaded
            numbers.add_(1)
        square @ square
    while not many_kernels.is_known:
        with many_kernels:
            for _ in range(800):
                numbers.add_(1)
    while not long_kernels.is_known:
        with long_kernels:
            for _ in range(20):
                square @ square
    assert many_kernels.host_is_slow()
    assert not long_kernels.host_is_slow()
    assert 0 < many_kernels.gpu_ms < many_kernels.host_ms < 50 < long_kernels.gpu_ms
