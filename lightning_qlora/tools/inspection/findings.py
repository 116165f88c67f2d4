"""What an inspection finds, as plain values: one object that the terminal, the page and ``--json`` all show."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lightning_qlora.data.report import AnswerLengths, PreparationReport

__all__ = [
    "SHARE_BINS",
    "BatchFindings",
    "BosFindings",
    "Inspection",
    "Leakage",
    "LengthWhatIf",
    "NamedToken",
    "Repeat",
    "RunPlan",
    "Sample",
    "Segment",
    "StageFindings",
    "TemplateFindings",
    "Verdict",
]

FORMAT_VERSION = 1
"""Of the JSON: raised when a field changes its meaning or goes."""

SHARE_BINS = 20
"""Bins of the histograms of shares: 5 % each, the last with 100 % in it."""


@dataclass(frozen=True, slots=True)
class NamedToken:
    """A token with its name, such as ``<|im_end|>``."""

    id: int
    text: str


@dataclass(frozen=True, slots=True)
class TemplateFindings:
    """What turns conversations into tokens.

    Attributes:
        tokenizer: Its name or folder.
        fingerprint: Hash of all that decides ids and masks: template, tokenizer, variables, supervision policy.
        supervise: Which assistant turns are learned: ``all``, the ``last``, or of preferences the ``answers``.
        bos_token: The beginning-of-sequence token, if there is one.
        stop_tokens: What supervised turns end with, where generation stops.
        control_tokens: What the chat template writes beside text.
        notes: What the chat template does to ordinary chats that a user should know before training on them.
    """

    tokenizer: str
    fingerprint: str
    supervise: str
    bos_token: NamedToken | None
    stop_tokens: list[NamedToken]
    control_tokens: list[NamedToken]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class BosFindings:
    """Beginning-of-sequence tokens of the rows of a stage.

    Attributes:
        at_start: Rows by the number of such tokens that they begin with.
        expected: The numbers that this tokenizer begins with by itself: for chats, for raw text.
        rows_with_later: Rows that hold one further on.
        opens_turns: Whether the family uses the token to open turns, so that later ones are right.
        rows_unexpected: Rows that begin otherwise than expected, or hold one further on though it opens no turn.
    """

    at_start: dict[int, int]
    expected: list[int]
    rows_with_later: int
    opens_turns: bool
    rows_unexpected: int


@dataclass(frozen=True, slots=True)
class LengthWhatIf:
    """What another ``max_length`` would do to the rows that can be tokenised, by the configured policy.

    Attributes:
        max_length: The limit, in tokens.
        fits: Rows within it.
        shortened: Rows that would lose turns or tokens.
        refused: Rows that would be left out.
        num_tokens: Tokens of the rows then kept.
        current: Whether it is the configured limit.
    """

    max_length: int
    fits: int
    shortened: int
    refused: int
    num_tokens: int
    current: bool


@dataclass(frozen=True, slots=True)
class BatchFindings:
    """How the rows of a stage share batches.

    Attributes:
        packed: Whether documents lie side by side without padding.
        tokens_per_batch: Token budget of a batch; ``None`` if only the number of rows limits it.
        num_batches: Batches of an epoch, of all ranks together.
        num_tokens: Tokens of an epoch.
        capacity: Positions of the batches: the budget of packed ones, tokens and padding of padded ones.
        efficiency: Tokens per position, from 0 to 1.
        fill: Batches by their share of filled positions, in :data:`SHARE_BINS` bins.
        padded_batch_size: Rows of the plain alternative: batches of this many rows in random order, padded.
        padded_capacity: Positions that the alternative would take.
    """

    packed: bool
    tokens_per_batch: int | None
    num_batches: int
    num_tokens: int
    capacity: int
    efficiency: float
    fill: list[int]
    padded_batch_size: int
    padded_capacity: int

    @property
    def saved_fraction(self) -> float:
        """Share of the alternative's positions that these batches do without: for packed ones, all its padding."""
        positions = self.num_tokens if self.packed else self.capacity
        return 1 - positions / self.padded_capacity if self.padded_capacity else 0.0


@dataclass(frozen=True, slots=True)
class Repeat:
    """A row, and an earlier one (or one of another stage) with the same content."""

    place: str
    of: str


@dataclass(frozen=True, slots=True)
class StageFindings:
    """The rows of one stage. A pair of answers to one prompt is one row, as long as its longer side.

    Attributes:
        name: ``train``, ``validation`` or ``test``.
        report: What became of every row read; ``None`` where the rows are held out of the training rows.
        num_rows: Rows of an epoch, with those that a weight repeats.
        num_distinct_rows: Rows of the files in use.
        num_tokens: Tokens of an epoch; prompts that answers share count once.
        num_supervised_tokens: The supervised ones among them.
        length_step: Width of a step of ``lengths``, in tokens.
        lengths: Rows by length before the limit (as kept, where there is no report): the key is the upper bound of
            the step.
        supervised_share: Rows by their share of supervised tokens, in :data:`SHARE_BINS` bins.
        bos: Beginning-of-sequence tokens; ``None`` where the tokenizer has none.
        num_duplicates: Rows in use whose tokens equal an earlier one's.
        duplicates: The first of them.
        batches: How they share batches.
        what_if: Other length limits, shortest first; empty where there is no report.
        answers: Of preference data how long good and bad answers are, of the different rows in use.
    """

    name: str
    report: PreparationReport | None
    num_rows: int
    num_distinct_rows: int
    num_tokens: int
    num_supervised_tokens: int
    length_step: int
    lengths: dict[int, int]
    supervised_share: list[int]
    bos: BosFindings | None
    num_duplicates: int
    duplicates: list[Repeat]
    batches: BatchFindings
    what_if: list[LengthWhatIf]
    answers: AnswerLengths | None = None

    @property
    def supervised_fraction(self) -> float:
        """Share of the tokens that the model learns to write."""
        return self.num_supervised_tokens / max(1, self.num_tokens)


@dataclass(frozen=True, slots=True)
class Leakage:
    """Rows that a stage is measured on although they are trained on.

    Attributes:
        stage: ``validation`` or ``test``.
        num_rows: Its rows.
        num_exact: Those whose tokens equal a training row's.
        num_same_question: Those whose last question, with all before it, is that of a trained answer (whatever the
            answer is); the exact ones are among them unless they have no question.
        exact: The first exact ones, with the training row.
        same_question: The first others with the same question, with the training row.
    """

    stage: str
    num_rows: int
    num_exact: int
    num_same_question: int
    exact: list[Repeat]
    same_question: list[Repeat]


@dataclass(frozen=True, slots=True)
class RunPlan:
    """How long training will go on, by the trainer's settings; numbers of tokens are estimates where limits cut in.

    Attributes:
        world_size: Data-parallel ranks.
        accumulate_grad_batches: Batches of a rank in an optimizer step.
        batches_per_epoch: Batches of a rank; ``None`` for a stream.
        steps_per_epoch: Optimizer steps; ``None`` for a stream.
        tokens_per_step: On average, of all ranks.
        supervised_tokens_per_step: The supervised ones among them.
        epochs: Passes over the data, the last maybe not whole; ``None`` if nothing limits them, or for a stream.
        total_steps: Optimizer steps of the run; ``None`` if nothing limits them.
        total_tokens: Tokens of the run; ``None`` likewise.
        total_supervised_tokens: The supervised ones among them.
        limited_by: The setting that ends the run: ``max_steps``, ``max_epochs``, or nothing.
    """

    world_size: int
    accumulate_grad_batches: int
    batches_per_epoch: int | None
    steps_per_epoch: int | None
    tokens_per_step: float
    supervised_tokens_per_step: float
    epochs: float | None
    total_steps: int | None
    total_tokens: int | None
    total_supervised_tokens: int | None
    limited_by: str | None


@dataclass(frozen=True, slots=True)
class Segment:
    """Some tokens of a row that are alike.

    Attributes:
        text: What they decode to.
        supervised: Whether the model learns to write them.
        control: Whether it is a control token (then it is one alone).
    """

    text: str
    supervised: bool
    control: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """One row as the model sees it.

    Attributes:
        stage: Whose row it is.
        place: The file and line it was read from.
        source: The source, as the configuration names it.
        num_tokens: Its tokens.
        num_supervised_tokens: The supervised ones among them.
        segments: Its text, in order.
        refused: Why it cannot be used, if it was asked for and cannot.
        asked: Whether it was asked for by its place.
        answer: What its answer is in preference data: ``chosen``, ``desirable`` or ``undesirable``.
        rejected: Of a pair, the text of the rejected answer, which stands behind the same prompt.
    """

    stage: str
    place: str
    source: str
    num_tokens: int
    num_supervised_tokens: int
    segments: list[Segment]
    refused: str | None = None
    asked: bool = False
    answer: str | None = None
    rejected: list[Segment] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One limit, and what was found.

    Attributes:
        name: The option that sets the limit.
        stage: Where it was looked for.
        found: The value found.
        allowed: The limit.
        passed: Whether the limit is kept.
        text: What it says, for people.
    """

    name: str
    stage: str
    found: float
    allowed: float
    passed: bool
    text: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """All that is known of a run's data before the run.

    Attributes:
        template: Tokenizer and chat template.
        stages: The stages that have rows, ``train`` first.
        leakage: Evaluation rows that are trained on, by stage.
        plan: The steps of training; ``None`` without training data.
        samples: Some rows.
        notes: What the reader has to know about the figures.
        verdicts: The limits that were asked for.
    """

    template: TemplateFindings
    stages: list[StageFindings]
    leakage: list[Leakage]
    plan: RunPlan | None
    samples: list[Sample]
    notes: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def missed(self) -> list[Verdict]:
        """The limits that are not kept."""
        return [verdict for verdict in self.verdicts if not verdict.passed]

    def with_samples(self, count: int) -> Inspection:
        """Return it with the rows asked for, and at most ``count`` others."""
        asked = [sample for sample in self.samples if sample.asked]
        return replace(self, samples=[*asked, *[sample for sample in self.samples if not sample.asked][:count]])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; with the totals that follow from the counts."""
        values = {"version": FORMAT_VERSION, **asdict(self)}
        for stage, plain in zip(self.stages, values["stages"], strict=True):
            plain["supervised_fraction"] = stage.supervised_fraction
            plain["batches"]["saved_fraction"] = stage.batches.saved_fraction
            if stage.answers is not None:
                means = ("mean_chosen_tokens", "mean_rejected_tokens", "chosen_longer_share", "rejected_longer_share")
                plain["answers"] |= {name: getattr(stage.answers, name) for name in means}
            if stage.report is not None:
                names = ("rows_read", "rows_kept", "refused", "truncation", "num_tokens", "num_supervised_tokens")
                plain["report"] |= {name: getattr(stage.report, name) for name in (*names, "full_lengths")}
        return values
