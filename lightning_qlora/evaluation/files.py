"""Results as files that a reader never finds half written."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: Path, text: str) -> None:
    """Write a text file in one piece, its folder too where there is none.

    Args:
        path: The file; replaced if it is there.
        text: All that it is to hold, as UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.partial")
    staging.write_text(text, encoding="utf-8")
    os.replace(staging, path)
