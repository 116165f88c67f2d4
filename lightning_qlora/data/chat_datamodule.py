"""What every data module of chats shares: prepared rows, plans of batches, loaders, and exact resumption."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_qlora.checkpoints.run_record import plain_values
from lightning_qlora.data.batching import Batching
from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.data.collators import PromptCollator
from lightning_qlora.data.encoding import RowEncoder
from lightning_qlora.data.loading import BatchDataset, EpochSampler, ResumableLoader, pass_through
from lightning_qlora.data.packing import BatchPlan, IntArray
from lightning_qlora.data.prepared import Documents
from lightning_qlora.data.prompts import Prompt, read_prompts
from lightning_qlora.data.report import PreparationReport
from lightning_qlora.data.resume import TrainingPosition, check_identity, hash_arrays
from lightning_qlora.data.sources import Sources
from lightning_qlora.data.stages import PreparedStages, Stage
from lightning_qlora.data.truncation import OVERLONG_POLICIES, OverlongPolicy
from lightning_qlora.pretrained import cache_dir as default_cache_dir
from lightning_qlora.pretrained import load_tokenizer
from lightning_qlora.ranks import together
from lightning_qlora.redaction import scrub
from lightning_qlora.schema import Origin, PromptBatch, RowRefused, SFTBatch

__all__ = ["PreparedDataModule"]

_AT_LEAST_ONE = (
    "max_length", "batch_size", "tokens_per_batch", "pad_to_multiple_of", "num_proc",
)  # fmt: skip
_STAGES_OF: dict[TrainerFn, tuple[Stage, ...]] = {
    TrainerFn.FITTING: ("train", "validation"),
    TrainerFn.VALIDATING: ("validation",),
    TrainerFn.TESTING: ("test",),
    TrainerFn.PREDICTING: (),
}


class PreparedDataModule(L.LightningDataModule):
    """Rows that are read, tokenised and masked once, then packed and loaded; subclasses say what a row is.

    The prepared rows lie in a memory-mapped cache. Each row whose mask cannot be proven is refused and counted
    (``report``). An interrupted run resumes at the exact batch.

    Args:
        train: What to train on: a file, folder, glob or dataset id, a source with options (``path``, ``format``,
            ``columns``, ``weight``, ...), or a list of them.
        validation: What to validate on, likewise; a ``weight`` of 0.2 uses a seeded fifth of the source's rows. Not
            together with ``validation_fraction``.
        test: What ``test`` measures on, likewise.
        predict: JSONL file of questions for ``predict``: ``prompt`` or ``messages`` in each line.
        tokenizer: Model id or folder whose tokenizer (and chat template) is used; the command line links it to
            ``model.model_name``. From Python, a tokenizer may be given itself.
        revision: Branch, tag or commit of the tokenizer's hub id.
        trust_remote_code: Whether Python code from the tokenizer's repository may run. Off unless you trust it.
        chat_template: Jinja template, or the path of a file that holds one, instead of the tokenizer's own.
        template_kwargs: Extra variables for the chat template, such as ``enable_thinking: false``.
        content_tokens: Added tokens of the tokenizer that texts may contain as tokens. All others, written in a text,
            stay text, so that no message can forge a turn.
        max_length: Most tokens of a row; of a row with two answers, most tokens of the prompt with one of them.
        overlong: What happens to longer rows. ``drop_oldest_turns`` leaves out the oldest exchanges and keeps the
            system message and the last exchange whole (the row is refused if that is still too long); ``drop_row``
            refuses the row; ``keep_start`` and ``keep_end`` cut tokens at the other end. The answers of a row keep the
            same prompt, and none is left out.
        packing: Whether rows share a batch without padding, isolated from one another. If not, rows of similar length
            are padded to a batch.
        tokens_per_batch: Token budget of a batch. Packed: by default what the longest possible row takes,
            ``max_length`` for each of its answers. Padded: padding included, and by default only ``batch_size`` limits
            a batch.
        batch_size: Rows of a padded batch, and questions of a ``predict`` batch.
        pad_to_multiple_of: Round the positions of a batch up to a multiple of this.
        validation_fraction: Share of the training rows that is held out for validation, from 0 to below 1. Equal rows
            always go to the same side, so no validation row is trained on. Each is validated on once, whatever the
            ``weight`` of its source.
        seed: Decides which rows share a batch, the order of the batches, and the rows held out.
        max_invalid_fraction: Largest share of rows that may be refused before the run stops with the table of reasons.
            The default of 5 % lets a few broken rows pass, counted, and stops at a wrong format or template.
        num_workers: Processes that assemble batches. 0 is enough: the rows are tokenised already.
        num_proc: Processes that tokenise; by default this one, on the tokenizer's own threads.
        cache_dir: Folder of the prepared rows; by default ``$LIGHTNING_QLORA_CACHE/data``, or in the user's cache.

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
        tokenizer: str | PreTrainedTokenizerBase,
        revision: str | None = None,
        trust_remote_code: bool = False,
        chat_template: str | None = None,
        template_kwargs: dict[str, Any] | None = None,
        content_tokens: list[str] | None = None,
        max_length: int = 2048,
        overlong: OverlongPolicy = "drop_oldest_turns",
        packing: bool = True,
        tokens_per_batch: int | None = None,
        batch_size: int = 8,
        pad_to_multiple_of: int | None = None,
        validation_fraction: float = 0.0,
        seed: int = 0,
        max_invalid_fraction: float = 0.05,
        num_workers: int = 0,
        num_proc: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        # For checkpoints, which are read without pickle. Not for loggers, who refuse a name that the module uses too.
        self.save_hyperparameters(ignore=["tokenizer"], logger=False)
        self.sources: dict[Stage, Sources | None] = {"train": train, "validation": validation, "test": test}
        self.predict = predict
        self.tokenizer_name = tokenizer if isinstance(tokenizer, str) else tokenizer.name_or_path
        self._given_tokenizer = None if isinstance(tokenizer, str) else tokenizer
        self.hparams.update(scrub(plain_values({**self.hparams, "tokenizer": self.tokenizer_name})))
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.chat_template = chat_template
        self.template_kwargs = dict(template_kwargs or {})
        self.content_tokens = tuple(content_tokens or ())
        self.max_length = max_length
        self.overlong = overlong
        self.packing = packing
        self.tokens_per_batch = tokens_per_batch
        self.batch_size = batch_size
        self.pad_to_multiple_of = pad_to_multiple_of
        self.validation_fraction = validation_fraction
        self.seed = seed
        self.max_invalid_fraction = max_invalid_fraction
        self.num_workers = num_workers
        self.num_proc = num_proc
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir() / "data"
        self._check_options()
        self._stages = PreparedStages(
            self.sources,
            self._get_encoder,
            self.cache_dir,
            num_proc or 1,
            max_invalid_fraction,
            validation_fraction,
            seed,
        )
        self._plans: dict[tuple[Stage, Batching], BatchPlan] = {}
        self._train_loader: DataLoader[Any] | None = None
        self._limit_val_batches: int | float | None = None
        self._position = TrainingPosition()

    def _check_options(self) -> None:
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; write a whole number from 1.")
        if self.num_workers < 0 or self.seed < 0:
            raise ValueError(f"num_workers is {self.num_workers} and seed is {self.seed}; write numbers from 0.")
        if self.overlong not in OVERLONG_POLICIES:
            raise ValueError(f"overlong is {self.overlong!r}; allowed are {', '.join(OVERLONG_POLICIES)}.")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}; write a share from 0 to below 1.")
        if not 0 <= self.max_invalid_fraction <= 1:
            raise ValueError(f"max_invalid_fraction is {self.max_invalid_fraction}; write a share from 0 to 1.")
        needed = self.max_length * self.documents_per_row
        if self.tokens_per_batch is not None and self.tokens_per_batch < needed:
            what = f"max_length={self.max_length}"
            what = what if self.documents_per_row == 1 else f"{self.documents_per_row} times {what}, {needed}"
            raise MisconfigurationException(
                f"tokens_per_batch is {self.tokens_per_batch}, below {what}: a row of that length would fit no "
                "batch. Raise tokens_per_batch, or lower max_length."
            )
        if self.validation_fraction and self.sources["validation"] is not None:
            raise MisconfigurationException(
                "Both validation and validation_fraction are given. Write one of them: rows of their own, or a share "
                "of the training rows."
            )

    # What a subclass says

    @property
    def documents_per_row(self) -> int:
        """How many documents of a batch a row becomes, at most."""
        return 1

    @abstractmethod
    def _make_encoder(self) -> RowEncoder:
        """Return what turns rows into documents."""

    # What modules and callbacks ask for (schema.ChatDataModule)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer with its chat template; loaded when first needed."""
        if self._given_tokenizer is not None:
            if self.chat_template is not None:
                raise MisconfigurationException(
                    "A tokenizer is given together with chat_template. Set the template on the tokenizer, or give the "
                    "tokenizer's name."
                )
            return self._given_tokenizer
        return load_tokenizer(
            self.tokenizer_name,
            revision=self.revision,
            chat_template=self.chat_template,
            trust_remote_code=self.trust_remote_code,
        )

    @cached_property
    def _encoder(self) -> RowEncoder:
        return self._make_encoder()

    def _get_encoder(self) -> RowEncoder:  # a method, because ddp_spawn pickles the data module
        return self._encoder

    @property
    def encoder(self) -> RowEncoder:
        """What turns rows into documents."""
        return self._encoder

    @property
    def chat(self) -> ChatTemplate:
        """What turns conversations into tokens and masks."""
        return self._encoder.chat

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The end-of-turn tokens that the data supervises; generation stops at them."""
        return self.chat.stop_token_ids

    @property
    def control_token_ids(self) -> tuple[int, ...]:
        """The special tokens that the chat template writes; the base must know them."""
        return self.chat.control_token_ids

    @property
    def report(self) -> PreparationReport:
        """What became of every training row; without training data, of those of the stage that was prepared first."""
        reports = self.reports
        if not reports:
            raise RuntimeError("There is no report before prepare_data() or setup().")
        return reports.get("train", next(iter(reports.values())))

    @property
    def reports(self) -> dict[str, PreparationReport]:
        """The report of each stage that has sources of its own."""
        return self._stages.reports

    @property
    def num_leaked_rows(self) -> int:
        """How many distinct validation rows are trained on too; 0 with ``validation_fraction``."""
        return self._stages.num_leaked()

    def origins(self, row_ids: Sequence[int], stage: Stage = "train") -> list[Origin]:
        """Return where the rows of a batch were read; fillers (-1) are left out.

        Args:
            row_ids: As of :class:`~lightning_qlora.schema.SFTBatch`.
            stage: Whose batch it is.
        """
        documents = self._documents(stage)
        return [documents.origin(row) for row in row_ids if row >= 0]

    # Lightning's hooks

    @override
    def prepare_data(self) -> None:
        """Fill the cache, in one process of each node."""
        for stage in self._wanted_stages():
            self._stages.prepare(stage)

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read the cache, in every process; where one cannot, all end with its message."""
        with together():
            for name in self._wanted_stages(stage):
                self._stages.set_up(name)
        trainer, own = self.trainer, type(self).val_dataloader is PreparedDataModule.val_dataloader
        if trainer is not None and trainer.state.fn is TrainerFn.FITTING and own and "validation" not in self._stages:
            # Lightning's own switch; a loader without batches would make it warn that something may be wrong.
            self._limit_val_batches, trainer.limit_val_batches = trainer.limit_val_batches, 0

    @override
    def teardown(self, stage: str | None = None) -> None:
        """Leave the trainer as it was."""
        if self._limit_val_batches is not None and self.trainer is not None:
            self.trainer.limit_val_batches, self._limit_val_batches = self._limit_val_batches, None

    def _wanted_stages(self, stage: str | None = None) -> list[Stage]:
        function = TrainerFn(stage) if stage else self.trainer.state.fn if self.trainer else None
        wanted: tuple[Stage, ...] = _STAGES_OF[function] if function else ("train", "validation", "test")
        if "validation" in wanted and self.validation_fraction:
            wanted = ("train", *(name for name in wanted if name not in ("train", "validation")))
        return [name for name in wanted if self.sources[name] is not None]

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Return packed or padded batches, in a new order each epoch."""
        if self.sources["train"] is None:
            raise MisconfigurationException("There is no training data. Write --data.train FILE.")
        self._train_loader = self._make_train_loader()
        return self._train_loader

    def _make_train_loader(self) -> DataLoader[Any]:
        dataset = self._dataset("train")
        plan = dataset.plan
        self.report.packing = {
            "batches": len(plan),
            "efficiency": plan.efficiency,
            "tokens_per_batch": plan.capacity / len(plan),
        }
        sampler = self._sampler(dataset, shuffle=True)
        return ResumableLoader(dataset, first_batch=self._first_batch, sampler=sampler, **self._loader_options())

    @override
    def val_dataloader(self) -> DataLoader[SFTBatch] | list[Any]:
        """Return the validation batches, in a fixed order; in ``fit``, none where there is no validation data."""
        if "validation" not in self._stages:
            if self.trainer is not None and self.trainer.state.fn is TrainerFn.FITTING:
                return []  # the batch-size finder asks in any case
            raise MisconfigurationException(
                "There is no validation data. Write --data.validation FILE, or --data.validation_fraction 0.05."
            )
        return self._evaluation_loader("validation")

    @override
    def test_dataloader(self) -> DataLoader[SFTBatch]:
        """Return the test batches, in a fixed order."""
        if "test" not in self._stages:
            raise MisconfigurationException("There is no test data. Write --data.test FILE.")
        return self._evaluation_loader("test")

    @override
    def predict_dataloader(self) -> DataLoader[PromptBatch]:
        """Return the questions in the order of their file, with room for the answers left to the model."""
        if self.predict is None:
            raise MisconfigurationException("There are no questions. Write --data.predict FILE.jsonl.")
        prompts = [(self._encode_prompt(prompt), prompt.row) for prompt in read_prompts(self.predict)]
        collate = PromptCollator(pad_token_id=self._batching.pad_token_id)
        # The options are given by keyword, and the batch sampler is left to torch: Lightning makes the loader anew to
        # keep track of the order.
        return DataLoader(prompts, batch_size=self.batch_size, collate_fn=collate, num_workers=self.num_workers)  # type: ignore[arg-type]

    def _encode_prompt(self, prompt: Prompt) -> list[int]:
        try:
            return self.chat.encode_prompt(prompt.messages, prompt.tools)
        except RowRefused as refusal:
            raise ValueError(f"{prompt.origin} cannot be asked: {refusal.reason}: {refusal.detail}") from None

    # Batches

    @property
    def _batching(self) -> Batching:
        """Made when asked for, because the batch-size scaler changes ``batch_size``."""
        pad_token_id = self.tokenizer.pad_token_id
        return Batching(
            self.packing,
            self.tokens_per_batch or (self.max_length * self.documents_per_row if self.packing else None),
            self.batch_size,
            self.pad_to_multiple_of,
            0 if pad_token_id is None else int(pad_token_id),
        )

    def _plan(self, name: Stage) -> BatchPlan:
        key = (name, self._batching)
        if key not in self._plans:
            self._plans[key] = self._make_plan(name, self._stages[name].rows)
        return self._plans[key]

    def _make_plan(self, name: Stage, rows: IntArray) -> BatchPlan:
        """Decide which documents of some rows share a batch."""
        plan = self._batching.plan(self._documents(name).lengths[rows], self.seed)
        return replace(plan, rows=rows[plan.rows])

    def _documents(self, name: Stage) -> Documents:
        """Return all documents that batches of a stage may hold."""
        return self._stages[name].prepared.documents

    def _dataset(self, name: Stage) -> BatchDataset:
        return BatchDataset(self._documents(name), self._plan(name), self._batching)

    @property
    def _ranks(self) -> dict[str, int]:
        ranks = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return ranks or {"num_replicas": 1, "rank": 0}

    def _sampler(self, dataset: BatchDataset, *, shuffle: bool) -> Sampler[int]:
        if getattr(self.trainer, "overfit_batches", 0):
            return SequentialSampler(dataset)  # what Lightning would replace it with, after a warning
        return EpochSampler(len(dataset), shuffle=shuffle, seed=self.seed, **self._ranks)

    def _evaluation_loader(self, name: Stage) -> DataLoader[SFTBatch]:
        dataset = self._dataset(name)
        return DataLoader(dataset, sampler=self._sampler(dataset, shuffle=False), **self._loader_options())

    def _loader_options(self) -> dict[str, Any]:
        return {
            "batch_size": None,  # the items are batches
            "collate_fn": pass_through,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    # Resume

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return how far training has come, and in which data."""
        if self.trainer is None or self._train_loader is None:
            return {}
        return {**self._position_state(), **self._identity()}

    def _position_state(self) -> dict[str, Any]:
        assert self.trainer is not None
        return self._position.state_dict(self.trainer)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the state was taken.

        Raises:
            MisconfigurationException: If the data, or what makes batches of it, is not what the state was taken in.
        """
        if self.trainer is None or self.trainer.state.fn is not TrainerFn.FITTING:
            return
        here, begun = self._identity(), state_dict["epoch"] or state_dict["batches_done"]
        if not begun and state_dict["batches"] != here["batches"]:
            return  # nothing to continue: BatchSizeFinder goes back to the start with the batches it has changed
        check_identity(state_dict, here)
        self._restore_position(state_dict, self.trainer)

    def _restore_position(self, state_dict: dict[str, Any], trainer: L.Trainer) -> None:
        self._position.load_state_dict(state_dict, trainer.world_size)

    def _identity(self) -> dict[str, Any]:
        """Return a hash that is equal exactly if the batches are, and by name what they are made of."""
        prepared, plan = self._stages["train"].prepared, self._plan("train")
        made_of = {**self._batching.identity(), "weights": self._stages.weights, "seed": self.seed}
        made_of |= {**prepared.identity, "validation_fraction": self.validation_fraction}
        batches = hash_arrays(prepared.documents.digests, prepared.documents.num_supervised, plan.rows, plan.offsets)
        return {"batches": f"{batches}-{self.seed}", "made_of": made_of}

    def _first_batch(self, epoch: int) -> int:
        return self._position.begin(self.trainer, epoch)
