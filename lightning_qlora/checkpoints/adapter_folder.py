"""The folder that PEFT, vLLM and llama.cpp's converter read: adapter, tokenizer, template, stop tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lightning_qlora.checkpoints.publishing import newest_of_run

__all__ = [
    "REQUIRED_FILES",
    "describe_place",
    "find_adapter",
    "find_peft_model",
    "gather_adapter_state",
    "nonfinite_adapters",
    "refuse_base_weights",
    "saved_adapter_state",
    "write_adapter_folder",
]

REQUIRED_FILES = ("adapter_model.safetensors", "adapter_config.json")


def find_adapter(folder: str | Path) -> Path:
    """Return an adapter's folder: the one given, or the newest whole checkpoint of the run that the one given holds.

    Args:
        folder: A PEFT folder, a folder of checkpoints, or a run's folder with ``checkpoints`` in it.

    Raises:
        NoValidCheckpointError: If it holds checkpoints, and all of them are damaged.
        ValueError: If it holds none.
    """
    path = Path(folder).expanduser()
    if (path / "adapter_config.json").is_file():
        return path
    newest = newest_of_run(path)
    if newest is not None:
        return Path(newest.path)
    raise ValueError(
        f"{str(folder)!r} is no adapter folder: {describe_place(path, 'adapter_config.json')}. Write the folder that "
        "AdapterCheckpoint or PEFT's save_pretrained made, or that of a run, whose newest checkpoint then counts."
    )


def describe_place(path: Path, wanted: str) -> str:
    """Say what is at a path instead of a checkpoint or a folder of them.

    Args:
        path: A folder that does not hold it, a file, or nothing.
        wanted: The file that would have made the folder a right one.
    """
    if not path.is_dir():
        return "it is a file" if path.exists() else "it does not exist"
    names = sorted(entry.name for entry in path.iterdir())
    held = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"it holds {held or 'nothing'}, but no {wanted} and no checkpoints"


def find_peft_model(module: nn.Module) -> tuple[str, PeftModel]:
    """Return the model with adapters inside a module, and the prefix of its keys in the module's state.

    Raises:
        MisconfigurationException: If there is none.
    """
    for name, child in module.named_modules():
        if isinstance(child, PeftModel):
            return f"{name}." if name else "", child
    raise MisconfigurationException(
        f"{type(module).__name__} holds no peft.PeftModel, so there is no adapter to publish. Use SFTModule or "
        "another subclass of CausalLMModule; for other modules use Lightning's ModelCheckpoint."
    )


def refuse_base_weights(module: nn.Module) -> None:
    """Refuse a module that would save its base with the adapters.

    Raises:
        MisconfigurationException: If it does, or if it has no adapters.
    """
    _, model = find_peft_model(module)
    frozen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
    saved = [name for name, tensor in module.state_dict(keep_vars=True).items() if id(tensor) in frozen]
    if saved:
        raise MisconfigurationException(
            f"{type(module).__name__} would save {len(saved)} tensors that are not trained, such as {saved[0]}, and "
            "checkpoints of adapters hold no base. Use SFTModule or another subclass of CausalLMModule, whose "
            "state_dict gives the trained tensors only; or Lightning's ModelCheckpoint, to save the base too."
        )


def nonfinite_adapters(module: nn.Module) -> list[str]:
    """Name the trained tensors that hold NaN or infinity; it waits for the device once."""
    trained = {name: _local(p.detach()) for name, p in module.named_parameters() if p.requires_grad}
    tensors = {name: tensor for name, tensor in trained.items() if tensor.numel() and tensor.is_floating_point()}
    if not tensors:
        return []
    largest = torch.stack([norm.float() for norm in torch._foreach_norm(list(tensors.values()), float("inf"))])
    finite = torch.isfinite(largest).tolist()
    return [name for name, is_finite in zip(tensors, finite, strict=True) if not is_finite]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_adapter_state(module: nn.Module) -> dict[str, Tensor] | None:
    """Collect the trained tensors of a sharded model whole; ``None`` if nothing is sharded. All ranks must call it."""
    _, model = find_peft_model(module)
    trained = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    if not any(isinstance(p, DTensor) for p in trained.values()):
        return None
    whole: dict[int, Tensor] = {}
    for parameter in trained.values():
        if id(parameter) not in whole:
            value = parameter.detach()
            whole[id(parameter)] = (value.full_tensor() if isinstance(value, DTensor) else value).cpu()
    # Activation checkpointing and compilation wrap modules; PEFT knows the names without them.
    return {_unwrapped(name): whole[id(parameter)] for name, parameter in trained.items()}


def saved_adapter_state(module: nn.Module, saved: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Return the model's tensors with the trained ones as a checkpoint holds them, if those are others.

    Lightning's WeightAveraging validates averaged weights and saves them in place of those being trained.

    Args:
        module: What the checkpoint was made of.
        saved: The checkpoint's ``state_dict``.

    Returns:
        The tensors by PEFT's names; ``None`` if the checkpoint holds the model's own.
    """
    _, model = find_peft_model(module)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    own = {key: p for key, p in module.state_dict(keep_vars=True).items() if id(p) in trained and key in saved}
    other = {id(p): saved[key] for key, p in own.items() if saved[key].data_ptr() != p.data_ptr()}
    if not other:
        return None
    named = model.state_dict(keep_vars=True).items()
    return {_unwrapped(name): other.get(id(tensor), tensor).detach() for name, tensor in named}


def _unwrapped(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def write_adapter_folder(
    folder: Path,
    model: PeftModel,
    *,
    state: Mapping[str, Tensor] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop_token_ids: Iterable[int] = (),
) -> None:
    """Write what another program needs to use an adapter; never a tensor of the base.

    Args:
        folder: Exists already.
        model: The model with adapters.
        state: Its tensors where they had to be collected from shards, or others were saved than it holds; else PEFT
            takes them from the model.
        tokenizer: Written with its chat template.
        stop_token_ids: Terminators that training taught; generation stops at them and at the base's own.
    """
    # The hub is not asked whether the vocabulary was resized ("auto"): new rows are trained by name or not at all.
    options: dict[str, Any] = {"save_embedding_layers": False, "safe_serialization": True}
    options["selected_adapters"] = list(model.active_adapters)  # a frozen second one is not what was trained
    if state is not None:
        options["state_dict"] = dict(state)
    model.save_pretrained(str(folder), **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    config = _generation_config(model, tokenizer, stop_token_ids)
    if config is not None:
        (folder / "generation_config.json").write_text(config.to_json_string(), encoding="utf-8")


def _generation_config(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase | None, stop_token_ids: Iterable[int]
) -> GenerationConfig | None:
    config: GenerationConfig | None = copy.deepcopy(getattr(model.get_base_model(), "generation_config", None))
    if config is None:
        return None
    known = config.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    config.eos_token_id = list(dict.fromkeys([*stop_token_ids, *known])) or None
    if config.pad_token_id is None and tokenizer is not None:
        config.pad_token_id = tokenizer.pad_token_id
    return config
