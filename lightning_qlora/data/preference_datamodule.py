"""Preferences in files -> batches of answers side by side, for DPO, ORPO and their kin, and for KTO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_qlora.data.answer_documents import AnswerDocuments, choose_partners
from lightning_qlora.data.answers import AnswerEncoder
from lightning_qlora.data.chat_datamodule import PreparedDataModule
from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.data.collators import AnswerKind
from lightning_qlora.data.loading import EpochSampler
from lightning_qlora.data.packing import BatchPlan, IntArray
from lightning_qlora.data.preference_batching import PreferenceBatchDataset, PreferenceBatching
from lightning_qlora.data.sources import Sources, as_sources
from lightning_qlora.data.stages import Stage
from lightning_qlora.schema import Origin

__all__ = ["PreferenceDataModule"]


class PreferenceDataModule(PreparedDataModule):
    """Pairs of answers, or answers judged by themselves, as batches for preference training.

    Each answer becomes a document with its prompt, whose tokens are the same for both answers of a pair, or the row is
    refused. Only the answers are supervised. Both stay whole unless ``overlong`` says otherwise, and they are always in
    one batch, side by side. Rows are prepared once, before training (there is no streaming); ``report.answers`` tells
    whether one side is the longer one.

    Args:
        train: What to train on: a file, folder, glob or dataset id, a source with options (``path``, ``format``,
            ``columns``, ``weight``, ...), or a list of them.
        validation: What to validate on, likewise; a ``weight`` of 0.2 uses a seeded fifth of the source's rows. Not
            together with ``validation_fraction``.
        test: What ``test`` measures on, likewise.
        predict: JSONL file of questions for ``predict``: ``prompt`` or ``messages`` in each line.
        unpaired: Read answers with a ``label`` (true for a good one), as for KTO, and pairs as one good and one bad
            answer. Each row then also gets the answer of another row (``mismatched``). So it is where a source says
            ``format: unpaired``.
        share_prompts: Compute the prompt of a row once, with its answers as branches that do not see one another. The
            result is the same, for fewer tokens. Needs ``packing``, and a model that runs on the package's attention.
        kwargs: As of :class:`~lightning_qlora.data.chat_datamodule.PreparedDataModule`; ``tokenizer`` is needed.

    Raises:
        ValueError: If an option is out of its range.
        MisconfigurationException: If options do not go together.
    """

    def __init__(
        self,
        train: Sources | None = None,
        validation: Sources | None = None,
        test: Sources | None = None,
        predict: str | None = None,
        *,
        unpaired: bool = False,
        share_prompts: bool = False,
        **kwargs: Any,
    ) -> None:
        given = [source for stage in (train, validation, test) if stage is not None for source in as_sources(stage)]
        # Before the base class, which checks the options.
        self.unpaired = unpaired or any(source.format == "unpaired" for source in given)
        self.share_prompts = share_prompts
        super().__init__(train, validation, test, predict, **kwargs)
        self._answers: dict[Stage, AnswerDocuments] = {}
        self._reference: dict[Stage, Tensor] = {}

    @override
    def _check_options(self) -> None:
        super()._check_options()
        if self.share_prompts and not self.packing:
            raise MisconfigurationException(
                "share_prompts lays answers down as branches of a packed row. Write packing: true, or share_prompts: "
                "false."
            )

    @property
    @override
    def documents_per_row(self) -> int:
        return 3 if self.unpaired else 2

    @override
    def _make_encoder(self) -> AnswerEncoder:
        chat = ChatTemplate(self.tokenizer, template_kwargs=self.template_kwargs, content_tokens=self.content_tokens)
        return AnswerEncoder(chat, self.max_length, self.overlong, self.unpaired)

    # Batches

    @property
    @override
    def _batching(self) -> PreferenceBatching:
        plain = super()._batching
        return PreferenceBatching(**vars(plain), share_prompts=self.share_prompts)

    @override
    def _documents(self, name: Stage) -> AnswerDocuments:
        if name not in self._answers:
            stage = self._stages[name]
            documents = stage.prepared.documents
            partners = None
            if self.unpaired:
                partners = choose_partners(documents, stage.rows, self.max_length, seed=self.seed)
            self._answers[name] = AnswerDocuments(documents, partners)
        return self._answers[name]

    @override
    def _make_plan(self, name: Stage, rows: IntArray) -> BatchPlan:
        return self._batching.plan_rows(self._documents(name), rows, self.seed)

    @override
    def _dataset(self, name: Stage) -> PreferenceBatchDataset:
        return PreferenceBatchDataset(
            self._documents(name), self._plan(name), self._batching, self._reference.get(name)
        )

    @override
    def origins(self, row_ids: Sequence[int], stage: Stage = "train") -> list[Origin]:
        """Return where the rows of a batch were read, each once whatever the number of its answers."""
        return list(dict.fromkeys(super().origins(row_ids, stage)))

    # What a module asks for (schema.PreferenceData)

    @property
    def preference_stages(self) -> tuple[Stage, ...]:
        """The stages that were set up."""
        return tuple(stage for stage in self.sources if stage in self._stages)

    def num_documents(self, stage: Stage) -> int:
        """Return an upper bound of the document numbers of a stage."""
        return len(self._documents(stage))

    def documents_digest(self, stage: Stage) -> str:
        """Return a hash that is equal exactly if the numbers, tokens and supervised positions of the documents are."""
        return self._documents(stage).digest(self._stages[stage].rows)

    def reference_batches(self, stage: Stage) -> DataLoader[Any]:
        """Return batches that hold each document of a stage once over all ranks: this rank's share."""
        plan = self._make_plan(stage, np.unique(self._stages[stage].rows))
        dataset = PreferenceBatchDataset(self._documents(stage), plan, self._batching)
        sampler = EpochSampler(len(dataset), shuffle=False, **self._ranks)
        return DataLoader(dataset, sampler=sampler, **self._loader_options())

    def set_reference_log_probs(self, stage: Stage, log_probs: Tensor) -> None:
        """Put reference log-probabilities into the batches of loaders that are made from now on.

        Args:
            stage: Whose documents.
            log_probs: ``(num_documents(stage),)`` float32 on the host, in nats, by document number.

        Raises:
            ValueError: If they are not as many, or not of that kind.
        """
        expected = (self.num_documents(stage),)
        if tuple(log_probs.shape) != expected or log_probs.dtype != torch.float32 or log_probs.device.type != "cpu":
            raise ValueError(
                f"The reference log-probabilities of {stage} are {log_probs.dtype} {tuple(log_probs.shape)} on "
                f"{log_probs.device}; expected torch.float32 {expected} on the cpu."
            )
        self._reference[stage] = log_probs

    def mean_chosen_tokens(self) -> float:
        """Return the mean count of supervised tokens of the preferred (desirable) answers that are trained on."""
        stage = self.preference_stages[0]
        rows = self._stages[stage].rows
        documents = self._stages[stage].prepared.documents
        first = documents.row_offsets[:-1][rows]
        good = first[np.isin(documents.kinds[first], (AnswerKind.CHOSEN, AnswerKind.DESIRABLE))]
        return float(documents.num_supervised[good].mean()) if len(good) else 0.0
