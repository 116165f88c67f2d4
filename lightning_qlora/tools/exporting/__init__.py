"""A model folder or an adapter folder to one GGUF file: architecture, vocabulary, tensors.

The one place that needs the package gguf.
"""

try:
    import gguf  # noqa: F401
except ModuleNotFoundError as error:
    raise ValueError("GGUF files need the package gguf, which is not installed: pip install gguf.") from error

from lightning_qlora.tools.exporting.architectures import Architecture
from lightning_qlora.tools.exporting.gguf_file import OutputType, write_adapter, write_model
from lightning_qlora.tools.exporting.vocabulary import Vocabulary, read_vocabulary

__all__ = ["Architecture", "OutputType", "Vocabulary", "read_vocabulary", "write_adapter", "write_model"]
