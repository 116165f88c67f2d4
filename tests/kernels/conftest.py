"""What tests of several kernels share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from lightning_qlora import kernels


@pytest.fixture
def interpret(monkeypatch):
    """From a module of Triton's kernels, by name, to the same with its code run by Triton's interpreter on the CPU."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def load(name):
        path = Path(kernels.__file__).with_name(f"{name}.py")
        spec = importlib.util.spec_from_file_location(f"interpreted_{name}", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load
