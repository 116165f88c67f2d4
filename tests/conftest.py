"""What every test of the suite shares. Tests import the tiny tokenizers and models by ``from tiny import ...``."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's library is imported; no test may reach for a network

import torch

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
