"""The shapes of well-known public models, so that they can be estimated without a file of theirs."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from lightning_qlora.pretrained import resolve_pretrained

__all__ = ["SHAPES", "SHAPE_SCHEME", "load_config"]

SHAPE_SCHEME = "shape:"


def _shape(
    family: str, width: int, mlp: int, layers: int, heads: int, key_value_heads: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": family,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        **more,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": _shape("llama", 576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
    "qwen2.5-0.5b": _shape("qwen2", 896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True),
    "llama3.2-1b": _shape("llama", 2048, 8192, 16, 32, 8, 128256, head_dim=64, tie_word_embeddings=True),
    "llama3.2-3b": _shape("llama", 3072, 8192, 28, 24, 8, 128256, head_dim=128, tie_word_embeddings=True),
    "mistral-7b": _shape("mistral", 4096, 14336, 32, 32, 8, 32768, sliding_window=None),
    "qwen2.5-7b": _shape("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "llama3-8b": _shape("llama", 4096, 14336, 32, 32, 8, 128256),
    "qwen3-8b": _shape("qwen3", 4096, 12288, 36, 32, 8, 151936, head_dim=128),
    "gemma2-9b": _shape("gemma2", 3584, 14336, 42, 16, 8, 256000, head_dim=256, tie_word_embeddings=True),
    "qwen2.5-14b": _shape("qwen2", 5120, 13824, 48, 40, 8, 152064),
    "qwen2.5-32b": _shape("qwen2", 5120, 27648, 64, 40, 8, 152064),
    "llama3-70b": _shape("llama", 8192, 28672, 80, 64, 8, 128256),
}
"""By name, from the smallest to the largest: the numbers of the published configurations that decide bytes."""


def load_config(model_name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return the configuration of a base, without its weights.

    Args:
        model_name: What a module takes as its base, of which only config.json is read; or ``shape:`` and a name of
            :data:`SHAPES`.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Whether the configuration's own Python code may run.

    Raises:
        ValueError: If there is no such shape or base.
    """
    if model_name.startswith(SHAPE_SCHEME):
        name = model_name.removeprefix(SHAPE_SCHEME)
        if name not in SHAPES:
            raise ValueError(f"There is no shape {name!r}. Known are: {', '.join(SHAPES)}.")
        shape: PretrainedConfig = AutoConfig.for_model(**SHAPES[name])
        return shape
    try:
        source = resolve_pretrained(model_name)
        config: PretrainedConfig = AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )
        return config
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The configuration of {model_name!r} could not be read: {str(error).strip().splitlines()[0]}\nWrite a "
            "folder that holds config.json, a Hugging Face id that is cached or reachable, or one of the known shapes: "
            f"--shape={', --shape='.join(SHAPES)}."
        ) from error
