"""What every test of the suite shares. Tests import the tiny tokenizers and models by ``from tiny import ...``."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's library is imported; no test may reach for a network

import bitsandbytes.functional
import torch

# Tests compare numbers, so they compute in float32 on every machine, as on a CPU without AVX512-BF16.
bitsandbytes.functional.has_avx512bf16 = lambda: False

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
