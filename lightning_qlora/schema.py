"""The vocabulary that every other room shares: conversations, refusals and batches.

Nothing here imports another part of the package. ``data`` and ``modules`` meet only in the batches
defined below, so either can be replaced.

Shape letters, used as suffixes of tensor names (``hidden_TD``):

===  =========================================================================================
B    rows of a padded batch (1 in a packed batch)
L    positions of one padded row
T    positions of the flattened batch, ``B * L``; in a packed batch the token count of all documents
N    supervised positions of the batch (the ones that enter the loss)
K    documents of the batch
P    preference pairs of the batch
D    hidden size of the model
V    vocabulary size
===  =========================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, TypedDict, get_args, runtime_checkable

from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from torch import Tensor  # processes that only tokenise are spared the second that it takes

__all__ = [
    "IGNORE_INDEX",
    "ROLES",
    "ChatDataModule",
    "Completion",
    "Conversation",
    "DataStage",
    "Message",
    "Origin",
    "PreferenceBatch",
    "PreferenceData",
    "PreferenceRow",
    "PromptBatch",
    "Role",
    "Row",
    "RowRefused",
    "SFTBatch",
    "TokenizedRow",
    "UnpairedRow",
]

IGNORE_INDEX = -100
"""The label of a position that does not enter the loss (the convention of ``torch.nn.CrossEntropyLoss``)."""

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)


DataStage: TypeAlias = Literal["train", "validation", "test"]
"""The parts of a run that have rows of their own, as data modules name them."""


class Origin(NamedTuple):
    """Where a row came from, so that every message about it can name the place.

    Attributes:
        source: The file, or the dataset id, that held the row.
        line: The line of the file, or the row of the dataset, counted from 1.
    """

    source: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: Who speaks.
        content: The text of the turn. Empty only where ``tool_calls`` or ``reasoning`` say something.
        reasoning: What an assistant thought before it answered (``reasoning_content`` in chat templates).
        tool_calls: The functions an assistant calls, in the OpenAI shape, with ``arguments`` as a dictionary.
        tool_call_id: The call that a ``tool`` message answers.
        name: The function that a ``tool`` message answers for, or the speaker's name.
        train: Whether this turn is supervised: ``None`` leaves it to the run's policy.
    """

    role: Role
    content: str
    reasoning: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    train: bool | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat, to be rendered by a chat template; its assistant turns are supervised.

    Attributes:
        messages: The turns, oldest first.
        origin: Where it was read.
        tools: JSON schemas of the functions offered to the assistant.
        template_kwargs: Extra variables of this row for the chat template.
    """

    messages: tuple[Message, ...]
    origin: Origin
    tools: tuple[dict[str, Any], ...] = ()
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Completion:
    """Raw text without a chat template: ``prompt`` is read, ``completion`` and the end token are supervised."""

    prompt: str
    completion: str
    origin: Origin


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """Two answers to one prompt, the first preferred.

    Attributes:
        prompt: The turns that both answers share.
        chosen: The preferred assistant turn(s).
        rejected: The assistant turn(s) that lost.
        origin: Where it was read.
        tools: JSON schemas of the functions offered to the assistant.
        template_kwargs: Extra variables of this row for the chat template.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    origin: Origin
    tools: tuple[dict[str, Any], ...] = ()
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class UnpairedRow:
    """One answer to a prompt, judged by itself.

    Attributes:
        prompt: The turns before the answer.
        completion: The assistant turn(s) that are judged.
        desirable: The judgement.
        origin: Where it was read.
        tools: JSON schemas of the functions offered to the assistant.
        template_kwargs: Extra variables of this row for the chat template.
    """

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    desirable: bool
    origin: Origin
    tools: tuple[dict[str, Any], ...] = ()
    template_kwargs: dict[str, Any] = field(default_factory=dict)


Row: TypeAlias = Conversation | Completion


class RowRefused(ValueError):  # noqa: N818 - a verdict on one row, not a failure of the program
    """One row cannot be used; the run goes on without it and counts it.

    Args:
        reason: A short stable code, such as ``"empty-answer"``: what the tables count by.
        detail: One sentence for a person: what was found and what is allowed.
        origin: Where the row was read.
    """

    def __init__(self, reason: str, detail: str, origin: Origin) -> None:
        super().__init__(reason, detail, origin)
        self.reason = reason
        self.detail = detail
        self.origin = origin

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}: {self.detail}"


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    r"""One document ready for training.

    Attributes:
        input_ids: The token ids, T of them.
        supervised: For each token, whether the model learns to write it. The first is always false: nothing
            comes before it to predict it from.
        origin: Where the row was read.

    A two-turn chat, with the supervised tokens marked::

        <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n
                                                              ^^^^^^^^^^^^^^^^
    """

    input_ids: list[int]
    supervised: list[bool]
    origin: Origin


class SFTBatch(TypedDict):
    """A batch for supervised fine-tuning, packed (``B == 1``) or padded.

    Everything the step needs to know on the host is there as a Python number, so that the step never waits
    for the device.
    """

    input_ids: Tensor
    """(B, L) int64. Packed: all documents one after the other."""
    position_ids: Tensor
    """(B, L) int64. Restarts from 0 at each document."""
    labels: Tensor
    """(B, L) int64. The token id where supervised, else ``IGNORE_INDEX``; not shifted, as in transformers."""
    attention_mask: Tensor | None
    """(B, L) int64 of a padded batch, 1 for tokens and 0 for padding; ``None`` in a packed batch."""
    cu_seq_lens: Tensor | None
    """(K + 1,) int32 cumulative document lengths, from 0 to T, of a packed batch; ``None`` in a padded one."""
    document_lengths: tuple[int, ...]
    """K lengths in tokens, on the host."""
    target_positions: Tensor
    """(N,) int64 indices into the flattened T positions: the hidden state there predicts ``targets``."""
    targets: Tensor
    """(N,) int64 token ids to be predicted: the supervised tokens in order."""
    row_ids: tuple[int, ...]
    """K indices into the prepared data set, or a stream's hashes of places, to name the rows' origins; -1 for a filler
    that holds no row."""


class PreferenceBatch(SFTBatch):
    """A batch of answers to be weighed against one another: the answers of a pair stand side by side.

    The K documents are answers, each with its prompt. What the loss needs of each is the sum of its tokens'
    log-probabilities.

    Where answers share their prompt, it stands in the batch once: the second answer is a branch, a document that goes
    on where the prompt of the document before it ended. Of a prompt p, the chosen answer c and the rejected answer r::

        input_ids         p p p c c r r r
        position_ids      0 1 2 3 4 3 4 5
        document_lengths  5         3
        shared_prompts    0         3
        target_positions  2 3 2 5 6        (the last position of the prompt predicts both first tokens)
        targets           c c r r r        (3 4 5 6 7)

    Then ``labels`` says which tokens are supervised, but must not be shifted: not every one is predicted by the
    position before it. Attention must follow ``shared_prompts``; what knows only ``cu_seq_lens`` gets it wrong.
    """

    target_documents: Tensor
    """(N,) int64. Which of the K documents each supervised position belongs to, ascending."""
    num_targets: tuple[int, ...]
    """K counts of supervised tokens, on the host."""
    chosen: Tensor
    """(P,) int64 document numbers of the preferred answers; of unpaired rows, the desirable ones."""
    rejected: Tensor
    """(P,) int64 document numbers of the answers that lost, pair by pair; of unpaired rows, (Q,) the undesirable."""
    mismatched: Tensor
    """(M,) int64 documents that hold another row's answer, from which KTO estimates its KL term; empty for pairs."""
    shared_prompts: tuple[int, ...] | None
    """K numbers on the host, if prompts are shared: how many tokens at the beginning of the nearest document before it
    with a 0 here a document goes on from; 0 for a document with its own prompt. ``None`` in all other batches."""
    reference_log_probs: Tensor | None
    """(K,) float32 log-probabilities of the documents under the reference, if computed beforehand, in nats; see
    :class:`PreferenceData`."""


class PromptBatch(TypedDict):
    """Prompts to be continued, padded on the left."""

    input_ids: Tensor
    """(B, L) int64."""
    attention_mask: Tensor
    """(B, L) int64, 0 for padding."""
    rows: tuple[dict[str, Any], ...]
    """The B questions as they were read, to be written beside the answers."""


@runtime_checkable
class ChatDataModule(Protocol):
    """What modules and callbacks may ask of a data module, beyond Lightning's own interface."""

    tokenizer: PreTrainedTokenizerBase

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The end-of-turn tokens that the data supervises; generation stops at them."""

    @property
    def control_token_ids(self) -> tuple[int, ...]:
        """The special tokens that the chat template writes; the base must know them."""


@runtime_checkable
class PreferenceData(Protocol):
    """What :class:`~lightning_qlora.modules.PreferenceModule` may ask of a data module of preferences.

    The documents of a stage are numbered, and ``row_ids`` of a :class:`PreferenceBatch` holds their numbers: one for
    each of its K documents, chosen, rejected and mismatched alike, so that what depends on a document alone can be
    computed once. (A mismatched document is therefore fixed when the data is prepared, not when a batch is made.) The
    module asks after ``setup`` and before the loaders of the run are made.
    """

    @property
    def preference_stages(self) -> tuple[DataStage, ...]:
        """The stages that were set up and whose documents are known beforehand (not those of a stream)."""

    def num_documents(self, stage: DataStage) -> int:
        """Return an upper bound of the document numbers of a stage: the length of an array that they index."""

    def documents_digest(self, stage: DataStage) -> str:
        """Return a hash of the documents: their numbers, token ids and supervised positions."""

    def reference_batches(self, stage: DataStage) -> Iterable[PreferenceBatch]:
        """Return batches that hold each document of a stage at least once over all ranks: this rank's share."""

    def set_reference_log_probs(self, stage: DataStage, log_probs: Tensor) -> None:
        """Put reference log-probabilities into the stage's batches from now on, as ``reference_log_probs``.

        Args:
            stage: Whose documents.
            log_probs: ``(num_documents(stage),)`` float32 on the host, in nats, by document number; NaN where the
                stage has no document of that number.
        """

    def mean_chosen_tokens(self) -> float:
        """Return the mean count of supervised tokens of the preferred (desirable) answers that are trained on."""
