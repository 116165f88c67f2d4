import pytest
import torch

from lightning_qlora.transfers import Readback


def test_what_was_sent_is_what_is_read():
    numbers = torch.arange(6.0, requires_grad=True).view(2, 3)
    sent = Readback(numbers)
    with torch.no_grad():
        numbers.zero_()

    assert torch.equal(sent.wait(), torch.arange(6.0).view(2, 3))
    assert not sent.wait().requires_grad
    assert torch.equal(sent.wait(), sent.wait())


@pytest.mark.gpu
def test_a_gpu_that_is_busy_keeps_nobody_waiting():
    number = torch.ones(3, device="cuda")
    Readback(number).wait()
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # clock cycles
    is_idle = torch.cuda.Event()
    is_idle.record()
    sent = Readback(number)
    number.zero_()  # behind it

    assert not is_idle.query()
    assert sent.wait().tolist() == [1.0, 1.0, 1.0]
    assert is_idle.query()
