"""Tokens of a chat template that a base does not know: those it was never trained on, and those that end an answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from peft import PeftConfig
from transformers import PreTrainedModel

from lightning_qlora.model import untrained_token_ids
from lightning_qlora.schema import ChatDataModule

__all__ = ["add_stop_tokens", "tokens_to_train"]


def tokens_to_train(
    base: PreTrainedModel, data: ChatDataModule | None, lora: PeftConfig, *, refuse: bool, model_name: str
) -> list[int]:
    """Find control tokens that the base does not know and the adapters do not train anyway.

    Args:
        base: Before adapters are attached.
        data: Whose template writes them; ``None`` where there is no template.
        lora: The adapters' configuration.
        refuse: Whether there must be none.
        model_name: Of the base, for the message.

    Raises:
        MisconfigurationException: If there are some and they are refused.
    """
    given = getattr(lora, "trainable_token_indices", None) or ()
    in_full = set(getattr(lora, "modules_to_save", None) or ())
    control = data.control_token_ids if data is not None else ()
    unknown = [i for i in untrained_token_ids(base, control) if i not in set(given)]
    if not unknown or in_full & {"embed_tokens", "lm_head", "wte", "embed_in"}:
        return []
    if not refuse:
        rank_zero_info(f"Training the embedding rows of {len(unknown)} control tokens new to this base: {unknown}.")
        return unknown
    names = data.tokenizer.convert_ids_to_tokens(unknown) if data is not None else unknown
    raise MisconfigurationException(
        f"The chat template writes control tokens that {model_name!r} was never trained on: "
        f"{', '.join(map(repr, names))}. Adapters alone cannot teach them. Write --model.untrained_tokens=auto, or "
        f"--model.lora.trainable_token_indices={unknown}, or --model.lora.modules_to_save=[embed_tokens,lm_head], "
        "or use a base whose own template these tokens belong to."
    )


def add_stop_tokens(base: Any, trained: Iterable[int]) -> tuple[int, ...]:
    """Let generation stop at every terminator that training teaches, besides those the base already has; return all."""
    known = base.generation_config.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    stop = tuple(dict.fromkeys([*trained, *known]))
    if stop:
        base.generation_config.eos_token_id = list(stop)
    return stop
