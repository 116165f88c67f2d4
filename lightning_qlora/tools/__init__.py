"""Subcommands beside those of the Trainer: typed functions; the signature is the subcommand, the docstring its help."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_qlora.tools.compare import compare
from lightning_qlora.tools.dry_run import dry_run
from lightning_qlora.tools.estimate import estimate
from lightning_qlora.tools.export import export
from lightning_qlora.tools.generate import generate
from lightning_qlora.tools.inspect_data import inspect_data
from lightning_qlora.tools.merge import merge
from lightning_qlora.tools.plot import plot

__all__ = [
    "PLANNING_TOOLS",
    "TOOLS",
    "compare",
    "dry_run",
    "estimate",
    "export",
    "generate",
    "inspect_data",
    "merge",
    "plot",
]

TOOLS: dict[str, Callable[..., Any]] = {
    "compare": compare,
    "dry_run": dry_run,
    "estimate": estimate,
    "export": export,
    "generate": generate,
    "inspect": inspect_data,
    "merge": merge,
    "plot": plot,
}
"""Subcommands by name. A parameter called model, datamodule or trainer receives that object of the run."""

PLANNING_TOOLS: frozenset[str] = frozenset({"estimate", "inspect"})
"""Tools that read the trainer's settings and never run it, so that theirs is made without the run's devices."""
