"""How far a merged model's predictions are from those of the 4-bit model with its adapter."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.data.formats import parse_row
from lightning_qlora.data.sources import read_records
from lightning_qlora.evaluation import read_questions
from lightning_qlora.schema import Completion, Conversation, Message, Origin, RowRefused

__all__ = ["Agreement", "compare_logits", "encode_texts", "in_float32", "measure_agreement"]

_LOGITS_ROWS = 256  # positions compared at once: 256 x 128k float64 values are 256 MiB

# A little of everything, for where no data is named: what they say does not matter, only that models predict it.
_BUILT_IN = (
    ("What is the capital of France?", "The capital of France is Paris."),
    (
        "Explain in two sentences why the sky is blue.",
        "Air scatters short waves more than long ones. So blue light reaches us from everywhere.",
    ),
    (
        "Write a Python function that returns the larger of two numbers.",
        "def larger(a, b):\n    return a if a > b else b",
    ),
    ("Übersetze ins Deutsche: The train is late again.", "Der Zug hat wieder Verspätung."),
    ("List three prime numbers above 100 as JSON.", '{"primes": [101, 103, 107]}'),
    (
        "Summarise: The meeting moved from Monday to Thursday because two speakers were ill.",
        "The meeting is on Thursday instead, as two speakers fell ill.",
    ),
    ("What is 17 * 23? Show the steps.", "17 * 23 = 17 * 20 + 17 * 3 = 340 + 51 = 391."),
    (
        "My order 48213 has not arrived. What can I do?",
        "I am sorry about that. If the tracking page shows nothing new for three days, we send it again.",
    ),
)


class Agreement(NamedTuple):
    """How two models' next-token distributions differ, over all positions of some texts.

    Attributes:
        num_texts: Texts compared.
        num_tokens: Positions compared.
        mean_kl: Mean Kullback-Leibler divergence from the trained model's distribution, in nats per token.
        max_kl: The largest of them.
        top1_agreement: Share of the positions where both find the same token most likely.
        max_logit_difference: The largest absolute difference of any logit.
    """

    num_texts: int
    num_tokens: int
    mean_kl: float
    max_kl: float
    top1_agreement: float
    max_logit_difference: float

    def __str__(self) -> str:
        return (
            f"mean KL {self.mean_kl:.2e} nats, max KL {self.max_kl:.2e}, top-1 agreement {self.top1_agreement:.2%}, "
            f"max |logit difference| {self.max_logit_difference:.2e} over {self.num_tokens} tokens of "
            f"{self.num_texts} texts"
        )


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, files: Sequence[str], max_tokens: int
) -> tuple[list[list[int]], str]:
    """Render and encode texts to compare models on.

    Args:
        tokenizer: With the chat template of the training.
        files: Training data or questions; none for some texts that are built in.
        max_tokens: Of all texts together; the last one is cut there.

    Returns:
        The token ids of each text, and where the texts come from.

    Raises:
        ValueError: If a file holds nothing that the template can render.
    """
    template = ChatTemplate(tokenizer)
    found: list[list[int]] = []
    left = max_tokens
    for ids in (ids for file in files or (None,) for ids in _texts_of(file, template)):
        found.append(ids[:left])
        left -= len(found[-1])
        if left <= 1:  # one token predicts nothing more than the last text did
            break
    found = [ids for ids in found if len(ids) > 1]
    if not found:
        raise ValueError(f"None of {list(files)} holds a text that the chat template can render. Name other data.")
    return found, ", ".join(files) or "texts built into lightning_qlora"


def _texts_of(file: str | None, template: ChatTemplate) -> Iterator[list[int]]:
    if file is None:
        rows = [_built_in(template, *pair, number) for number, pair in enumerate(_BUILT_IN, start=1)]
        yield from (ids for ids in (_encode(template, row) for row in rows) if ids)
        return
    any_row = False
    for origin, record in read_records(file):
        try:
            row = record if isinstance(record, RowRefused) else parse_row(record, origin)
        except RowRefused:
            continue
        ids = _encode(template, row) if isinstance(row, (Conversation, Completion)) else None
        if ids:
            any_row = True
            yield ids
    if any_row:
        return
    for question in read_questions(file):
        if question.reference is None:
            yield template.encode_prompt(question.messages, question.tools)
            continue
        answer = Message("assistant", question.reference)
        ids = _encode(template, Conversation((*question.messages, answer), question.origin, question.tools))
        if ids:
            yield ids


def _built_in(template: ChatTemplate, prompt: str, answer: str, number: int) -> Conversation | Completion:
    origin = Origin("built-in", number)
    if template.tokenizer.chat_template:
        return Conversation((Message("user", prompt), Message("assistant", answer)), origin)
    return Completion(f"{prompt}\n", answer, origin)


def _encode(template: ChatTemplate, row: Conversation | Completion) -> list[int] | None:
    (encoded,) = template.encode_batch([row])
    return None if isinstance(encoded, RowRefused) else encoded.input_ids


def in_float32(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """Let a model compute in float32 on the weights that it was trained on, so that only weights are compared.

    bitsandbytes dequantises into the dtype of its input, so in float32 it would compute with finer weights than those
    that training rounded to bfloat16.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.forward = partial(_forward_as_trained, module)  # type: ignore[method-assign]
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and not isinstance(parameter, Params4bit):
                parameter.data = parameter.data.float()  # in place, so that tied parameters stay one
    return model.eval()


def _forward_as_trained(module: Linear4bit, x: Tensor) -> Tensor:
    packed: Any = module.weight
    weight = dequantize_4bit(packed.data, packed.quant_state)  # of the dtype that the base was loaded in
    return functional.linear(x, weight.to(x.dtype), module.bias)


def measure_agreement(
    trained: Callable[[], PreTrainedModel | PeftModel],
    merged: Callable[[], PreTrainedModel | PeftModel],
    texts: Sequence[Sequence[int]],
    scratch: Path,
) -> Agreement:
    """Compare two models' predictions of the next token at every position.

    The models are loaded one after the other, and the first one's logits wait on the disk, 4 bytes for each position
    and token of the vocabulary.

    Args:
        trained: Loads the model to be matched.
        merged: Loads the model to be judged.
        texts: Token ids.
        scratch: A folder with room for the logits.
    """
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".logits-") as folder:
        files = [Path(folder) / f"{number}.safetensors" for number in range(len(texts))]
        for logits, file in zip(_logits(trained(), texts), files, strict=True):
            save_file({"logits": logits}, file)
            del logits
        parts = []
        for logits, file in zip(_logits(merged(), texts), files, strict=True):
            parts.append(compare_logits(load_file(file)["logits"], logits))
            file.unlink()
    num_tokens = sum(part.num_tokens for part in parts)
    return Agreement(
        num_texts=len(parts),
        num_tokens=num_tokens,
        mean_kl=sum(part.mean_kl * part.num_tokens for part in parts) / num_tokens,
        max_kl=max(part.max_kl for part in parts),
        top1_agreement=sum(part.top1_agreement * part.num_tokens for part in parts) / num_tokens,
        max_logit_difference=max(part.max_logit_difference for part in parts),
    )


def _logits(model: PreTrainedModel | PeftModel, texts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    device = next(model.parameters()).device
    for ids in texts:
        with torch.inference_mode():
            logits_TV: Tensor = model(input_ids=torch.tensor([list(ids)], device=device)).logits[0]
        yield logits_TV.float().cpu()


def compare_logits(trained_TV: Tensor, merged_TV: Tensor) -> Agreement:
    """Compare the logits of one text. A head that was padded is compared where both have a token."""
    width = min(trained_TV.shape[1], merged_TV.shape[1])
    kl, agreeing, largest = [], 0, 0.0
    for start in range(0, trained_TV.shape[0], _LOGITS_ROWS):
        # float64: divergences of 1e-7 are differences of numbers near 10.
        trained = trained_TV[start : start + _LOGITS_ROWS, :width].double()
        merged = merged_TV[start : start + _LOGITS_ROWS, :width].double()
        largest = max(largest, float((trained - merged).abs().max()))
        agreeing += int((trained.argmax(1) == merged.argmax(1)).sum())
        log_p, log_q = trained.log_softmax(1), merged.log_softmax(1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(1))
    divergences = torch.cat(kl)
    num_tokens = len(divergences)
    return Agreement(1, num_tokens, float(divergences.mean()), float(divergences.max()), agreeing / num_tokens, largest)
