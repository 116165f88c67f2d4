"""Files of chats -> tokens with exact masks -> batches: what the data modules are made of, each part usable alone."""

from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.data.collators import Document, PackedCollator, PaddedCollator, PromptCollator
from lightning_qlora.data.datamodule import SFTDataModule
from lightning_qlora.data.loading import EpochSampler
from lightning_qlora.data.packing import BatchPlan, group_by_length, pack_documents
from lightning_qlora.data.preference_datamodule import PreferenceDataModule
from lightning_qlora.data.preparation import Prepared, RowEncoder, prepare
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
