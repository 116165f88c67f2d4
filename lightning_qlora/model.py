"""Bases and adapters: the one place that knows the order of quantise, prepare, attach, save, load and merge."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file, extract_commit_hash

from lightning_qlora.kernels.checkpointing import MixedPlan, Plan, set_checkpointing
from lightning_qlora.kernels.host_offload import HostOffload
from lightning_qlora.pretrained import resolve_pretrained

__all__ = [
    "Quantization",
    "attach_adapters",
    "base_model",
    "checkpointed_layers",
    "compute_dtype",
    "load_adapter",
    "load_base_model",
    "merge_adapter",
    "nf4",
    "read_adapter_base",
    "resolve_quantization",
    "save_adapter",
    "set_activation_checkpointing",
    "untrained_token_ids",
]

Quantization = BitsAndBytesConfig | Literal["nf4", "int8"] | None
"""``"nf4"``: 4-bit NormalFloat with double quantisation; ``"int8"``: LLM.int8(); ``None``: not quantised."""


def compute_dtype(device: torch.device | None = None) -> torch.dtype:
    """Return the dtype that products run in, by hardware.

    bfloat16 on GPUs and CPUs that have instructions for it (AVX512-BF16), otherwise float16 on a GPU and float32 on a
    CPU, where bfloat16 without such instructions is tens of times slower.

    Args:
        device: Where the model will run; ``None`` for the current accelerator, if any.
    """
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    if on_gpu:
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if has_avx512bf16() else torch.float32


def nf4(dtype: torch.dtype | None = None) -> BitsAndBytesConfig:
    """Return the quantisation of QLoRA (arXiv:2305.14314): NF4 weights with doubly quantised constants."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype or compute_dtype(),
    )


def resolve_quantization(quantization: Quantization, dtype: torch.dtype | None = None) -> BitsAndBytesConfig | None:
    """Turn the short names of :data:`Quantization` into transformers' configuration."""
    if quantization == "nf4":
        return nf4(dtype)
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization is not None and not isinstance(quantization, BitsAndBytesConfig):
        raise ValueError(
            f"quantization is {quantization!r}; allowed are 'nf4', 'int8', null, or the options of "
            "transformers.BitsAndBytesConfig, for instance {load_in_4bit: true, bnb_4bit_quant_type: fp4}."
        )
    if quantization is not None and not (quantization.load_in_4bit or quantization.load_in_8bit):
        raise ValueError(
            "quantization sets options of BitsAndBytesConfig but asks for neither 4 nor 8 bits. Add load_in_4bit: true "
            "or load_in_8bit: true, or write quantization: null for a base that is not quantised."
        )
    return quantization


def load_base_model(
    model_name: str,
    *,
    revision: str | None = None,
    quantization: Quantization = "nf4",
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load a frozen causal language model, quantised while it loads, onto a device.

    The result gives what ``peft.prepare_model_for_kbit_training`` promises without its float32 copies of embedding
    and head (2.1 GB for an 8B model): nothing of the base is trainable, and the norms are stable because every
    supported family computes them in float32 whatever the dtype of their weights.

    Args:
        model_name: Anything that :func:`lightning_qlora.pretrained.resolve_pretrained` takes.
        revision: Branch, tag or commit of a hub id.
        quantization: How the linear layers are stored.
        dtype: Of everything that is not quantised; ``None`` chooses by hardware.
        device: Where a quantised base goes; ``None`` for the current GPU, or the CPU where there is none.
        attn_implementation: transformers' name of an attention function; ``None`` for the model's default.
        trust_remote_code: Whether Python code of the repository may run.
        model_kwargs: Further arguments of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        ValueError: If the base does not exist or is not in safetensors.
        MisconfigurationException: If no kernel can run the quantisation here.
    """
    if device is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    dtype = dtype or compute_dtype(device)
    config = resolve_quantization(quantization, dtype)
    source = resolve_pretrained(model_name)
    kwargs: dict[str, Any] = {
        "revision": revision,
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,  # other formats are pickles, which execute code
        **(model_kwargs or {}),
    }
    if config is not None:
        _check_kernels(config)
        kwargs["quantization_config"] = _matching_compute_dtype(config, dtype)
        kwargs.setdefault("device_map", {"": device or "cpu"})
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(source, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The base {model_name!r} could not be loaded: {str(error).strip()}\nWrite the folder of a causal language "
            "model saved as safetensors, package:NAME, a .gguf file, or a Hugging Face id that this machine can reach."
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    model.requires_grad_(False)
    # As the user wrote it, not the folder of this machine's cache: adapter_config.json names the base by it.
    model.name_or_path = model.config._name_or_path = model_name
    _keep_cpu_weights_trainable(model)
    model.get_output_embeddings().register_forward_pre_hook(_contiguous)
    model.config._commit_hash = _resolved_commit(source, revision, model_kwargs or {})
    return model


def _resolved_commit(source: str, revision: str | None, options: Mapping[str, Any]) -> str | None:
    """Return the commit that a hub id's branch or tag meant, from where its files lie now; transformers forgets it."""
    if Path(source).exists():
        return None
    where = {name: options[name] for name in ("cache_dir", "token", "subfolder") if name in options}
    file = cached_file(source, "config.json", revision=revision, local_files_only=True, **where)
    commit: str | None = extract_commit_hash(file, None)
    return commit


def _contiguous(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Lay out the head's input row by row.

    Generation and ``logits_to_keep`` hand the head a slice of the hidden states. For such a view ``torch.matmul``
    multiplies row by row of the batch, and on CPUs copies the frozen weight for each: 20 answers of a 135M model
    took 1.1 GB for their first token.
    """
    hidden, *others = args
    return (hidden.contiguous(), *others)


def _check_kernels(config: BitsAndBytesConfig) -> None:
    """8-bit needs CUDA's integer kernels; 4-bit runs on CPUs and GPUs, not on Apple's."""
    if config.load_in_8bit and not torch.cuda.is_available():
        raise MisconfigurationException(
            "quantization asks for 8-bit weights (LLM.int8()), which trains on CUDA GPUs only, and none is visible. "
            "Write quantization: nf4, which has CPU kernels, or quantization: null."
        )


def _matching_compute_dtype(config: BitsAndBytesConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Fill in the compute dtype where the user named none: bitsandbytes' own default, float32, is slow on GPUs."""
    if config.load_in_4bit and config.bnb_4bit_compute_dtype is torch.float32 and dtype is not torch.float32:
        config = copy.copy(config)
        config.bnb_4bit_compute_dtype = dtype
    return config


def _keep_cpu_weights_trainable(model: nn.Module) -> None:
    """Forbid bitsandbytes to repack 4-bit weights in place on CPUs with AVX512-BF16.

    Its first no-grad forward there turns the weights into a layout whose kernel has no backward pass, so that a
    validation before training would break training.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def attach_adapters(model: PreTrainedModel, lora: PeftConfig, *, token_ids_to_train: Iterable[int] = ()) -> PeftModel:
    """Add trainable adapters in float32 to a frozen base and put the whole into training mode.

    Training mode matters: transformers checkpoints activations, and applies dropout, only in modules that train, and
    loading leaves them in evaluation mode.

    Args:
        model: The base.
        lora: PEFT's configuration. With tied embeddings, naming the embedding or the head in ``modules_to_save``
            trains one shared matrix, as the base has it.
        token_ids_to_train: Rows of the embedding to train besides, for control tokens that the base does not know.

    Raises:
        ValueError: If the targets match nothing, with the names that exist.
    """
    if isinstance(lora, LoraConfig):
        lora = _with_trainable_tokens(_with_tied_embeddings(lora, model), model, sorted(set(token_ids_to_train)))
    try:
        # Drawn on the CPU, whatever device Lightning makes the default one, as it does under some strategies: the same
        # seed gives the same adapters everywhere. PEFT brings them to the base. A model without numbers stays one.
        with warnings.catch_warnings(), torch.device("meta" if model.device.type == "meta" else "cpu"):
            # PEFT asks whether tied weights were meant to part; _with_tied_embeddings has just answered that.
            warnings.filterwarnings("ignore", message=".*ensure_weight_tying.*")
            peft_model = get_peft_model(model, copy.deepcopy(lora))  # PEFT writes into it
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"PEFT cannot attach these adapters: {error}\nLinear layers of this base are: "
            f"{', '.join(_linear_layer_names(model))}. Write target_modules: all-linear, or some of these names."
        ) from error
    peft_model.train()
    return peft_model


def _with_tied_embeddings(lora: LoraConfig, model: PreTrainedModel) -> LoraConfig:
    """Keep embedding and head one matrix when a base ties them and one of them is to be trained in full."""
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    named = {name.rsplit(".", 1)[-1] for name in lora.modules_to_save or ()}
    if not (tied and named & _embedding_names(model)) or lora.ensure_weight_tying:
        return lora
    return LoraConfig(**{**_config_arguments(lora), "ensure_weight_tying": True})


def _with_trainable_tokens(lora: LoraConfig, model: PreTrainedModel, token_ids: list[int]) -> LoraConfig:
    """Train these rows of the embedding, and of the head where it is a matrix of its own."""
    if not token_ids:
        return lora
    given = lora.trainable_token_indices
    if isinstance(given, Mapping):
        raise ValueError(
            f"trainable_token_indices names its layers ({', '.join(given)}), so the tokens {token_ids} cannot be added "
            "by themselves. Add them there, or write a plain list."
        )
    merged = sorted(set(given or ()) | set(token_ids))
    layers = {name: merged for name in sorted(_embedding_names(model))}
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    indices = merged if tied or len(layers) == 1 else layers
    return LoraConfig(**{**_config_arguments(lora), "trainable_token_indices": indices})


def _config_arguments(lora: LoraConfig) -> dict[str, Any]:
    fields = LoraConfig.__dataclass_fields__
    return {name: getattr(lora, name) for name, field in fields.items() if field.init}


def _embedding_names(model: PreTrainedModel) -> set[str]:
    wanted = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    return {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if id(module) in wanted}


def _linear_layer_names(model: nn.Module) -> list[str]:
    names = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def base_model(model: PeftModel) -> PreTrainedModel:
    """Return the transformers model whose layers PEFT has replaced in place."""
    return cast(PreTrainedModel, model.get_base_model())


def set_activation_checkpointing(base: PreTrainedModel, plan: Plan | MixedPlan) -> HostOffload | None:
    """Say what each decoder layer keeps for the backward pass, in place of what was said before.

    Args:
        base: The transformers model, with or without adapters in its layers.
        plan: As in :mod:`lightning_qlora.kernels.checkpointing`.

    Returns:
        What moves tensors to the host, where the plan has it.

    Raises:
        MisconfigurationException: If the family's layers cannot be checkpointed.
    """
    layers = checkpointed_layers(base)
    offload = set_checkpointing(layers, plan) if layers else None
    if offload is None and plan != "none":
        raise MisconfigurationException(
            f"{type(base).__name__} has no decoder layers of a kind that can be recomputed. Write "
            "--model.activation_checkpointing=none."
        )
    if plan != "none":
        base.config.use_cache = False
    return offload


def checkpointed_layers(base: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers whose activations can be recomputed, in the order they run."""
    return [module for module in base.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]


def untrained_token_ids(model: PreTrainedModel, token_ids: Iterable[int]) -> list[int]:
    """Find the tokens whose embedding row the base has never trained.

    A base model often carries the control tokens of its chat sibling as rows that were never updated. Such a row is
    near zero, or the exact copy of another row, or the mean of all rows (how transformers fills new ones).

    Args:
        model: The base, before adapters are attached.
        token_ids: The tokens to look at.

    Returns:
        Those that look untrained, and those beyond the end of the embedding.
    """
    weight_VD = cast(Tensor, model.get_input_embeddings().weight).detach()
    wanted = sorted(set(token_ids))
    inside = [i for i in wanted if i < weight_VD.shape[0]]
    outside = [i for i in wanted if i >= weight_VD.shape[0]]
    if not inside:
        return outside
    norms_V = weight_VD.float().norm(dim=1)
    mean_D = weight_VD.mean(dim=0, dtype=torch.float32)
    rows = weight_VD[inside]
    near_zero = norms_V[inside] < 0.1 * norms_V.median()
    is_mean = (rows.float() - mean_D).norm(dim=1) < 0.05 * norms_V[inside]
    return outside + [i for i, bad in zip(inside, (near_zero | is_mean | _has_twin(rows)).tolist(), strict=True) if bad]


def _has_twin(rows: Tensor) -> Tensor:
    """For each row, whether another row is exactly equal."""
    _, inverse, counts = torch.unique(rows, dim=0, return_inverse=True, return_counts=True)
    return cast(Tensor, counts[inverse] > 1)


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """Write the active adapter as PEFT itself does, as safetensors and configuration; never base weights."""
    with warnings.catch_warnings():
        # PEFT asks the hub whether the vocabulary was resized; for a base that is no hub id it only warns.
        warnings.filterwarnings("ignore", message="Could not find a config file in")
        active = list(model.active_adapters)
        model.save_pretrained(
            str(folder), save_embedding_layers=False, safe_serialization=True, selected_adapters=active
        )


def load_adapter(
    model: PreTrainedModel, folder: str | Path, *, is_trainable: bool = False, name: str = "default"
) -> PeftModel:
    """Attach the adapter of a PEFT folder to its base.

    Raises:
        ValueError: If the folder is not a PEFT folder in safetensors, or tensors are missing or left over.
    """
    folder = Path(folder)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise ValueError(
                f"{str(folder)!r} is no adapter folder: it holds no {file}. Write the folder that AdapterCheckpoint "
                "or PEFT's save_pretrained made."
            )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft_model = PeftModel.from_pretrained(model, str(folder), adapter_name=name, is_trainable=is_trainable)
    missing = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
    if missing:
        raise ValueError(f"The adapter in {str(folder)!r} does not fit this base: {missing[0][:400]}")
    return peft_model


def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """Fold the adapters into the base's weights and return the plain model (unquantised bases only).

    Raises:
        MisconfigurationException: If the base is quantised: rounding the merged weights to 4 bits again changes them
            far more than the merge itself. Load the base with ``quantization=None`` first.
    """
    if getattr(base_model(model), "is_quantized", False):
        raise MisconfigurationException(
            "The base is quantised, and merging into quantised weights rounds them a second time. Load it with "
            "quantization=None, attach the adapter with load_adapter, and merge then."
        )
    return cast(PreTrainedModel, model.merge_and_unload())


def read_adapter_base(folder: str | Path) -> tuple[str, str | None]:
    """Return the base's name and revision that an adapter folder was trained on."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    return config["base_model_name_or_path"], config.get("revision")
