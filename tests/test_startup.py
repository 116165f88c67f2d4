import os
import subprocess
import sys

import pytest

CODE = """
import gc, os, sys
from lightning_qlora.startup import quick_imports

given = os.environ.get("TORCHDYNAMO_DISABLE")
with quick_imports():
    import peft
    assert not gc.isenabled()
assert gc.isenabled()
assert gc.get_freeze_count() > 100_000
assert os.environ.get("TORCHDYNAMO_DISABLE") == given

import torch
from torch._dynamo.testing import CompileCounter

counter = CompileCounter()
torch.compile(lambda x: x.sin(), backend=counter)(torch.ones(2))
print(counter.frame_count)
"""


@pytest.mark.parametrize(("given", "graphs"), [({}, "1"), ({"TORCHDYNAMO_DISABLE": "1"}, "0")])
def test_only_what_is_imported_is_not_compiled(given, graphs):
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"} | given
    result = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [graphs]
