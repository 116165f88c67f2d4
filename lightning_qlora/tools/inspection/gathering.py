"""A data module and the trainer's settings -> everything there is to know of a run's data before the run."""

from __future__ import annotations

import inspect as python_inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_qlora.data import PreferenceDataModule, SFTDataModule
from lightning_qlora.data.answer_documents import AnswerDocuments
from lightning_qlora.data.chat_datamodule import PreparedDataModule
from lightning_qlora.data.collators import AnswerKind
from lightning_qlora.data.loading import BatchDataset
from lightning_qlora.data.packing import IntArray
from lightning_qlora.data.preference_batching import PreferenceBatching
from lightning_qlora.data.prepared import Documents, PreparedDocuments
from lightning_qlora.data.report import LENGTH_STEP, AnswerLengths, PreparationReport
from lightning_qlora.data.sources import Sources, as_sources
from lightning_qlora.tools.inspection.contents import (
    Contents,
    find_bos,
    find_duplicates,
    find_leakage,
    read_contents,
)
from lightning_qlora.tools.inspection.findings import (
    SHARE_BINS,
    BatchFindings,
    Inspection,
    NamedToken,
    Sample,
    StageFindings,
    TemplateFindings,
)
from lightning_qlora.tools.inspection.run_plan import plan_run
from lightning_qlora.tools.inspection.samples import choose_rows, show_document, show_places
from lightning_qlora.tools.inspection.what_if import try_limits

__all__ = ["STREAM_ROWS", "gather"]

FINEST_BINS = 64
"""Steps of length that rows are counted by at least, down to single tokens."""

STREAM_ROWS = 10_000
"""Rows that are read of each training source of a stream, unless told otherwise."""


def gather(
    datamodule: L.LightningDataModule,
    trainer: L.Trainer | None = None,
    *,
    samples: int = 3,
    show: Sequence[str] = (),
    what_if: Sequence[int] = (),
    max_rows: int | None = None,
    world_size: int | None = None,
) -> Inspection:
    """Prepare the data as ``fit`` would, and find out all about it.

    Args:
        datamodule: The data of the run; left as it is.
        trainer: Whose settings say how long the run is; without one there is no plan.
        samples: Rows to show.
        show: Places, ``FILE:LINE``, of rows to show before the others, whether they can be used or not.
        what_if: Length limits to try, in tokens.
        max_rows: Read only the first so many rows of each source.
        world_size: Data-parallel ranks; those of the trainer by default.

    Raises:
        MisconfigurationException: If the data module is none of this package, or has no data.
        ValueError: If not even one row can be used, or there is none at a place to show.
    """
    if not isinstance(datamodule, (SFTDataModule, PreferenceDataModule)):
        raise MisconfigurationException(
            f"The data module is a {type(datamodule).__name__}; inspect reads what SFTDataModule and "
            "PreferenceDataModule prepare. Use one of them, or a class derived from it."
        )
    streaming = isinstance(datamodule, SFTDataModule) and datamodule.streaming
    rows = max_rows or (STREAM_ROWS if streaming else None)
    data = _inspected_copy(datamodule, rows)
    data.prepare_data()
    data.setup()
    datasets = _datasets(data)
    bos = data.tokenizer.bos_token_id
    contents = {
        name: read_contents(_documents(dataset), _first_documents(dataset), bos, name)
        for name, dataset in datasets.items()
    }
    stages = [_stage(data, name, dataset, contents[name], what_if) for name, dataset in datasets.items()]
    trained = contents.get("train")
    given = {str(name): sources for name, sources in data.sources.items() if sources is not None}
    asked = show_places(show, given, data.encoder) if show else []
    return Inspection(
        template=_template(data, datamodule.tokenizer_name),
        stages=stages,
        leakage=[] if trained is None else [find_leakage(n, c, trained) for n, c in contents.items() if n != "train"],
        plan=plan_run(trainer, stages[0], world_size=world_size, stream=rows is not None)
        if trainer and trained
        else None,
        samples=[*asked, *_samples(data, stages[0].name, contents[stages[0].name], samples)],
        notes=_notes(rows, streaming=streaming),
    )


def _inspected_copy(datamodule: SFTDataModule | PreferenceDataModule, max_rows: int | None) -> PreparedDataModule:
    """Return a data module of the same rows that tells what is wrong with them instead of stopping at it.

    It prepares streams like files, and shares the cache, so that ``fit`` finds the rows prepared.
    """
    sources = {name: _first_rows(given, max_rows) for name, given in datamodule.sources.items()}
    if not any(source is not None for source in sources.values()):
        raise MisconfigurationException("There is no data to inspect. Write --data.train FILE.")
    kind = SFTDataModule if isinstance(datamodule, SFTDataModule) else PreferenceDataModule
    names = {*python_inspect.signature(kind).parameters, *python_inspect.signature(PreparedDataModule).parameters}
    options: dict[str, Any] = {name: getattr(datamodule, name) for name in names - {"kwargs", *sources}}
    options |= {str(name): given for name, given in sources.items()}
    options |= {
        "tokenizer": datamodule.tokenizer,
        "chat_template": None,  # the tokenizer has it
        "cache_dir": str(datamodule.cache_dir),
        "max_invalid_fraction": 1.0,
    }
    return kind(**{**options, "streaming": False} if "streaming" in options else options)


def _first_rows(sources: Sources | None, max_rows: int | None) -> Sources | None:
    if sources is None or max_rows is None:
        return sources
    return [replace(source, max_rows=min(max_rows, source.max_rows or max_rows)) for source in as_sources(sources)]


def _datasets(data: PreparedDataModule) -> dict[str, BatchDataset]:
    """Return the batches of each stage that has rows, ``train`` first."""
    loaders: dict[str, Callable[[], Any]] = {
        "train": data.train_dataloader,
        "validation": data.val_dataloader,
        "test": data.test_dataloader,
    }
    present = {str(name) for name, given in data.sources.items() if given is not None}
    present |= {"validation"} if data.validation_fraction else set()
    return {name: load().dataset for name, load in loaders.items() if name in present}


def _documents(dataset: BatchDataset) -> PreparedDocuments:
    documents = dataset.documents
    if isinstance(documents, AnswerDocuments):
        return documents.prepared
    assert isinstance(documents, PreparedDocuments)
    return documents


def _first_documents(dataset: BatchDataset) -> IntArray:
    """Return the first document of each row of an epoch."""
    documents, planned = _documents(dataset), dataset.plan.rows
    own: IntArray = planned[planned < len(documents)]  # without mismatched answers
    first: IntArray = own[documents.kinds[own] != AnswerKind.REJECTED]
    return first


def _stage(
    data: PreparedDataModule, name: str, dataset: BatchDataset, contents: Contents, what_if: Sequence[int]
) -> StageFindings:
    documents, plan = _documents(dataset), dataset.plan
    starts, planned = documents.row_offsets[:-1], _first_documents(dataset)
    used = np.searchsorted(starts, contents.rows)
    longest = np.maximum.reduceat(documents.lengths, starts)
    tokens, supervised = (np.add.reduceat(counts, starts) for counts in (documents.lengths, documents.num_supervised))
    report = data.reports.get(name)
    num_duplicates, duplicates = find_duplicates(contents)
    sources = data.sources[name]  # type: ignore[index]
    limits = []
    if report is not None and sources is not None:
        limits = try_limits(sources, data.encoder, documents, report, what_if)
    step, by_length = _by_length(longest if report else longest[used], report)
    return StageFindings(
        name=name,
        report=report,
        num_rows=len(planned),
        num_distinct_rows=len(contents.rows),
        num_tokens=plan.num_tokens,
        num_supervised_tokens=int(supervised[np.searchsorted(starts, planned)].sum()),
        length_step=step,
        lengths=by_length,
        supervised_share=_histogram(supervised[used] / tokens[used]),
        bos=find_bos(contents, data.chat),
        num_duplicates=num_duplicates,
        duplicates=duplicates,
        batches=_batches(dataset, data.seed),
        what_if=limits,
        answers=_answer_lengths(documents, contents.rows) if documents.kinds.any() else None,
    )


def _answer_lengths(documents: PreparedDocuments, firsts: IntArray) -> AnswerLengths:
    """Count the answers of some rows, given by their first documents."""
    kinds, lengths = documents.kinds, documents.num_supervised
    chosen = firsts[kinds[firsts] == AnswerKind.CHOSEN]
    good = np.concatenate((chosen, firsts[kinds[firsts] == AnswerKind.DESIRABLE]))
    bad = np.concatenate((chosen + 1, firsts[kinds[firsts] == AnswerKind.UNDESIRABLE]))
    difference = lengths[chosen] - lengths[chosen + 1]
    return AnswerLengths(
        num_chosen=len(good),
        num_rejected=len(bad),
        chosen_tokens=int(lengths[good].sum()),
        rejected_tokens=int(lengths[bad].sum()),
        num_pairs=len(chosen),
        chosen_longer=int((difference > 0).sum()),
        rejected_longer=int((difference < 0).sum()),
    )


def _by_length(lengths: IntArray, report: PreparationReport | None) -> tuple[int, dict[int, int]]:
    """Return the width of a step of lengths, and the rows by the upper bound of theirs.

    The report knows the lengths before the limit in steps; where no row is above it, the rows themselves know better.
    """
    if report is not None and report.truncation["fits"] != sum(report.full_lengths.values()):
        return LENGTH_STEP, report.full_lengths
    step = 1
    while step < LENGTH_STEP and int(lengths.max()) > step * FINEST_BINS:
        step *= 2
    bounds, counts = np.unique(-(-lengths // step) * step, return_counts=True)
    return step, dict(zip(bounds.tolist(), counts.tolist(), strict=True))


def _batches(dataset: BatchDataset, seed: int) -> BatchFindings:
    documents, plan, batching = dataset.documents, dataset.plan, dataset.batching
    assert isinstance(documents, Documents)
    lengths = documents.lengths[plan.rows]
    taken = lengths
    if isinstance(documents, AnswerDocuments):
        assert isinstance(batching, PreferenceBatching)
        taken = documents.positions(share_prompts=batching.share_prompts)[plan.rows]
    tokens = np.add.reduceat(taken, plan.offsets[:-1])
    if batching.packing:
        positions = np.full(len(plan), plan.capacity / len(plan))
    else:
        positions = np.maximum.reduceat(lengths, plan.offsets[:-1]) * np.diff(plan.offsets)
    return BatchFindings(
        packed=batching.packing,
        tokens_per_batch=batching.tokens_per_batch,
        num_batches=len(plan),
        num_tokens=plan.num_tokens,
        capacity=plan.capacity,
        efficiency=plan.efficiency,
        fill=_histogram(tokens / positions),
        padded_batch_size=batching.batch_size,
        padded_capacity=_padded_capacity(lengths, _row_starts(dataset), batching.batch_size, seed),
    )


def _row_starts(dataset: BatchDataset) -> IntArray:
    """Return where each row begins among the planned documents."""
    planned, documents = dataset.plan.rows, _documents(dataset)
    kinds = np.append(documents.kinds, np.int8(AnswerKind.MISMATCHED))[np.minimum(planned, len(documents))]
    return np.flatnonzero((kinds != AnswerKind.REJECTED) & (kinds != AnswerKind.MISMATCHED)).astype(np.int64)


def _padded_capacity(lengths: IntArray, row_starts: IntArray, batch_size: int, seed: int) -> int:
    """Count the positions of plain batches: rows in random order, padded to the longest document of each batch."""
    order = np.random.default_rng([seed, 9]).permutation(len(row_starts))
    longest = np.maximum.reduceat(lengths, row_starts)[order]
    documents = np.diff(np.append(row_starts, len(lengths)))[order]
    batches = np.arange(0, len(order), batch_size)
    return int((np.maximum.reduceat(longest, batches) * np.add.reduceat(documents, batches)).sum())


def _histogram(shares: Any) -> list[int]:
    return [int(count) for count in np.histogram(shares, bins=SHARE_BINS, range=(0, 1))[0]]


def _template(data: PreparedDataModule, name: str) -> TemplateFindings:
    tokenizer, chat = data.tokenizer, data.chat

    def named(ids: Sequence[int]) -> list[NamedToken]:
        return [NamedToken(token_id, str(tokenizer.convert_ids_to_tokens(token_id))) for token_id in ids]

    return TemplateFindings(
        tokenizer=name,
        fingerprint=chat.fingerprint,
        supervise=data.supervise if isinstance(data, SFTDataModule) else "answers",
        bos_token=None if tokenizer.bos_token_id is None else named([tokenizer.bos_token_id])[0],
        stop_tokens=named(chat.stop_token_ids),
        control_tokens=named(chat.control_token_ids),
        notes=list(chat.notes),
    )


def _samples(data: PreparedDataModule, stage: str, contents: Contents, count: int) -> list[Sample]:
    sources = data.sources[stage] or data.sources["train"]  # type: ignore[index]
    assert sources is not None
    names = [str(source) for source in as_sources(sources)]
    documents = contents.documents
    rows = choose_rows(documents.parts.astype(np.int64), contents.rows, count, seed=data.seed)
    return [show_document(documents, row, data.tokenizer, names, stage) for row in rows.tolist()]


def _notes(max_rows: int | None, *, streaming: bool) -> list[str]:
    if max_rows is None:
        return []
    why = "training reads its rows as a stream" if streaming else "max_rows is set"
    return [f"Only the first {max_rows:,} rows of each source were read, because {why}; all figures are theirs."]
