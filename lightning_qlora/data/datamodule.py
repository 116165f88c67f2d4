"""Chats in files -> batches for supervised fine-tuning, prepared beforehand or read as a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_qlora.checkpoints.loop_state import count_batches
from lightning_qlora.data.chat_datamodule import PreparedDataModule
from lightning_qlora.data.chat_template import ChatTemplate, Supervise
from lightning_qlora.data.encoding import RowEncoder
from lightning_qlora.data.report import SourceReport
from lightning_qlora.data.resume import gather_states
from lightning_qlora.data.sources import Sources
from lightning_qlora.data.stages import Stage
from lightning_qlora.data.streaming import StreamingBatches, StreamingLoader
from lightning_qlora.schema import Origin

__all__ = ["SFTDataModule"]


class SFTDataModule(PreparedDataModule):
    """Chats and prompts with answers, templated, masked, packed and loaded for supervised fine-tuning.

    Rows are read and tokenised once, before training, into a memory-mapped cache. Only answers are supervised; each
    row whose mask cannot be proven is refused and counted (``report``). An interrupted run resumes at the exact batch.

    Args:
        train: What to train on: a file, folder, glob or dataset id, a source with options (``path``, ``format``,
            ``columns``, ``weight``, ...), or a list of them.
        validation: What to validate on, likewise; a ``weight`` of 0.2 uses a seeded fifth of the source's rows. Not
            together with ``validation_fraction``.
        test: What ``test`` measures on, likewise.
        predict: JSONL file of questions for ``predict``: ``prompt`` or ``messages`` in each line.
        supervise: Which assistant turns are learned: ``all`` or the ``last``. A message's own ``train`` field wins.
        streaming: Read and tokenise the training rows while training, for data larger than the disk. Needs
            ``trainer.max_steps``. The other stages are prepared beforehand in any case.
        shuffle_buffer: Rows of a stream that are shuffled and packed together.
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
        supervise: Supervise = "all",
        streaming: bool = False,
        shuffle_buffer: int = 10_000,
        **kwargs: Any,
    ) -> None:
        self.supervise: Supervise = supervise  # before the base class, which checks the options
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer
        super().__init__(train, validation, test, predict, **kwargs)
        self._stream_position: dict[str, Any] | None = None

    @override
    def _check_options(self) -> None:
        super()._check_options()
        if self.shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer is {self.shuffle_buffer}; write a whole number from 1.")
        if self.streaming and self.validation_fraction:
            raise MisconfigurationException(
                "validation_fraction needs all rows beforehand, and streaming reads them while training. Write a "
                "validation source."
            )

    @override
    def _make_encoder(self) -> RowEncoder:
        chat = ChatTemplate(
            self.tokenizer,
            supervise=self.supervise,
            template_kwargs=self.template_kwargs,
            content_tokens=self.content_tokens,
        )
        return RowEncoder(chat, self.max_length, self.overlong)

    @override
    def _wanted_stages(self, stage: str | None = None) -> list[Stage]:
        return [name for name in super()._wanted_stages(stage) if not (self.streaming and name == "train")]

    # Streams

    @property
    def stream_report(self) -> SourceReport | None:
        """What became of the rows of a stream so far, in this process and this run; ``None`` without streaming."""
        return self._train_loader.report if isinstance(self._train_loader, StreamingLoader) else None

    @override
    def origins(self, row_ids: Sequence[int], stage: Stage = "train") -> list[Origin]:
        if stage == "train" and isinstance(self._train_loader, StreamingLoader):
            return next((origins for ids, origins in self._train_loader.origins if ids == tuple(row_ids)), [])
        return super().origins(row_ids, stage)

    @override
    def _make_train_loader(self) -> DataLoader[Any]:
        if not self.streaming:
            return super()._make_train_loader()
        if self.trainer is not None and self.trainer.max_steps == -1:
            raise MisconfigurationException(
                "A stream has no end that training could go by. Write --trainer.max_steps N, or streaming: false."
            )
        sources = self.sources["train"]
        assert sources is not None
        stream = StreamingBatches(
            sources,
            self._encoder,
            self._batching,
            self.shuffle_buffer,
            self.seed,
            self._ranks["rank"],
            self._ranks["num_replicas"],
            self.max_invalid_fraction,
        )
        options = {**self._loader_options(), "persistent_workers": False}
        return StreamingLoader(stream, batches_seen=self._batches_seen, position=self._stream_position, **options)

    def _batches_seen(self) -> int:
        return count_batches(self.trainer).total if self.trainer is not None else 0

    @override
    def _position_state(self) -> dict[str, Any]:
        state = super()._position_state()
        if isinstance(self._train_loader, StreamingLoader):
            assert self.trainer is not None
            state["streams"] = gather_states(self._train_loader.position(), self.trainer.world_size)
        return state

    @override
    def _restore_position(self, state_dict: dict[str, Any], trainer: L.Trainer) -> None:
        if not self.streaming:
            super()._restore_position(state_dict, trainer)
            return
        self._stream_position = state_dict["streams"][trainer.global_rank]
        if isinstance(self._train_loader, StreamingLoader) and self._train_loader.begun:
            self._train_loader.replaced = True

    @override
    def _identity(self) -> dict[str, Any]:
        if not self.streaming:
            return super()._identity()
        shards = max(1, self.num_workers) * self._ranks["num_replicas"]
        made_of = {**self._batching.identity(), "weights": self._stages.weights, "seed": self.seed}
        made_of |= {**self._encoder.identity(), "shuffle_buffer": self.shuffle_buffer, "shards": shards}
        return {"batches": made_of, "made_of": made_of}
