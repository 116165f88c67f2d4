"""Variables of the environment by which libraries decide at each use, so that they can be set for a while."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["WITHOUT_TOKENIZER_THREADS", "environment"]

WITHOUT_TOKENIZER_THREADS = {"TOKENIZERS_PARALLELISM": "false"}
"""For processes that are the parallelism, and for forks: these have no threads of their parent's, and would wait for
them. Where the variable is not set, tokenizers sees to forks itself, and says so at each."""


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set variables of this process' environment, and of those that it starts meanwhile."""
    given = {name: os.environ[name] for name in values if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            os.environ.pop(name, None)
        os.environ.update(given)
