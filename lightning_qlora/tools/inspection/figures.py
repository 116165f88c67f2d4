"""Findings in words and rows of tables, for the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_qlora.data.report import AnswerLengths
from lightning_qlora.tools.html import visible
from lightning_qlora.tools.inspection.findings import (
    SHARE_BINS,
    BatchFindings,
    BosFindings,
    Inspection,
    Leakage,
    NamedToken,
    RunPlan,
    StageFindings,
)

__all__ = [
    "Histogram",
    "describe_answers",
    "describe_batches",
    "describe_bos",
    "describe_leakage",
    "describe_plan",
    "describe_stage",
    "describe_template",
    "length_histogram",
    "number",
    "share",
    "share_histogram",
    "source_rows",
    "token_names",
]

Rows = list[tuple[str, str]]

_OUTCOMES: dict[str, str] = {
    "fits": "fit",
    "turns-dropped": "lose their oldest turns",
    "cut-start": "are cut at the start",
    "cut-end": "are cut at the end",
    "too-long": "are refused",
}
_POLICIES = {"all": "all assistant turns", "last": "the last assistant turn", "answers": "the judged answers"}


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts by bin, ready to be drawn.

    Attributes:
        counts: Of each bin.
        bounds: The upper bound of each bin.
        width: Of a bin.
        unit: Of the bounds: ``tokens`` or ``%``.
        mark: A bound to point out, such as ``max_length``.
    """

    counts: list[int]
    bounds: list[int]
    width: int
    unit: str
    mark: int | None = None

    def label(self, index: int) -> str:
        """Return what a bin covers."""
        upper = self.bounds[index]
        if self.unit == "%":
            return f"{upper - self.width} to {upper} %"
        return f"{upper - self.width + 1:,} to {upper:,} {self.unit}"


def length_histogram(stage: StageFindings, num_bins: int) -> Histogram:
    """Return the rows by length, in at most ``num_bins`` bins of equal width."""
    longest = max(stage.lengths)
    width = stage.length_step
    while longest > width * num_bins:
        width *= 2
    counts = [0] * -(-longest // width)
    for bound, count in stage.lengths.items():
        counts[-(-bound // width) - 1] += count
    mark = None if stage.report is None else stage.report.max_length
    return Histogram(counts, [width * (i + 1) for i in range(len(counts))], width, "tokens", mark)


def share_histogram(counts: list[int]) -> Histogram:
    """Return a histogram of shares in per cent."""
    width = 100 // SHARE_BINS
    return Histogram(counts, [width * (i + 1) for i in range(SHARE_BINS)], width, "%")


def share(part: float, whole: float = 1.0) -> str:
    """Return a share in per cent."""
    return f"{100 * part / whole:.1f} %" if whole else "0.0 %"


def token_names(tokens: list[NamedToken]) -> str:
    """Return tokens with their ids."""
    return ", ".join(f"{visible(token.text)} ({token.id})" for token in tokens) or "none"


def describe_template(inspection: Inspection) -> Rows:
    """Return what turns conversations into tokens."""
    template = inspection.template
    rows = [
        ("Tokenizer", visible(template.tokenizer)),
        ("Fingerprint", template.fingerprint),
        ("Supervised", f"{_POLICIES.get(template.supervise, template.supervise)}, unless a message says otherwise"),
        ("Stop tokens", token_names(template.stop_tokens)),
        ("Control tokens", token_names(template.control_tokens)),
    ]
    bos = template.bos_token
    rows.append(("BOS token", "none" if bos is None else token_names([bos])))
    return [*rows, *(("Note", visible(note)) for note in template.notes)]


def describe_bos(stage: StageFindings) -> str:
    """Return how the rows begin, and whether that is right."""
    bos = stage.bos
    if bos is None:
        return "the tokenizer has none"
    begins = ", ".join(f"{rows:,} rows begin with {count}" for count, rows in bos.at_start.items())
    verdict = "as expected" if not bos.rows_unexpected else f"NOT AS EXPECTED IN {bos.rows_unexpected:,} ROWS"
    return f"{begins}; {verdict}: {_expected(bos)}"


def _expected(bos: BosFindings) -> str:
    numbers = " or ".join(str(number) for number in bos.expected)
    return (
        f"{numbers} at the start, more as it opens turns" if bos.opens_turns else f"{numbers} at the start, none later"
    )


def source_rows(stage: StageFindings) -> list[tuple[str, int, int, int, Mapping[str, int]]]:
    """Return name, rows read, kept and refused, and the reasons of each source."""
    if stage.report is None:
        return []
    return [(s.name, s.rows_read, s.rows_kept, sum(s.refused.values()), s.refused) for s in stage.report.sources]


def describe_stage(stage: StageFindings) -> Rows:
    """Return the figures of a stage's rows."""
    rows: Rows = []
    if stage.report is None:
        rows.append(("Rows", f"{stage.num_rows:,}, held out of the training rows"))
    else:
        refused = stage.report.rows_read - stage.report.rows_kept
        rows.append(("Rows", f"{stage.report.rows_read:,} read, {stage.report.rows_kept:,} kept, {refused:,} refused"))
        different = "" if stage.num_rows == stage.num_distinct_rows else f", {stage.num_distinct_rows:,} different ones"
        if (stage.num_rows, different) != (stage.report.rows_kept, ""):
            rows.append(("In use", f"{stage.num_rows:,} rows an epoch{different}"))
        outcomes = [f"{count:,} {_OUTCOMES[name]}" for name, count in stage.report.truncation.items() if count]
        rows.append(("Limit", f"{stage.report.max_length:,} tokens, {stage.report.overlong}: {', '.join(outcomes)}"))
        lengths = ", ".join(f"p{p} {tokens:,}" for p, tokens in stage.report.length_percentiles.items())
        rows.append(("Lengths", f"{lengths} tokens, as kept"))
    supervised = f"{stage.num_supervised_tokens:,} supervised ({share(stage.supervised_fraction)})"
    rows.append(("Tokens", f"{stage.num_tokens:,}, {supervised}"))
    if stage.answers is not None:
        rows.append(("Answers", describe_answers(stage.answers)))
    rows.append(("BOS", describe_bos(stage)))
    rows.append(("Duplicates", f"{stage.num_duplicates:,} rows equal an earlier one"))
    return [*rows, *describe_batches(stage.batches)]


def describe_answers(answers: AnswerLengths) -> str:
    """Return how long good and bad answers are."""
    good, bad = answers.mean_chosen_tokens, answers.mean_rejected_tokens
    if not answers.num_pairs:
        counts = f"{answers.num_chosen:,} desirable and {answers.num_rejected:,} undesirable"
        return f"{counts}, of {good:,.1f} and {bad:,.1f} tokens on average"
    same = answers.num_pairs - answers.chosen_longer - answers.rejected_longer
    longer = f"{share(answers.chosen_longer_share)}, the rejected one in {share(answers.rejected_longer_share)}"
    means = f"chosen ones have {good:,.1f} tokens on average, rejected ones {bad:,.1f}"
    equal = f"; {number(same, 'pair has', 'pairs have')} two of one length" if same else ""
    return f"{means}; the chosen one is longer in {longer} of {answers.num_pairs:,} pairs{equal}"


def describe_batches(batches: BatchFindings) -> Rows:
    """Return how the rows share batches."""
    budget = f" of at most {batches.tokens_per_batch:,} tokens" if batches.tokens_per_batch else ""
    kind = "packed" if batches.packed else f"padded, at most {batches.padded_batch_size} rows each"
    filled = f"{batches.num_batches:,}{budget}, {kind}: {share(batches.efficiency)} filled"
    plain = f"{batches.padded_capacity:,} positions padded in batches of {batches.padded_batch_size} in random order"
    return [("Batches", filled), ("Padding saved", f"{share(batches.saved_fraction)} of {plain}")]


def describe_leakage(leakage: Leakage) -> str:
    """Return how many rows of a stage are trained on."""
    return (
        f"of {leakage.num_rows:,} rows, training rows too: {leakage.num_exact:,}; "
        f"with a question that is trained on: {leakage.num_same_question:,}"
    )


def describe_plan(plan: RunPlan) -> Rows:
    """Return the steps and tokens of the run."""
    ranks = f" x {plan.world_size} ranks" if plan.world_size > 1 else ""
    step = (
        f"{number(plan.accumulate_grad_batches, 'batch', 'batches')}{ranks}, about {plan.tokens_per_step:,.0f} tokens"
    )
    rows = [("Optimizer step", f"{step}, {plan.supervised_tokens_per_step:,.0f} supervised")]
    if plan.steps_per_epoch is None or plan.batches_per_epoch is None:
        rows.append(("Epoch", "of unknown length"))
    else:
        per_rank = " on each rank" if plan.world_size > 1 else ""
        batches = number(plan.batches_per_epoch, "batch", "batches")
        rows.append(("Epoch", f"{number(plan.steps_per_epoch, 'step', 'steps')}, {batches}{per_rank}"))
    if plan.total_steps is None:
        rows.append(("Run", "until stopped: neither max_epochs nor max_steps ends it"))
        return rows
    passes = "" if plan.epochs is None else f"{plan.epochs:,.2f}".rstrip("0").rstrip(".")
    epochs = passes and f" ({passes} {'epoch' if passes == '1' else 'epochs'})"
    tokens = f"about {plan.total_tokens:,} tokens, {plan.total_supervised_tokens:,} supervised"
    rows.append(("Run", f"{number(plan.total_steps, 'step', 'steps')}{epochs}, {tokens}; {plan.limited_by} ends it"))
    return rows


def number(count: int, one: str, many: str) -> str:
    """Return a count with its noun."""
    return f"{count:,} {one if count == 1 else many}"
