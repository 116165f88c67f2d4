"""The same fixed questions, answered by the same weights with adapters off and on."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from peft import PeftModel
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_qlora.checkpoints.identity import changes_base
from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.evaluation import (
    AnswerSheet,
    AnswerSummary,
    Question,
    Verdict,
    adapters_off,
    answer_questions,
    encode_prompts,
    encode_references,
    judge,
    read_questions,
    summarise,
)
from lightning_qlora.evaluation.files import write_whole
from lightning_qlora.evaluation.tables import (
    answer_rows,
    markdown_table,
    pick_rows,
    score_table,
    side_by_side,
    verdict_line,
)
from lightning_qlora.schema import ChatDataModule

__all__ = ["AnswerComparison"]

_Shown: TypeAlias = tuple[list[Question], AnswerSheet, AnswerSheet, list[Verdict]]


class AnswerComparison(Callback):
    """Answers fixed questions with adapters off and on, prints both side by side, and scores them.

    One model does both, so the difference is what training did and nothing else. The answers with adapters off are
    made once. Scores go to the logger as ``answers_valid``, ``answers_exact``, ``answers_fields`` (rates from 0 to 1)
    and ``answers_perplexity`` (of the reference answers), those of the base with ``_base`` appended; with
    ``every="validation"`` checkpoints and early stopping can monitor them. The questions that are printed go as a table
    to loggers that take text (TensorBoard, Weights & Biases); all answers are written beside the run's logs. Training
    goes on bit for bit as if the callback were not there.

    Args:
        questions: A JSONL file of questions with optional references and checks, as
            lightning_qlora.evaluation.read_questions describes.
        batch_size: Questions answered together. More is faster, above all on a CPU, and takes one key-value cache a
            row.
        max_new_tokens: Longest answer, in tokens.
        every: When to ask: at the end of fit only, or at each validation too. validate and test always ask.
        max_rows: How many questions are printed side by side; the file holds all of them.
        output_dir: Where the answers are written; null for the folder answers of the run's log directory.
    """

    def __init__(
        self,
        questions: str | Path,
        *,
        batch_size: int = 32,
        max_new_tokens: int = 128,
        every: Literal["end", "validation"] = "end",
        max_rows: int = 12,
        output_dir: str | Path | None = None,
    ) -> None:
        if every not in ("end", "validation"):
            raise ValueError(f"every is {every!r}; allowed are 'end' and 'validation'.")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("max_new_tokens", max_new_tokens, 1),
            ("max_rows", max_rows, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; write a whole number of at least {least}.")
        self.path = Path(questions)
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.every = every
        self.max_rows = max_rows
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.questions: list[Question] = []
        self.before: AnswerSheet | None = None
        self.after: AnswerSheet | None = None
        self._answered_step: int | None = None
        self._report = ""

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.questions = read_questions(self.path)
        if _is_fast_dev_run(trainer):
            self.questions = self.questions[:2]
        self.before = self.after = self._answered_step = None
        self._report = ""

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find out now, not after the training, that a question cannot be asked."""
        template = _chat_template(trainer)
        encode_prompts(template, self.questions)
        encode_references(template, self.questions)
        adapter = _peft_model(pl_module).active_peft_config
        if changes_base(adapter):
            rank_zero_warn(
                f"init_lora_weights={adapter.init_lora_weights!r} moves a part of the base into the adapters, so "
                "AnswerComparison's answers with adapters off are not those of the original base."
            )

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING or (self.every == "validation" and not trainer.sanity_checking):
            pl_module.log_dict(self._ask(trainer, pl_module), batch_size=1, sync_dist=True)

    @override
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log_dict(self._ask(trainer, pl_module), batch_size=1, sync_dist=True)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._answered_step == trainer.global_step:
            return
        scores = self._ask(trainer, pl_module)
        for logger in trainer.loggers:
            logger.log_metrics(scores, step=trainer.global_step)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Print what was found last, after Lightning's own bars and tables."""
        if self._report and trainer.is_global_zero:
            if (live := _live_display(trainer)) is not None:
                live.stop()
            print(self._report, flush=True)
        self._report = ""

    def _ask(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        """Have all questions answered, keep and write the outcome, and return the scores to be logged."""
        model, template = _peft_model(pl_module), _chat_template(trainer)
        with trainer.precision_plugin.forward_context(), _progress_paused(trainer) as progress:
            if self.before is None:
                with adapters_off(model):
                    self.before = self._answer(model, template, "before", progress)
            self.after = self._answer(model, template, "after", progress)
        self._answered_step = trainer.global_step
        summaries = [summarise(self.questions, sheet) for sheet in (self.before, self.after)]
        verdicts = judge(self.before, self.after)
        folder = self.output_dir or Path(trainer.log_dir or trainer.default_root_dir) / "answers"  # on every rank
        if trainer.is_global_zero:
            path = folder / f"step_{trainer.global_step}.jsonl"
            if not _is_fast_dev_run(trainer):
                _write(path, self.questions, self.before, self.after, verdicts, summaries)
            shown = self._pick(verdicts)
            self._report = self._draw(verdicts, summaries, path, shown)
            if shown is not None:
                _log_table(trainer, *answer_rows(*shown))
        return {**_scores(summaries[1]), **{f"{k}_base": v for k, v in _scores(summaries[0]).items()}}

    def _answer(self, model: PeftModel, template: ChatTemplate, name: str, progress: bool) -> AnswerSheet:
        """Answer all questions, each rank its share where ranks hold whole models."""
        rank, world_size = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized() and not _is_sharded(model):
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        share = answer_questions(
            model,
            template,
            self.questions[rank::world_size],
            name=name,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
            progress=progress and rank == 0,
        )
        return share if world_size == 1 else _gather(share, len(self.questions), world_size)

    def _pick(self, verdicts: Sequence[Verdict]) -> _Shown | None:
        """Choose the questions to be shown, with both answers and the verdicts."""
        assert self.before is not None
        assert self.after is not None
        rows = pick_rows(verdicts, self.max_rows)
        if not rows:
            return None
        before, after = (_select(sheet, rows) for sheet in (self.before, self.after))
        return [self.questions[i] for i in rows], before, after, [verdicts[i] for i in rows]

    def _draw(
        self, verdicts: Sequence[Verdict], summaries: Sequence[AnswerSummary], path: Path, shown: _Shown | None
    ) -> str:
        color = sys.stdout.isatty()
        parts = [""]
        if shown is not None:
            count = f"{len(shown[0])} of {len(verdicts)} questions"
            parts.append(f"{count}, answered with adapters off (before) and on (after)")
            parts.append(side_by_side(*shown, color=color))
        parts.append(score_table(["before", "after"], summaries, color=color))
        parts.append(f"{len(verdicts)} questions: {verdict_line(verdicts)}.")
        if path.is_file():
            parts.append(f"All answers: {path}")
        return "\n".join(parts)


def _log_table(trainer: L.Trainer, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Hand a table to the loggers that take one; the file beside the logs serves the others."""
    for logger in trainer.loggers:
        log_text = getattr(logger, "log_text", None)
        add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
        if log_text is not None:  # Weights & Biases
            log_text("answers", columns=list(columns), data=[list(row) for row in rows], step=trainer.global_step)
        elif add_text is not None:  # TensorBoard
            add_text("answers", markdown_table(columns, rows), trainer.global_step)


def _is_fast_dev_run(trainer: L.Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # Lightning sets it dynamically


def _chat_template(trainer: L.Trainer) -> ChatTemplate:
    data = getattr(trainer, "datamodule", None)
    template = getattr(data, "chat", None)
    if isinstance(template, ChatTemplate):
        return template
    if isinstance(data, ChatDataModule):
        return ChatTemplate(data.tokenizer)
    raise MisconfigurationException(
        f"AnswerComparison needs the tokenizer of a data module, such as SFTDataModule; found {type(data).__name__}. "
        "Pass datamodule= to the Trainer's method, or remove the callback."
    )


def _peft_model(pl_module: L.LightningModule) -> PeftModel:
    model = getattr(pl_module, "model", None)
    if not isinstance(model, PeftModel):
        raise MisconfigurationException(
            f"AnswerComparison needs a module whose attribute 'model' is a PeftModel, such as SFTModule; found "
            f"{type(pl_module).__name__} with {type(model).__name__}."
        )
    return model


def _is_sharded(model: PeftModel) -> bool:
    """Whether ranks must go through the same forward passes, because each holds a part of the weights."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _gather(share: AnswerSheet, num_questions: int, world_size: int) -> AnswerSheet:
    """Put the ranks' shares together: rank r answered the questions r, r + world_size, ..."""
    shares: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(shares, share)
    places = [(i % world_size, i // world_size) for i in range(num_questions)]
    return AnswerSheet(
        share.name,
        tuple(shares[rank].answers[i] for rank, i in places),
        tuple(shares[rank].scores[i] for rank, i in places),
        tuple(shares[rank].reference_losses[i] for rank, i in places),
    )


def _select(sheet: AnswerSheet, rows: Sequence[int]) -> AnswerSheet:
    return AnswerSheet(
        sheet.name,
        tuple(sheet.answers[i] for i in rows),
        tuple(sheet.scores[i] for i in rows),
        tuple(sheet.reference_losses[i] for i in rows),
    )


def _scores(summary: AnswerSummary) -> dict[str, float]:
    scores = {
        "answers_valid": summary.valid_rate,
        "answers_exact": summary.exact_rate,
        "answers_fields": summary.fields_rate,
        "answers_perplexity": summary.perplexity,
    }
    return {name: value for name, value in scores.items() if not math.isnan(value)}


@contextmanager
def _progress_paused(trainer: L.Trainer) -> Iterator[bool]:
    """Yield whether to show progress, with rich's live display stopped meanwhile: it would swallow another bar."""
    live = _live_display(trainer)
    if live is not None:
        live.stop()
    yield bool(getattr(trainer.progress_bar_callback, "is_enabled", False))
    if live is not None and trainer.state.fn == TrainerFn.FITTING and trainer.validating:
        live.start()


def _live_display(trainer: L.Trainer) -> Any:
    """Return what Lightning's rich progress bar draws on, if that bar is in use and has begun."""
    bar = trainer.progress_bar_callback
    return bar.progress if isinstance(bar, RichProgressBar) else None


def _write(
    path: Path,
    questions: Sequence[Question],
    before: AnswerSheet,
    after: AnswerSheet,
    verdicts: Sequence[Verdict],
    summaries: Sequence[AnswerSummary],
) -> None:
    """Write one line per question, and the scores beside it as ``.json``."""
    lines = []
    for i, question in enumerate(questions):
        row: dict[str, Any] = {
            "id": question.id,
            "messages": [{"role": message.role, "content": message.content} for message in question.messages],
            "reference": question.reference,
            "check": question.check,
            "tags": list(question.tags),
            "verdict": verdicts[i],
        }
        for sheet in (before, after):
            loss = sheet.reference_losses[i]
            row[sheet.name] = {
                "answer": sheet.answers[i].text,
                "stopped": sheet.answers[i].stopped,
                **sheet.scores[i]._asdict(),
                "reference_nll": None if loss is None else loss.nll_sum,
                "reference_tokens": None if loss is None else loss.num_tokens,
            }
        lines.append(json.dumps(row, ensure_ascii=False))
    named = {sheet.name: summary for sheet, summary in zip((before, after), summaries, strict=True)}
    totals = {name: {k: _plain(v) for k, v in summary._asdict().items()} for name, summary in named.items()}
    write_whole(path.with_suffix(".json"), json.dumps(totals, indent=2) + "\n")
    write_whole(path, "\n".join(lines) + "\n")


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
