"""What every test of the suite shares. Tests import the tiny tokenizers and models by ``from tiny import ...``."""

import torch

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
