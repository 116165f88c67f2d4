"""What is faster than the plain path, each beside its reference."""

from lightning_qlora.kernels.attention import DOCUMENT_ATTENTION, document_attention

__all__ = ["DOCUMENT_ATTENTION", "document_attention"]
