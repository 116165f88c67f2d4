"""Where a base comes from: hub ids, folders, GGUF files, and GGUF files inside installed packages.

The one place that knows how a base's name becomes something transformers loads, and how a tokenizer
gets its chat template and its padding token.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from lightning_qlora.text_splitting import restore_splitting

__all__ = ["cache_dir", "load_tokenizer", "resolve_pretrained"]

PACKAGE_SCHEME = "package:"

_CONVERSION_FORMAT = 2  # raise when a converted folder's content changes, so that older ones are not reused

# Names that model families give a token whose only use is padding, most specific first.
_PAD_TOKENS = (
    "<|finetune_right_pad_id|>",
    "<|finetune_right_pad|>",
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|PAD_TOKEN|>",
    "<|vision_pad|>",
    "<|endoftext|>",
    "<|dummy_0|>",
    "<unk>",
)


def cache_dir() -> Path:
    """Return the folder for converted bases and prepared data: ``$LIGHTNING_QLORA_CACHE`` or the user's cache."""
    root = os.environ.get("LIGHTNING_QLORA_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_qlora"


def resolve_pretrained(name: str) -> str:
    """Turn the name of a base into a folder or hub id that transformers loads.

    Args:
        name: A Hugging Face id (``meta-llama/Llama-3.1-8B``), a folder, a ``.gguf`` file, or
            ``package:PACKAGE[/FILE.gguf]`` for a GGUF file that an installed Python package carries. GGUF files
            are dequantised once into a folder of safetensors under :func:`cache_dir`, keyed by their content.

    Returns:
        The id or folder.

    Raises:
        ValueError: If the file, the package, or its GGUF file is not there.
    """
    if name.startswith(PACKAGE_SCHEME):
        return str(_convert_gguf(_find_packaged_gguf(name)))
    if name.endswith(".gguf"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise ValueError(f"There is no GGUF file {name!r}. Write the path of an existing file, or a model id.")
        return str(_convert_gguf(path))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(
                f"The folder {name!r} holds no config.json, so it is no transformers model. Write the folder of a "
                "model saved with save_pretrained, or a Hugging Face id."
            )
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")):
        raise ValueError(f"There is no model folder {name!r}. Write an existing folder, or a Hugging Face id.")
    return name


def load_tokenizer(
    name: str,
    *,
    revision: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base, with its chat template and a padding token that no answer ends with.

    Args:
        name: The base, as for :func:`resolve_pretrained`, or an adapter folder that carries its tokenizer.
        revision: Branch, tag or commit of a hub id.
        chat_template: A Jinja template, or the path of a file that holds one, instead of the tokenizer's own.
        trust_remote_code: Whether code from the hub may run.

    Raises:
        ValueError: If the tokenizer cannot be found, or is not backed by the fast ``tokenizers`` library, whose
            character offsets the exact masks rest on.
    """
    # An adapter folder carries a tokenizer but no model, so it is not for resolve_pretrained to judge.
    source = name if (Path(name) / "tokenizer.json").is_file() else resolve_pretrained(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No tokenizer could be loaded for {name!r}: {_first_line(error)} Write a model folder that holds "
            "tokenizer.json, or a Hugging Face id that can be reached (or is cached) from this machine."
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"The tokenizer of {name!r} is a {type(tokenizer).__name__} without a fast backend, which gives no "
            "character offsets. Save it once with a fast class (tokenizer.json) and name that folder."
        )
    if chat_template is not None:
        tokenizer.chat_template = _read_chat_template(chat_template)
    _resolve_pad_token(tokenizer)
    return tokenizer


def _read_chat_template(template: str) -> str:
    """Return the Jinja text: the argument itself, or the content of the file that it names."""
    if "{" in template:
        return template
    path = Path(template).expanduser()
    if not path.is_file():
        raise ValueError(
            f"chat_template is {template!r}: neither Jinja text (it holds no '{{') nor an existing file. "
            "Write the path of a .jinja file, or the template itself."
        )
    return path.read_text(encoding="utf-8")


def _resolve_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a padding token that no answer ends with, or none at all.

    Training never needs one, because padding is masked by position. But a saved tokenizer whose padding equals its
    end-of-turn token makes other programs mask that token out (huggingface/trl#976), so it is replaced where the
    vocabulary has a better one. No token is added: the embedding has no row for it.
    """
    learned = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in learned:
        return
    special = set(tokenizer.all_special_tokens) | {str(t) for t in tokenizer.added_tokens_decoder.values()}
    for candidate in _PAD_TOKENS:
        if candidate in special and tokenizer.convert_tokens_to_ids(candidate) not in learned:
            tokenizer.pad_token = candidate
            return


def _find_packaged_gguf(name: str) -> Path:
    """Locate the GGUF file of an installed package without importing the package."""
    package, _, file = name.removeprefix(PACKAGE_SCHEME).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{name!r} asks for the installed package {package!r}, which is not there. Install it "
            f"(pip install {package.replace('_', '-')}), or name another base."
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    found = sorted(path for folder in folders for path in folder.rglob(file or "*.gguf"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(
            f"{name!r} must mean exactly one GGUF file of the package {package!r}; found: {names}. "
            f"Write {PACKAGE_SCHEME}{package}/FILE.gguf."
        )
    return found[0]


def _convert_gguf(path: Path) -> Path:
    """Dequantise a GGUF file into a cached folder of bfloat16 safetensors with its tokenizer."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder = cache_dir() / "converted" / f"{path.stem}-{digest}-v{_CONVERSION_FORMAT}"
    if (folder / "config.json").is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"Reading {path.name} needs the package gguf, which is not installed: pip install gguf.")
    rank_zero_info(f"Converting {path.name} once (about a minute); later starts read {folder}.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.stem}-", dir=folder.parent))
    try:
        _write_dequantised(path, staging)
        staging.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():  # otherwise another process was first, with the same content
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _write_dequantised(path: Path, folder: Path) -> None:
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, **_dequantise())
    finally:
        transformers_logging.set_verbosity(verbosity)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    _split_as_trained(tokenizer, path)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _split_as_trained(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    from gguf import GGUFReader  # of an extra

    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    name = None if field is None else str(field.contents())
    if name is not None and not restore_splitting(tokenizer.backend_tokenizer, name):
        rank_zero_info(
            f"{path.name} splits text in a way ({name!r}) that is not known here: some numbers and runs of white space "
            "may become other tokens than in its training. The model's own folder has its own tokenizer.json."
        )


def _dequantise() -> dict[str, Any]:
    """Ask transformers for plain weights: from 5.2x on it keeps GGUF blocks packed unless told otherwise."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__ + "."
