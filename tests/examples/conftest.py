"""What tests of examples share."""

import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "examples/benchmark"


@pytest.fixture(scope="module")
def benchmark_scripts():
    """Import the scripts of the benchmark as they import one another: by their names, from their folder."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARK))
    yield BENCHMARK
    sys.path.remove(str(BENCHMARK))
    for name in {path.stem for path in BENCHMARK.glob("*.py")} - before:
        sys.modules.pop(name, None)
