"""Answers of a model to fixed questions, and its loss on the reference answers, batch by batch.

Generation is greedy, so that two models are asked under the same conditions. On a CPU every token costs one
dequantisation of all layers whatever the batch, so questions go in batches of similar prompt length, and a batch ends
when its last row has. Nothing that training depends on is left changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.evaluation.questions import Question
from lightning_qlora.evaluation.scores import Answer, AnswerSheet, ReferenceLoss, score_answer
from lightning_qlora.schema import IGNORE_INDEX, Conversation, Message, RowRefused

__all__ = [
    "adapters_off",
    "answer_questions",
    "decoding_config",
    "encode_prompts",
    "encode_references",
    "evaluation_mode",
    "generate_answers",
    "reference_losses",
    "stop_tokens",
]

_LOGITS_BYTES = 256 * 2**20  # of one forward over reference answers: it bounds how many rows go together


@contextmanager
def evaluation_mode(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Put a model into evaluation mode and give back everything as it was.

    Each module's training flag, each parameter's ``requires_grad`` (PEFT flips it when adapters are switched), the
    random state and the generation config are restored, so that a run that stops to answer questions trains on
    bit for bit like one that does not.
    """
    base = _base(model)
    training = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    configs = [(owner, owner.generation_config) for owner in (model, base)]
    # Under Lightning's inference mode, buffers that a model updates (some rotary embeddings) would become inference
    # tensors, which no later backward pass accepts.
    with isolate_rng(), torch.inference_mode(False), torch.no_grad():
        try:
            model.eval()
            yield
        finally:
            for module, flag in training:
                module.training = flag
            for parameter, flag in trainable:
                parameter.requires_grad_(flag)
            for owner, config in configs:
                owner.generation_config = config


@contextmanager
def adapters_off(model: PeftModel) -> Iterator[None]:
    """Let a model answer as its base would; ``requires_grad`` of the adapters is given back as it was."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


def stop_tokens(model: PreTrainedModel | PeftModel, chat_template: ChatTemplate) -> tuple[int, ...]:
    """Return the tokens that end an answer: those the template closes a turn with, and those the model names."""
    named = _base(model).generation_config.eos_token_id
    named = [] if named is None else [named] if isinstance(named, int) else named
    return tuple(dict.fromkeys([*chat_template.stop_token_ids, *named]))


def decoding_config(
    model: PreTrainedModel | PeftModel, chat_template: ChatTemplate, max_new_tokens: int, **sampling: Any
) -> GenerationConfig:
    """Build a decoding that depends on nothing but its arguments: greedy, until a stop token, unless told otherwise.

    Args:
        model: Its stop tokens are used besides the template's; its other defaults are not.
        chat_template: The template of the prompts.
        max_new_tokens: Longest answer, in tokens.
        sampling: Options of ``transformers.GenerationConfig``, such as do_sample, temperature, top_p.
    """
    stop = stop_tokens(model, chat_template)
    pad = chat_template.tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=1,
        use_cache=True,
        eos_token_id=list(stop) or None,
        pad_token_id=pad if pad is not None else (stop or (0,))[0],  # what ended rows are filled with, then cut off
        **{"do_sample": False, **sampling},
    )


def encode_prompts(chat_template: ChatTemplate, questions: Sequence[Question]) -> list[list[int]]:
    """Encode each question up to where the answer begins.

    Raises:
        ValueError: If the chat template cannot render a question; names its line.
    """
    prompts = []
    for question in questions:
        try:
            prompts.append(chat_template.encode_prompt(question.messages, question.tools))
        except ValueError as error:
            raise ValueError(f"{question.origin}: the question cannot be rendered: {error}") from error
    return prompts


def encode_references(chat_template: ChatTemplate, questions: Sequence[Question]) -> list[tuple[list[int], list[int]]]:
    """Encode each question with its reference answer: token ids up to the terminator, and their labels.

    Only the reference and its terminator are labelled, whatever earlier assistant turns a question holds. Questions
    without a reference get two empty lists.

    Raises:
        ValueError: If the reference cannot be rendered exactly; names its line.
    """
    last_turn = ChatTemplate(
        chat_template.tokenizer,
        supervise="last",
        template_kwargs=chat_template.template_kwargs,
        content_tokens=chat_template.content_tokens,
    )
    encoded: list[tuple[list[int], list[int]]] = []
    for question in questions:
        if question.reference is None:
            encoded.append(([], []))
            continue
        turns = (*question.messages, Message("assistant", question.reference, train=True))
        try:
            row = last_turn.encode(Conversation(turns, question.origin, tools=question.tools))
        except RowRefused as refusal:
            raise ValueError(f"{question.origin}: the reference cannot be used: {refusal.detail}") from refusal
        end = len(row.supervised) - row.supervised[::-1].index(True)
        pairs = zip(row.input_ids[:end], row.supervised[:end], strict=True)
        encoded.append((row.input_ids[:end], [token if kept else IGNORE_INDEX for token, kept in pairs]))
    return encoded


def generate_answers(
    model: PreTrainedModel | PeftModel,
    chat_template: ChatTemplate,
    questions: Sequence[Question],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 128,
    progress: str | None = None,
    **sampling: Any,
) -> list[Answer]:
    """Answer questions in batches, greedily unless ``sampling`` says otherwise.

    Args:
        model: The model, on its device.
        chat_template: Renders the prompts and knows the stop tokens.
        questions: What to answer.
        batch_size: Questions answered together. Memory grows by one key-value cache per row.
        max_new_tokens: Longest answer, in tokens.
        progress: Title of a progress bar; ``None`` for no bar.
        sampling: Options of ``transformers.GenerationConfig``, such as do_sample, temperature, top_p.

    Returns:
        The answers, in the order of the questions.
    """
    prompts = encode_prompts(chat_template, questions)
    config = decoding_config(model, chat_template, max_new_tokens, **sampling)
    stop = frozenset(config.eos_token_id or ())
    order = sorted(
        range(len(prompts)), key=lambda i: -len(prompts[i])
    )  # the longest first: out of memory early or never
    answers: dict[int, Answer] = {}
    bar = tqdm(total=len(prompts), desc=progress, unit="answer", disable=progress is None, leave=False)
    with evaluation_mode(model), bar:
        # A model's own defaults (a repetition penalty, a minimum length) would take part in every unset option.
        model.generation_config = _base(model).generation_config = config
        for batch in _batches(order, batch_size):
            written = _generate(model, [prompts[i] for i in batch], config, bar)
            for i, tokens in zip(batch, written, strict=True):
                answers[i] = _read_answer(chat_template, questions[i], tokens, stop)
    return [answers[i] for i in range(len(prompts))]


def _generate(
    model: PreTrainedModel | PeftModel, prompts: list[list[int]], config: GenerationConfig, bar: tqdm[None]
) -> list[list[int]]:
    """Continue one batch of prompts; rows that ended early are filled up with the padding token."""
    input_ids, attention_mask = _pad_left(prompts, config.pad_token_id or 0, _device(model))
    output = model.generate(  # type: ignore[operator]
        input_ids=input_ids,
        attention_mask=attention_mask,
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([_Progress(bar, len(prompts), config)]),
    )
    return [row.tolist() for row in output[:, input_ids.shape[1] :]]


def _read_answer(chat_template: ChatTemplate, question: Question, tokens: list[int], stop: frozenset[int]) -> Answer:
    end = next((i for i, token in enumerate(tokens) if token in stop), None)
    text = chat_template.tokenizer.decode(tokens[:end], skip_special_tokens=True)
    return Answer(question.id, str(text), len(tokens) if end is None else end + 1, end is not None)


def reference_losses(
    model: PreTrainedModel | PeftModel,
    chat_template: ChatTemplate,
    questions: Sequence[Question],
    *,
    batch_size: int = 32,
    progress: str | None = None,
) -> list[ReferenceLoss | None]:
    """Measure each reference answer: the summed cross-entropy of its tokens and its terminator, in nats.

    Args:
        model: The model, on its device.
        chat_template: Renders the questions with their references.
        questions: Those without a reference get ``None``.
        batch_size: Most rows of one forward pass; fewer where their logits would take more than 256 MiB.
        progress: Title of a progress bar; ``None`` for no bar.
    """
    encoded = encode_references(chat_template, questions)
    order = sorted((i for i, (ids, _) in enumerate(encoded) if ids), key=lambda i: -len(encoded[i][0]))
    longest = max((_answer_span(encoded[i][1]) for i in order), default=1)
    batch_size = max(
        1, min(batch_size, _LOGITS_BYTES // (4 * longest * _base(model).config.get_text_config().vocab_size))
    )
    losses: list[ReferenceLoss | None] = [None] * len(encoded)
    bar = tqdm(total=len(order), desc=progress, unit="reference", disable=progress is None, leave=False)
    with evaluation_mode(model), bar:
        for batch in _batches(order, batch_size):
            for i, loss in zip(batch, _nll(model, [encoded[i] for i in batch]), strict=True):
                losses[i] = loss
            bar.update(len(batch))
    return losses


def _nll(model: PreTrainedModel | PeftModel, rows: list[tuple[list[int], list[int]]]) -> list[ReferenceLoss]:
    """Sum the cross-entropy of each row's labelled tokens in one forward pass.

    Rows are aligned on the right, so that the logits of a short common tail are all that is ever formed.
    """
    device = _device(model)
    input_ids_BL, attention_mask_BL = _pad_left([ids for ids, _ in rows], 0, device)
    labels_BL, _ = _pad_left([labels for _, labels in rows], IGNORE_INDEX, device)
    tail = max(_answer_span(labels) for _, labels in rows)
    logits_BLV = model(
        input_ids=input_ids_BL,
        attention_mask=attention_mask_BL,
        position_ids=(attention_mask_BL.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=tail + 1,
    ).logits[:, :-1]
    losses = []
    for logits_LV, labels_L in zip(logits_BLV, labels_BL[:, -tail:], strict=True):
        supervised = labels_L != IGNORE_INDEX
        nll = functional.cross_entropy(logits_LV[supervised].float(), labels_L[supervised], reduction="sum")
        losses.append(ReferenceLoss(float(nll), int(supervised.sum())))
    return losses


def answer_questions(
    model: PreTrainedModel | PeftModel,
    chat_template: ChatTemplate,
    questions: Sequence[Question],
    *,
    name: str,
    batch_size: int = 32,
    max_new_tokens: int = 128,
    progress: bool = False,
    **sampling: Any,
) -> AnswerSheet:
    """Answer, score, and measure the references of a list of questions.

    Args:
        model: The model, on its device.
        chat_template: Renders the questions.
        questions: What to answer.
        name: Who answers, for the tables.
        batch_size: Questions answered together.
        max_new_tokens: Longest answer, in tokens.
        progress: Whether to show progress bars.
        sampling: Options of ``transformers.GenerationConfig``; greedy without any.
    """
    title = f"Answers {name}" if progress else None
    options = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "progress": title, **sampling}
    answers = generate_answers(model, chat_template, questions, **options)
    title = f"References {name}" if progress else None
    losses = reference_losses(model, chat_template, questions, batch_size=batch_size, progress=title)
    scores = [score_answer(question, answer.text) for question, answer in zip(questions, answers, strict=True)]
    return AnswerSheet(name, tuple(answers), tuple(scores), tuple(losses))


class _Progress(StoppingCriteria):
    """Moves a progress bar as rows end; never stops anything itself."""

    def __init__(self, bar: tqdm[None], num_rows: int, config: GenerationConfig) -> None:
        self.bar = bar
        self.num_rows = num_rows
        self.num_ended = 0
        self.num_tokens = 0
        self.max_new_tokens = config.max_new_tokens
        self.stop = config.eos_token_id or []
        self.ended: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        never = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        self.num_tokens += 1
        if self.bar.disable:
            return never
        stop = torch.tensor(self.stop, device=input_ids.device)
        ended = torch.isin(input_ids[:, -1], stop)
        self.ended = ended if self.ended is None else self.ended | ended
        num_ended = self.num_rows if self.num_tokens == self.max_new_tokens else int(self.ended.sum())
        self.bar.set_postfix(tokens=f"{self.num_tokens}/{self.max_new_tokens}", refresh=False)
        self.bar.update(num_ended - self.num_ended)
        self.bar.refresh()
        self.num_ended = num_ended
        return never


def _batches(order: list[int], size: int) -> Iterator[list[int]]:
    return (order[start : start + size] for start in range(0, len(order), size))


def _pad_left(rows: list[list[int]], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Align rows on the right: (B, L) values and (B, L) mask, both int64."""
    length = max(map(len, rows))
    values = torch.tensor([[fill] * (length - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return values, mask


def _answer_span(labels: list[int]) -> int:
    """Tokens from the first labelled one to the end."""
    return len(labels) - next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)


def _base(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[assignment]
    return base


def _device(model: PreTrainedModel | PeftModel) -> torch.device:
    embedding: Tensor = _base(model).get_input_embeddings().weight  # type: ignore[assignment]
    return embedding.device
