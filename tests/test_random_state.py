"""States of all generators: nothing drawn, something drawn, and drawn again."""

import random

import numpy as np
import pytest
import torch

from lightning_qlora.random_state import are_equal, capture_random_state, restore_random_state


@pytest.mark.parametrize("draw", [random.random, np.random.rand, np.random.randn, lambda: torch.rand(()).item()])
def test_a_number_that_is_drawn_is_noticed_and_drawn_again_after_restoring(draw):
    before = capture_random_state()
    assert are_equal(before, capture_random_state())
    drawn = draw()
    assert not are_equal(before, capture_random_state())
    restore_random_state(before)
    assert are_equal(before, capture_random_state())
    assert draw() == drawn
