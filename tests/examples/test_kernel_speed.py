"""The benchmark of the kernels on the CPU, in miniature."""

from __future__ import annotations

import importlib
import re
import sys

import pytest
import torch

TINY = ["--device", "cpu", "--shape", "tiny", "--tokens", "40", "--rank", "8", "--repeats", "2"]


@pytest.fixture
def kernels(benchmark_scripts, monkeypatch):
    module = importlib.import_module("kernel_speed")
    monkeypatch.setattr(sys, "argv", ["kernel_speed.py", *TINY])
    return module


def test_tables_of_every_matrix_and_group(kernels, capsys):
    kernels.main()
    first, *rows = capsys.readouterr().out.strip().splitlines()
    assert f"torch {torch.__version__}" in first
    assert "40 tokens, rank 8" in first
    tables = [row for row in rows if row.startswith("|")]
    columns = [row.count("|") for row in tables]
    assert columns == [8] * 5 + [9] * 6
    assert [row.count("**") for row in tables[-4:]] == [4] * 4  # the chosen way, forward and backward
    speeds = [float(each.replace(",", "")) for each in re.findall(r"([\d,.]+) us", "\n".join(tables))]
    assert len(speeds) == 9
    assert min(speeds) > 0


def test_ways_that_differ_are_no_measurement(kernels, monkeypatch):
    run = kernels.run_forward
    monkeypatch.setattr(
        kernels, "run_forward", lambda *arguments: [(1 + 0.1 * arguments[-1]) * each for each in run(*arguments)]
    )
    with pytest.raises(AssertionError, match="the two ways of Q, K, V differ by"):
        kernels.main()
