"""A merged model, or an adapter alone, for llama.cpp; and either of them to the hub."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]  # of its HTTP client
from transformers import AutoConfig, GenerationConfig

from lightning_qlora.checkpoints.adapter_folder import find_adapter
from lightning_qlora.pretrained import load_tokenizer
from lightning_qlora.tools.merging.adapted_model import AdaptedModel
from lightning_qlora.tools.merging.base_weights import BaseWeights, local_base
from lightning_qlora.tools.merging.model_card import adapter_card
from lightning_qlora.tools.merging.training_record import adapter_options, base_of, read_training_record

__all__ = ["export"]

OutputType: TypeAlias = Literal["f32", "f16", "bf16", "q8_0"]
_OUTPUT_TYPES: dict[torch.dtype, OutputType] = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_LEFT_OUT = ("trainer.ckpt", "trainer.ckpt/*", "manifest.json", ".*")


def export(
    folder: str,
    output: str | None = None,
    *,
    outtype: Literal["auto", "f32", "f16", "bf16", "q8_0"] = "auto",
    push_to_hub: str | None = None,
    private: bool = True,
    base: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write a merged model, or an adapter alone, as GGUF for llama.cpp; push either to the hub.

    A model's file holds its weights, vocabulary, chat template and stop tokens. An adapter's file holds the LoRA only
    and is loaded beside its base (llama-cli --lora): it belongs to the weights that it was trained on, so the base's
    file is best made from the dequantised base (merge --without_adapter).

    Args:
        folder: That of a merged model, of an adapter, or of a run, whose newest checkpoint then counts.
        output: The .gguf file to write. May be left out if the folder is only to be pushed.
        outtype: How the matrices are stored; auto keeps the model's own dtype, and float32 for an adapter. q8_0 rounds
            to 8 bits, which changes answers.
        push_to_hub: Push the folder, and the file if one is written, to this repository (OWNER/NAME) of the Hugging
            Face hub. The token is taken from the environment variable HF_TOKEN.
        private: Whether a repository that is created is private.
        base: Of an adapter: replaces the base that it names.
        revision: Branch, tag or commit of a base that is a Hugging Face id.
        trust_remote_code: Whether Python code from the model's folder may run.
    """
    if output is None and push_to_hub is None:
        raise ValueError("Nothing to do: write --output FILE.gguf, or --push_to_hub OWNER/NAME, or both.")
    source = _find_source(Path(folder).expanduser())
    is_adapter = (source / "adapter_config.json").is_file()
    token = _hub_token() if push_to_hub is not None else ""  # before the work, not after it
    if output is not None:
        file = Path(output)
        if is_adapter:
            _export_adapter(source, file, outtype, base, revision, trust_remote_code)
        else:
            _export_model(source, file, outtype, trust_remote_code)
        print(f"{output}: {file.stat().st_size / 2**20:.1f} MiB.")
    if push_to_hub is not None:
        address = _push(source, None if output is None else Path(output), push_to_hub, token, private)
        print(f"Pushed to {address}.")


def _find_source(folder: Path) -> Path:
    if (folder / "config.json").is_file():
        return folder
    try:
        return find_adapter(folder)
    except ValueError as error:
        raise ValueError(f"{error} (Or write the folder of a model that merge made.)") from error


def _export_model(folder: Path, file: Path, outtype: Literal["auto", OutputType], trust_remote_code: bool) -> None:
    from lightning_qlora.tools.exporting import Architecture, read_vocabulary, write_model

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    architecture = Architecture(config)
    weights = BaseWeights(folder)
    if weights.is_packed or getattr(config, "quantization_config", None):
        raise ValueError(f"The weights in {str(folder)!r} are quantised. Export the folder that merge wrote.")
    tokenizer = load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
    vocabulary = read_vocabulary(tokenizer, config.vocab_size, _stop_tokens(folder))
    kind: OutputType = _OUTPUT_TYPES.get(config.dtype, "f32") if outtype == "auto" else outtype
    write_model(file, weights, architecture, tokenizer, vocabulary, kind, _about(folder))


def _export_adapter(
    folder: Path,
    file: Path,
    outtype: Literal["auto", OutputType],
    base: str | None,
    revision: str | None,
    trust_remote_code: bool,
) -> None:
    from lightning_qlora.tools.exporting import Architecture, write_adapter

    metadata = read_training_record(folder).metadata
    named, trained_revision = base_of(folder, metadata)
    base = base or named
    weights = BaseWeights(local_base(base, revision or trained_revision))
    adapted = AdaptedModel(weights, folder, quantization=None, dtype=torch.float32, trust_remote_code=trust_remote_code)
    options = adapter_options(folder)
    alpha = float(options["lora_alpha"])
    # llama.cpp scales by alpha / r, so whatever else PEFT scales by (rank and alpha patterns, rsLoRA) goes into B.
    pairs = {
        name: (a.float(), b.float() * (scale * a.shape[0] / alpha))
        for name, (a, b, scale) in adapted.lora_pairs().items()
    }
    kind: OutputType = "f32" if outtype == "auto" else outtype
    about = {"name": folder.resolve().name, "description": f"LoRA for {base}"}
    write_adapter(file, pairs, alpha, Architecture(adapted.model.config), kind, about)


def _stop_tokens(folder: Path) -> list[int]:
    if not (folder / "generation_config.json").is_file():
        return []
    stop = GenerationConfig.from_pretrained(folder).eos_token_id
    return [] if stop is None else [stop] if isinstance(stop, int) else list(stop)


def _about(folder: Path) -> dict[str, str]:
    """What a model's file says of itself, its model card included."""
    about = {"name": folder.resolve().name}
    card = folder / "README.md"
    if card.is_file():
        about["description"] = card.read_text(encoding="utf-8")
    return about


# The hub


def _hub_token() -> str:
    token = os.environ.get("HF_TOKEN", "").strip()  # a line break would end up, with the token, in an error
    if not token:
        raise ValueError(
            "Pushing needs a token with write access in the environment variable HF_TOKEN; it is not set. A token is "
            "never taken from arguments or configuration files, which are written down."
        )
    return token


def _push(folder: Path, file: Path | None, repository: str, token: str, private: bool) -> str:
    """Upload the folder by huggingface_hub's own calls; return its address."""
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch:
        source = folder
        if (folder / "adapter_config.json").is_file():
            source = _adapter_to_publish(folder, Path(scratch))
        try:
            address = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=source, ignore_patterns=list(_LEFT_OUT))
            if file is not None:
                api.upload_file(repo_id=repository, path_or_fileobj=file, path_in_repo=file.name)
        except (HTTPError, ConnectionError) as error:
            raise ValueError(_failure(error, repository, api.endpoint)) from error
    return str(address)


def _failure(error: Exception, repository: str, endpoint: str) -> str:
    if not isinstance(error, HfHubHTTPError):
        return f"The hub at {endpoint} could not be reached for the push to {repository!r}: {error}"
    status, said = error.response.status_code, error.server_message or error.response.reason_phrase
    message = f"The hub at {endpoint} refused the push to {repository!r} with {status} ({said})."
    if status in (401, 403, 404):  # 404 is what it says of a repository that the token may not see
        message += " Write a token with write access to it into the environment variable HF_TOKEN."
    return message


def _adapter_to_publish(folder: Path, scratch: Path) -> Path:
    """Copy an adapter's folder with a card, the base's name for its local path, and without the trainer's state."""
    record = read_training_record(folder).metadata
    options = adapter_options(folder)
    base, revision = base_of(folder, record)
    for path in folder.iterdir():
        if path.is_file() and path.name not in _LEFT_OUT and not path.name.startswith("."):
            shutil.copyfile(path, scratch / path.name)
    options |= {"base_model_name_or_path": base, "revision": revision}
    (scratch / "adapter_config.json").write_text(json.dumps(options, indent=2), encoding="utf-8")
    (scratch / "README.md").write_text(adapter_card(folder.resolve().name, base, record, options), encoding="utf-8")
    return scratch
