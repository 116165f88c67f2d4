"""Answers of a model that may be in the middle of its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig

__all__ = ["generate_answers"]


def generate_answers(
    model: PeftModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    stop_token_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Mapping[str, Any],
) -> list[list[int]]:
    """Continue prompts, greedily unless ``sampling`` says otherwise, until a stop token.

    Args:
        model: In training or not; it is left as it was.
        input_ids: (B, L) int64 prompts on the model's device, padded on the left.
        attention_mask: (B, L) int64, 0 for padding.
        stop_token_ids: Where an answer ends.
        max_new_tokens: Of the longest answer.
        sampling: Options of ``transformers.GenerationConfig``.

    Returns:
        B lists of the new token ids, without the stop token.
    """
    stop = list(stop_token_ids)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=stop or None,
        pad_token_id=stop[-1] if stop else 0,  # what finished rows are filled with; trimmed below
        use_cache=True,
        **{"do_sample": False, **sampling},
    )
    training = model.training
    model.eval()
    try:
        output: Any = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=config)
    finally:
        model.train(training)
    return [_until_stop(row, stop) for row in output[:, input_ids.shape[1] :].tolist()]


def _until_stop(tokens: list[int], stop: Sequence[int]) -> list[int]:
    return next((tokens[:i] for i, token in enumerate(tokens) if token in stop), tokens)
