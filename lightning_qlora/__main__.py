"""``python -m lightning_qlora``."""

import sys

from lightning_qlora.cli import main

if __name__ == "__main__":
    sys.exit(main())
