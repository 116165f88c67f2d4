"""``python -m lightning_qlora``."""

import sys

from lightning_qlora.startup import quick_imports

with quick_imports():
    from lightning_qlora.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
