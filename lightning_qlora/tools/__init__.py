"""Subcommands beside those of the Trainer: typed functions; the signature is the subcommand, the docstring its help."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_qlora.tools.generate import generate

__all__ = ["TOOLS", "generate"]

TOOLS: dict[str, Callable[..., Any]] = {"generate": generate}
"""Subcommands by name. A parameter called model, datamodule or trainer receives that object of the run."""
