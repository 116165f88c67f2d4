"""The questions, put to the base, to each adapter on it, and to merged models, all under the same conditions."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel

from lightning_qlora.checkpoints.identity import identify_tokenizer, refuse_differences
from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.evaluation import (
    AnswerSheet,
    Question,
    adapters_off,
    answer_questions,
    encode_prompts,
    encode_references,
)
from lightning_qlora.model import load_base_model
from lightning_qlora.tools.comparison.findings import Participant
from lightning_qlora.tools.loading import to_gpu

__all__ = ["BASE", "Decoding", "ask_adapters", "ask_merged"]

BASE = "base"
"""The name of the base among the participants."""


class Decoding(NamedTuple):
    """How answers are made, the same for all.

    Attributes:
        max_new_tokens: Longest answer, in tokens.
        batch_size: Questions answered together.
        seed: Of the random draws; set anew for each participant.
        sampling: Options of ``transformers.GenerationConfig``; greedy without any.
    """

    max_new_tokens: int
    batch_size: int
    seed: int
    sampling: dict[str, Any]


def ask_adapters(
    model: PreTrainedModel | PeftModel,
    template: ChatTemplate,
    questions: list[Question],
    adapters: Mapping[str, Path],
    base: str,
    decoding: Decoding,
) -> list[Participant]:
    """Ask the base and each adapter; one base in memory serves them all.

    Args:
        model: The base, with the adapters on it if there are any.
        template: Renders the questions.
        questions: What to ask.
        adapters: The folders of the adapters by name.
        base: Where the base came from.
        decoding: How answers are made.

    Raises:
        ValueError: If a question or a reference cannot be rendered; names its line.
    """
    encode_prompts(template, questions)  # find out now, not after the first model has answered
    encode_references(template, questions)
    with adapters_off(model) if isinstance(model, PeftModel) else nullcontext():
        participants = [Participant("base", base, questions, _ask(model, template, questions, BASE, decoding))]
    for name, folder in adapters.items():
        assert isinstance(model, PeftModel)
        model.set_adapter(name)
        sheet = _ask(model, template, questions, name, decoding)
        participants.append(Participant("adapter", str(folder), questions, sheet))
    return participants


def ask_merged(
    folder: Path,
    name: str,
    template: ChatTemplate,
    questions: list[Question],
    decoding: Decoding,
    *,
    stop_token_ids: Collection[int] = (),
    allow_mismatch: Collection[str] = (),
    trust_remote_code: bool = False,
) -> Participant:
    """Load a merged model as it is stored, and ask it with the prompts of the others.

    Args:
        folder: A model that transformers loads.
        name: What the outputs call it.
        template: The template of the others.
        questions: What to ask.
        decoding: How answers are made.
        stop_token_ids: Where the others stop.
        allow_mismatch: May hold ``tokenizer`` and ``chat_template``.
        trust_remote_code: Whether Python code in the folder may run.

    Raises:
        IdentityMismatchError: If its tokenizer or chat template is another.
    """
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        recorded, found = identify_tokenizer(template.tokenizer), identify_tokenizer(tokenizer)
        refuse_differences(f"The merged model in {str(folder)!r}", recorded, found, allow_mismatch)
    model = load_base_model(str(folder), quantization=None, trust_remote_code=trust_remote_code)
    to_gpu(model)
    if stop_token_ids:
        model.generation_config.eos_token_id = list(stop_token_ids)
    model.eval()
    return Participant("merged", str(folder), questions, _ask(model, template, questions, name, decoding))


def _ask(
    model: PreTrainedModel | PeftModel, template: ChatTemplate, questions: list[Question], name: str, decoding: Decoding
) -> AnswerSheet:
    print(f"{name} answers {len(questions)} questions.", file=sys.stderr, flush=True)
    torch.manual_seed(decoding.seed)
    return answer_questions(
        model,
        template,
        questions,
        name=name,
        batch_size=decoding.batch_size,
        max_new_tokens=decoding.max_new_tokens,
        progress=sys.stderr.isatty(),
        **decoding.sampling,
    )
