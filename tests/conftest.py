"""What every test of the suite shares. Tests import the tiny tokenizers and models by ``from tiny import ...``."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's library is imported; no test may reach for a network

import bitsandbytes.functional
import huggingface_hub.constants
import torch

# A plugin of pytest may have imported the library by now; then the variable above comes too late for it.
huggingface_hub.constants.HF_HUB_OFFLINE = True

# Tests compare numbers, so they compute in float32 on every machine, as on a CPU without AVX512-BF16.
bitsandbytes.functional.has_avx512bf16 = lambda: False

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
