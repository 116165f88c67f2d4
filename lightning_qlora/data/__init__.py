"""Files of chats -> tokens with exact masks -> batches: what the data modules are made of, each part usable alone."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_qlora.data.chat_template import ChatTemplate
    from lightning_qlora.data.collators import PackedCollator, PaddedCollator, PromptCollator
    from lightning_qlora.data.datamodule import SFTDataModule
    from lightning_qlora.data.documents import Document
    from lightning_qlora.data.encoding import RowEncoder
    from lightning_qlora.data.loading import EpochSampler
    from lightning_qlora.data.packing import BatchPlan, group_by_length, pack_documents
    from lightning_qlora.data.preference_datamodule import PreferenceDataModule
    from lightning_qlora.data.preparation import Prepared, prepare
    from lightning_qlora.data.prepared import PreparedDocuments
    from lightning_qlora.data.prompts import read_prompts
    from lightning_qlora.data.report import PreparationReport, SourceReport
    from lightning_qlora.data.sources import DataSource, Sources, read_rows
    from lightning_qlora.data.truncation import OverlongPolicy, fit_rows

__all__ = [
    "BatchPlan",
    "ChatTemplate",
    "DataSource",
    "Document",
    "EpochSampler",
    "OverlongPolicy",
    "PackedCollator",
    "PaddedCollator",
    "PreferenceDataModule",
    "PreparationReport",
    "Prepared",
    "PreparedDocuments",
    "PromptCollator",
    "RowEncoder",
    "SFTDataModule",
    "SourceReport",
    "Sources",
    "fit_rows",
    "group_by_length",
    "pack_documents",
    "prepare",
    "read_prompts",
    "read_rows",
]

_MODULE_OF = {
    "BatchPlan": "packing",
    "ChatTemplate": "chat_template",
    "DataSource": "sources",
    "Document": "documents",
    "EpochSampler": "loading",
    "OverlongPolicy": "truncation",
    "PackedCollator": "collators",
    "PaddedCollator": "collators",
    "PreferenceDataModule": "preference_datamodule",
    "PreparationReport": "report",
    "Prepared": "preparation",
    "PreparedDocuments": "prepared",
    "PromptCollator": "collators",
    "RowEncoder": "encoding",
    "SFTDataModule": "datamodule",
    "SourceReport": "report",
    "Sources": "sources",
    "fit_rows": "truncation",
    "group_by_length": "packing",
    "pack_documents": "packing",
    "prepare": "preparation",
    "read_prompts": "prompts",
    "read_rows": "sources",
}


def __getattr__(name: str) -> Any:
    """Import a public name's module when it is first asked for, so that processes that tokenise do without torch."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
