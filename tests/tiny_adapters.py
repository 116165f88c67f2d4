"""Adapter folders on tiny bases, as training would leave them."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import GenerationConfig

from lightning_qlora.checkpoints.identity import identify
from lightning_qlora.checkpoints.publishing import MANIFEST_NAME
from lightning_qlora.checkpoints.publishing.manifest import dump_manifest, hash_stream
from lightning_qlora.model import attach_adapters, load_base_model, save_adapter


def write_adapter(
    folder: Path, base: str, tokenizer=None, seed: int = 0, quantization="nf4", stop=(), manifest=False, **lora
):
    """Write an adapter of random weights, different for each seed; with a manifest it has an identity.

    ``lora`` are further options of ``LoraConfig``.
    """
    torch.manual_seed(seed)
    model = load_base_model(base, quantization=quantization)
    model = attach_adapters(model, LoraConfig(**{"r": 4, "target_modules": "all-linear", **lora}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name or "trainable_tokens_delta" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    save_adapter(model, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if stop:
        GenerationConfig(eos_token_id=list(stop)).save_pretrained(folder)
    if manifest:
        records = {path.name: hash_stream(io.BytesIO(path.read_bytes())) for path in folder.iterdir()}
        content = dump_manifest(1, records, {"identity": identify(model, tokenizer)})
        (folder / MANIFEST_NAME).write_bytes(content)
    return str(folder)
