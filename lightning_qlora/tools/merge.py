"""Base and adapter to one model that transformers, vLLM and llama.cpp's converter load."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from lightning_qlora.checkpoints.adapter_folder import find_adapter
from lightning_qlora.checkpoints.identity import check_adapter, identify_tokenizer, package_versions, refuse_differences
from lightning_qlora.model import load_adapter, load_base_model
from lightning_qlora.pretrained import load_tokenizer
from lightning_qlora.tools.merging.adapted_model import AdaptedModel, read_lora_config
from lightning_qlora.tools.merging.base_weights import BaseWeights, local_base
from lightning_qlora.tools.merging.model_card import model_card
from lightning_qlora.tools.merging.training_record import TrainingRecord, adapter_options, base_of, read_training_record
from lightning_qlora.tools.merging.verification import Agreement, encode_texts, in_float32, measure_agreement
from lightning_qlora.tools.merging.writing import new_folder, plan_shards, write_shards

__all__ = ["merge"]

REPORT_NAME = "merge_report.json"
# Mean KL that a merge onto the dequantised base may reach. Merged in float32 it is the trained model to 1e-11; what is
# left is rounding: 1e-6 for float16, up to 1.2e-4 for bfloat16 (measured on a model of 135 million parameters, where
# computing the trained model in bfloat16 instead of float32 makes 1.3e-3 to 1.9e-3).
_TOLERANCES = {"float32": 1e-4, "float16": 1e-4, "bfloat16": 5e-4}


def merge(
    adapter: str,
    output: str,
    *,
    onto: Literal["dequantized", "original"] = "dequantized",
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    max_shard_size: str = "4GB",
    without_adapter: bool = False,
    verify: bool = False,
    verify_on: str | list[str] | None = None,
    verify_tokens: int = 2048,
    tolerance: float | None = None,
    base: str | None = None,
    revision: str | None = None,
    quantization: Literal["auto", "nf4", "none"] = "auto",
    base_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    allow_mismatch: list[str] | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Merge an adapter and its base into one model that transformers, vLLM and llama.cpp's converter load.

    Tensors are read, merged and written one after the other on the CPU, so that a model of any size needs no more
    memory than one of its files and the work on its largest tensor. The result is never quantised: rounding merged
    weights to 4 bits again changes answers hundreds of times more than the merge itself.

    Args:
        adapter: A PEFT folder, as AdapterCheckpoint writes it, or a run's folder for its newest checkpoint.
        output: The folder to write; must not exist, or be empty.
        onto: dequantized merges onto the 4-bit weights that the adapter was trained on, so that the result answers as
            the trained model did; original onto the base's own weights, which the adapter has never seen.
        dtype: Of the merged weights.
        max_shard_size: Largest file, such as 4GB; it is also what the merge holds in memory.
        without_adapter: Write the base alone, as the adapter was trained on it: what a LoRA exported by itself is to be
            loaded on.
        verify: Compare the result with the trained model, on real texts, and fail above the tolerance.
        verify_on: Data files or questions to compare on; else the recorded validation data, else some built-in texts.
        verify_tokens: Positions to compare, of all texts together.
        tolerance: Largest mean KL divergence from the trained model, in nats per token. By default 1e-4 for
            dequantized (5e-4 in bfloat16) and none for original.
        base: Replaces the base that the adapter names: a Hugging Face id, a folder, a .gguf file or package:NAME.
        revision: Branch, tag or commit of a base that is a Hugging Face id.
        quantization: How training stored the base; auto takes it from the adapter's manifest, else nf4.
        base_dtype: What training loaded the base in, from which its 4-bit scales come; auto takes it from the manifest,
            else what the training hardware computes in.
        allow_mismatch: What may differ from the training: base, quantization, tokenizer, chat_template.
        trust_remote_code: Whether Python code from the base's repository may run.
    """
    trained = _read_trained(find_adapter(adapter), base, revision, quantization, base_dtype, trust_remote_code)
    weights = BaseWeights(local_base(trained.base, trained.revision))
    _refuse_other_quantization(weights, onto)
    texts = _texts(trained, verify_on, verify_tokens) if verify else None
    with new_folder(Path(output)) as staging:
        with_adapter, allowed = not without_adapter, allow_mismatch or []
        report = _write_model(
            staging, trained, weights, onto, getattr(torch, dtype), max_shard_size, with_adapter, allowed
        )
        if texts is not None:
            agreement = _verify(staging, trained, texts[0], with_adapter, allowed)
            report["verification"] = {**agreement._asdict(), "texts": texts[1], "compute_dtype": "float32"}
            print(f"Against the trained model: {agreement}.", file=sys.stderr)
            _judge(agreement, _TOLERANCES[dtype] if tolerance is None and onto == "dequantized" else tolerance, onto)
        card = model_card(Path(output).resolve().name, report, trained.record.metadata, adapter_options(trained.folder))
        (staging / "README.md").write_text(card, encoding="utf-8")
        (staging / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"{output}: {report['num_bytes'] / 2**30:.2f} GiB of {dtype} in {len(report['files'])} files.")


class _Trained(NamedTuple):
    """The model that training left: its adapter, and how to load the base under it."""

    folder: Path
    base: str
    revision: str | None
    record: TrainingRecord
    tokenizer: PreTrainedTokenizerBase
    trust_remote_code: bool


def _read_trained(
    folder: Path, base: str | None, revision: str | None, quantization: str, base_dtype: str, trust_remote_code: bool
) -> _Trained:
    read_lora_config(folder)  # before anything is loaded: whether it can be merged at all
    record = read_training_record(folder, quantization, base_dtype)
    if not record.is_known and quantization == "auto":
        print("How the base was stored in training is not known: taking 4-bit NF4.", file=sys.stderr)
    named, trained_revision = base_of(folder, record.metadata)
    base = base or named
    revision = revision or (trained_revision if base == named else None)
    tokenizer: PreTrainedTokenizerBase
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)  # as training used it, template and padding included
    else:
        tokenizer = load_tokenizer(base, revision=revision, trust_remote_code=trust_remote_code)
    return _Trained(folder, base, revision, record, tokenizer, trust_remote_code)


def _refuse_other_quantization(weights: BaseWeights, onto: str) -> None:
    """Refuse a base whose files are quantised otherwise than by bitsandbytes, or that has no original weights."""
    config = json.loads((weights.folder / "config.json").read_text(encoding="utf-8"))
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is not None and not (method == "bitsandbytes" and weights.is_packed):
        raise ValueError(
            f"The files of {str(weights.folder)!r} are quantised by {method}; plain weights and bitsandbytes' 4 bits "
            "are merged here. Write --base with the unquantised model that it was made from."
        )
    if method is not None and onto == "original":
        raise ValueError(
            f"{str(weights.folder)!r} holds 4-bit weights only, so there is no original to merge onto. Write "
            "--onto=dequantized, or --base with the unquantised model."
        )


def _texts(trained: _Trained, files: str | list[str] | None, max_tokens: int) -> tuple[list[list[int]], str]:
    if max_tokens < 2:
        raise ValueError(f"verify_tokens is {max_tokens}; write a whole number from 2.")
    named = [files] if isinstance(files, str) else list(files or ())
    if not named:
        recorded = (trained.record.metadata.get("data") or {}).get("validation", {}).get("sources", [])
        named = [source for source in recorded if Path(source).is_file()]
    return encode_texts(trained.tokenizer, named, max_tokens)


def _write_model(
    staging: Path,
    trained: _Trained,
    weights: BaseWeights,
    onto: str,
    dtype: torch.dtype,
    max_shard_size: str,
    with_adapter: bool,
    allow_mismatch: list[str],
) -> dict[str, Any]:
    """Write everything but the card and the report, which this returns."""
    record = trained.record
    model = AdaptedModel(
        weights,
        trained.folder,
        quantization=record.quantization,
        dtype=record.dtype,
        dequantized=onto == "dequantized",
        with_adapter=with_adapter,
        trust_remote_code=trained.trust_remote_code,
    )
    plan = plan_shards(model, dtype, max_shard_size)
    free = shutil.disk_usage(staging).free
    if free < plan.num_bytes:
        raise ValueError(
            f"The merged model takes {plan.num_bytes / 2**30:.1f} GiB and {staging.parent} has {free / 2**30:.1f} GiB "
            "left. Write --output with a folder on another disk."
        )
    write_shards(staging, model, plan, lambda file: print(f"Writing {file}", file=sys.stderr))
    _check_identity(trained, model, allow_mismatch)
    _write_companions(staging, model, trained, dtype)
    return {
        "format": 1,
        "base": {"name": trained.base, "revision": trained.revision, "model_type": model.model.config.model_type},
        "adapter": None
        if not with_adapter
        else {"name": trained.folder.resolve().name, "step": record.metadata.get("step")},
        "onto": onto,
        "quantization": _quantization_name(record, weights),
        "base_dtype": str(record.dtype).removeprefix("torch."),
        "dtype": str(dtype).removeprefix("torch."),
        "merged_modules": len(model.adapted),
        "tied_embeddings": model.is_tied,
        "num_bytes": plan.num_bytes,
        "files": list(plan.shards),
        "versions": package_versions(),
    }


def _check_identity(trained: _Trained, model: AdaptedModel, allow: list[str]) -> None:
    """Refuse a base, tokenizer or template other than the adapter's, by what was read while writing."""
    recorded = trained.record.metadata.get("identity")
    if recorded is None or not trained.record.is_known:
        return
    found = {
        "base": {
            "tensors": model.digest.plain,
            "quantized_tensors": model.digest.packed,
            "quantizer": f"{package_versions()['bitsandbytes']} on {model.digest.device}",
        },
        "quantization": recorded["quantization"],
        **identify_tokenizer(trained.tokenizer),
    }
    refuse_differences(f"The adapter in {str(trained.folder)!r}", recorded, found, allow)


def _quantization_name(record: TrainingRecord, weights: BaseWeights) -> str:
    if record.quantization is None and not weights.is_packed:
        return "unquantised"
    return "4-bit " + (record.quantization.bnb_4bit_quant_type if record.quantization else "bitsandbytes").upper()


def _write_companions(staging: Path, model: AdaptedModel, trained: _Trained, dtype: torch.dtype) -> None:
    """Write what belongs beside the weights: config, tokenizer, chat template, stop tokens, code."""
    config = model.model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    config.tie_word_embeddings = model.is_tied
    config.architectures = config.architectures or [type(model.model).__name__]
    config.save_pretrained(staging)
    trained.tokenizer.save_pretrained(staging)
    for source in (trained.folder, model.base.folder):
        if (source / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(source).save_pretrained(staging)
            break
    # llama.cpp's converter reads the vocabulary of some families from SentencePiece's own file.
    extra = [
        model.base.folder / "tokenizer.model",
        *(model.base.folder.glob("*.py") if trained.trust_remote_code else ()),
    ]
    for path in extra:
        if path.is_file() and not (staging / path.name).exists():
            shutil.copyfile(path, staging / path.name)


def _verify(
    staging: Path, trained: _Trained, texts: list[list[int]], with_adapter: bool, allow_mismatch: list[str]
) -> Agreement:
    """Compare the written model with the base as training loaded it and its adapter, in float32 on the same device."""
    record = trained.record

    def load_trained() -> Any:
        base = load_base_model(
            trained.base,
            revision=trained.revision,
            quantization=record.quantization,
            dtype=record.dtype,
            trust_remote_code=trained.trust_remote_code,
        )
        check_adapter(trained.folder, base, trained.tokenizer, allow_mismatch)
        return in_float32(load_adapter(base, trained.folder) if with_adapter else base)

    def load_merged() -> Any:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(
            staging, dtype=torch.float32, trust_remote_code=trained.trust_remote_code
        )
        return model.to(device).eval()  # type: ignore[arg-type]

    return measure_agreement(load_trained, load_merged, texts, staging)


def _judge(agreement: Agreement, tolerance: float | None, onto: str) -> None:
    """Refuse a merge that answers otherwise than what was trained."""
    if tolerance is None or agreement.mean_kl <= tolerance:
        return
    hint = (
        "The adapter was trained on the quantised weights: --onto=dequantized comes far closer."
        if onto == "original"
        else "Check --base, --quantization and --base_dtype against the training."
    )
    raise ValueError(
        f"The merged model is not the trained one: {agreement}. Allowed is a mean KL of {tolerance:.1e}. {hint} "
        f"To accept it all the same, write --tolerance={agreement.mean_kl * 1.1:.1e}. Nothing was written."
    )
