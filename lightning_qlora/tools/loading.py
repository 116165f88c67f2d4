"""A base with adapters on it, as the tools that answer questions load them: by folders alone, identities checked."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer, BitsAndBytesConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_qlora.checkpoints.adapter_folder import find_adapter
from lightning_qlora.checkpoints.identity import changes_base, check_adapter
from lightning_qlora.checkpoints.publishing import read_manifest
from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.model import Quantization, compute_dtype, load_adapter, load_base_model, read_adapter_base
from lightning_qlora.pretrained import load_tokenizer

__all__ = [
    "AdapterPaths",
    "QuantizationName",
    "find_adapters",
    "load_for_answers",
    "name_folders",
    "plain_model",
    "refuse_changed_base",
    "sampling_options",
    "to_gpu",
    "trained_base",
]

AdapterPaths: TypeAlias = str | list[str] | dict[str, str] | None
"""One adapter folder, several, or several by names of one's own."""

QuantizationName: TypeAlias = Literal["auto", "nf4", "int8", "none"]

_QUANTIZATIONS: dict[str, Quantization] = {"nf4": "nf4", "int8": "int8", "none": None}


def find_adapters(given: AdapterPaths) -> dict[str, Path]:
    """Name adapters and find their folders.

    Args:
        given: Adapter folders, or folders of runs, of which the newest whole checkpoint counts.

    Returns:
        The folders by name: the name given, or what tells the folder from the others.

    Raises:
        ValueError: If a folder holds no adapter, or is given twice.
    """
    if isinstance(given, Mapping):
        return {_as_module_name(name): find_adapter(folder) for name, folder in given.items()}
    folders = [find_adapter(folder) for folder in ([given] if isinstance(given, str) else given or ())]
    return dict(zip(name_folders(folders), folders, strict=True))


def name_folders(folders: Sequence[Path]) -> list[str]:
    """Name folders by their last part, or by as many parts of their paths as it takes to tell them apart.

    Raises:
        ValueError: If a folder is given twice.
    """
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise ValueError(f"A folder is given twice: {', '.join(map(str, folders))}. Give each once.")
    length = 1
    while len({path[-length:] for path in parts}) < len(parts):
        length += 1
    tails = [path[-length:] for path in parts]
    while length > 1 and len({tail[-1] for tail in tails}) == 1:  # what all end with says nothing
        tails = [tail[:-1] for tail in tails]
        length -= 1
    return [_as_module_name("/".join(tail)) for tail in tails]


def _as_module_name(name: str) -> str:
    return name.replace(".", "_")  # module names cannot hold dots


def load_for_answers(
    adapters: Mapping[str, Path],
    base: str | None = None,
    *,
    revision: str | None = None,
    quantization: QuantizationName = "auto",
    template_kwargs: dict[str, Any] | None = None,
    allow_mismatch: Collection[str] = (),
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel | PeftModel, ChatTemplate]:
    """Load the base as the adapters were trained on it, the adapters, and the tokenizer that belongs to them.

    Args:
        adapters: Folders by name; the first is active. Without any, the base alone is loaded.
        base: Replaces the base that the adapters name.
        revision: Branch, tag or commit of a hub id.
        quantization: How the base is stored; ``auto`` is what the adapters were trained on.
        template_kwargs: Extra variables for the chat template.
        allow_mismatch: Those of ``identity.FIELDS`` that may differ.
        trust_remote_code: Whether Python code from the base's repository may run.

    Raises:
        ValueError: If there is no base, the adapters name different ones, or one does not belong to it or to others.
    """
    folders = list(adapters.values())
    if len(folders) > 1:
        refuse_changed_base(adapters)
    base, revision = trained_base(folders, base, revision)
    chosen = _trained_quantization(folders) if quantization == "auto" else _QUANTIZATIONS[quantization]
    model: PreTrainedModel | PeftModel = load_base_model(
        base, revision=revision, quantization=chosen, trust_remote_code=trust_remote_code
    )
    tokenizer: PreTrainedTokenizerBase
    if folders and (folders[0] / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(str(folders[0]))  # as training used it, template and padding included
    else:
        tokenizer = load_tokenizer(base, revision=revision, trust_remote_code=trust_remote_code)
    for folder in folders:  # all against the bare base
        check_adapter(folder, model, tokenizer, allow_mismatch)
    for name, folder in adapters.items():
        if isinstance(model, PeftModel):
            _load_another(model, name, folder)
        else:
            model = load_adapter(model, folder, name=name)
    if any(changes_base(PeftConfig.from_pretrained(str(folder))) for folder in folders):
        check_adapter(folders[0], model, tokenizer, allow_mismatch)  # against what it has left of the base
    to_gpu(model)
    model.eval()
    _take_stop_tokens(model, folders)
    return model, ChatTemplate(tokenizer, template_kwargs=template_kwargs)


def refuse_changed_base(adapters: Mapping[str, Path]) -> None:
    """Refuse adapters that have taken a part out of the base: neither it nor others could answer beside them.

    Raises:
        ValueError: Names the adapter.
    """
    for name, folder in adapters.items():
        config = PeftConfig.from_pretrained(str(folder))
        if changes_base(config):
            raise ValueError(
                f"The adapter {name!r} was begun with init_lora_weights={config.init_lora_weights!r}, which moves a "
                "part of the base into it: neither the base nor another adapter could answer beside it. Save it as "
                "plain LoRA (PEFT's path_initial_model_for_weight_conversion), ask it alone (generate), or compare it "
                "merged (--merged)."
            )


def trained_base(folders: Sequence[Path], base: str | None, revision: str | None) -> tuple[str, str | None]:
    """Return the base that is asked for, else the one that adapters were trained on, with its revision.

    Raises:
        ValueError: If there is neither, or the adapters name different ones.
    """
    if base is not None:
        return base, revision
    trained_on = {read_adapter_base(folder): None for folder in folders}
    if not trained_on:
        raise ValueError("There is nothing to answer with: give an adapter, or a base.")
    if len({name for name, _ in trained_on}) > 1:
        names = ", ".join(name for name, _ in trained_on)
        raise ValueError(f"The adapters name different bases: {names}. Write --base, or one adapter at a time.")
    name, trained_revision = next(iter(trained_on))
    return name, revision or trained_revision


def plain_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the transformers model under the adapters, if there are any."""
    plain: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[assignment]
    return plain


def to_gpu(model: PreTrainedModel | PeftModel) -> None:
    """Move a model to the GPU, if there is one; quantised ones are loaded there."""
    if torch.cuda.is_available() and not getattr(plain_model(model), "is_quantized", False):
        model.to("cuda")  # type: ignore[arg-type]


def _take_stop_tokens(model: PreTrainedModel | PeftModel, folders: Sequence[Path]) -> None:
    """Stop where training taught any of the adapters to, so that all answer under the same conditions."""
    taught: dict[int, None] = {}
    for folder in folders:
        if (folder / "generation_config.json").is_file():
            tokens = GenerationConfig.from_pretrained(str(folder)).eos_token_id
            taught |= dict.fromkeys([tokens] if isinstance(tokens, int) else tokens or ())
    if taught:
        plain_model(model).generation_config.eos_token_id = list(taught)


def _load_another(model: PeftModel, name: str, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        try:
            model.load_adapter(str(folder), adapter_name=name)
        except UserWarning as warning:
            raise ValueError(
                f"The adapter in {str(folder)!r} does not fit this base: {str(warning)[:400]}"
            ) from warning


def _trained_quantization(folders: Sequence[Path]) -> Quantization:
    """Read from the manifest how the base was stored in training; NF4, with a remark, where nothing says it."""
    manifest = read_manifest(folders[0]) if folders else None
    identity = {} if manifest is None else manifest.metadata.get("identity") or {}
    if "quantization" not in identity:
        if folders:
            print("How the base was stored in training is not known: loading it in 4-bit NF4.", file=sys.stderr)
        return "nf4"
    options = identity["quantization"]
    if options is None:
        return None
    # The compute dtype is that of this machine, which need not be the one that trained.
    config: BitsAndBytesConfig = BitsAndBytesConfig.from_dict({**options, "bnb_4bit_compute_dtype": compute_dtype()})
    return config


def sampling_options(temperature: float, top_p: float, top_k: int, repetition_penalty: float) -> dict[str, Any]:
    """Turn the options of a command into those of ``transformers.GenerationConfig``.

    Raises:
        ValueError: If one is out of its range.
    """
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or repetition_penalty <= 0:
        raise ValueError(
            f"temperature={temperature}, top_p={top_p}, top_k={top_k}, repetition_penalty={repetition_penalty}: "
            "allowed are temperature and top_k from 0, top_p above 0 and up to 1, repetition_penalty above 0."
        )
    options: dict[str, Any] = {} if repetition_penalty == 1 else {"repetition_penalty": repetition_penalty}
    if temperature > 0:
        options |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    return options
