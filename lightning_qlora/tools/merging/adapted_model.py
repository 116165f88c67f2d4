"""A base with its adapter, without weights: which tensor comes from where, and what one layer is when merged."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import set_module_tensor_to_device  # type: ignore[import-untyped]
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from lightning_qlora.checkpoints.identity import TensorDigest, changes_base
from lightning_qlora.tools.merging.base_weights import BaseWeights, quantized
from lightning_qlora.tools.merging.training_record import adapter_options

__all__ = ["AdaptedModel", "read_lora_config"]

_PREFIX = "base_model.model."
_WRAPPERS = re.compile(r"\.(base_layer|original_module|token_adapter)(?=\.)")
# What merging leaves out or gets wrong, by option of LoraConfig, and why.
_UNMERGEABLE = {
    "alora_invocation_tokens": "aLoRA acts on some tokens of a text only, which no single weight can do",
    "arrow_config": "Arrow chooses among adapters token by token, which no single weight can do",
    "layer_replication": "the adapted layers share their base weights",
    "target_parameters": "adapters on parameters outside linear layers are not read here",
    "megatron_config": "Megatron's layers are not read here",
    "monteclora_config": "MonteCLoRA's samples are not read here",
    "velora_config": "VeLoRA's layers are not read here",
    "kasa_config": "KaSA changes the base weights themselves",
    "use_bdlora": "block-diagonal adapters are not read here",
    "use_qalora": "QA-LoRA adapts groups of inputs",
}


def read_lora_config(adapter: Path) -> LoraConfig:
    """Read an adapter's options and refuse what cannot be merged.

    Raises:
        ValueError: With the option's name and what to do instead.
    """
    options = adapter_options(adapter)
    kind = options.get("peft_type")
    if kind != "LORA":
        raise ValueError(
            f"{str(adapter)!r} is a {kind} adapter; LORA is merged here (with DoRA, rsLoRA, rank patterns, "
            "modules_to_save, trainable_token_indices). Serve it unmerged, or merge it in memory: "
            "PeftModel.from_pretrained(base, folder).merge_and_unload()."
        )
    for option, reason in _UNMERGEABLE.items():
        if options.get(option):
            raise ValueError(
                f"{str(adapter)!r} uses {option}, which is not merged: {reason}. Serve the adapter with PEFT instead."
            )
    if changes_base(options):
        start = options["init_lora_weights"].lower()
        raise ValueError(
            f"{str(adapter)!r} was initialised by {start}, which changed the base weights under it, and the folder "
            "does not hold them. Save it once more by PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion, which makes it a plain LoRA, and merge that."
        )
    return cast(LoraConfig, LoraConfig.from_pretrained(str(adapter)))


class AdaptedModel:
    """A base with its adapter whose tensors are made one at a time.

    The model itself stands on the meta device: PEFT decides there, as in training, which layers the adapter changes
    and how. A merged layer is a copy of one of its layers, filled with the weights of that layer alone and merged by
    PEFT's own code.

    Args:
        base: The base's files.
        adapter: The adapter's folder.
        quantization: The 4-bit options of the training; ``None`` if it did not quantise.
        dequantized: Whether to merge onto the weights that training saw rather than onto those of the files.
        dtype: That training loaded the base in.
        with_adapter: Whether the adapter takes effect; without it this is the base as the adapter was trained on it.
        trust_remote_code: Whether Python code of the base's folder may run.

    Raises:
        ValueError: If the adapter does not fit the base, or the base's class renames the tensors of its files.
    """

    def __init__(
        self,
        base: BaseWeights,
        adapter: Path,
        *,
        quantization: BitsAndBytesConfig | None,
        dtype: torch.dtype,
        dequantized: bool = True,
        with_adapter: bool = True,
        trust_remote_code: bool = False,
    ) -> None:
        self.base = base
        self.quantization = quantization
        self.dtype = dtype
        self.dequantized = dequantized
        self.digest = TensorDigest()
        """Of the base's tensors that were read so far."""
        self._adapter_file = adapter / "adapter_model.safetensors"
        lora = read_lora_config(adapter)
        self._trains_biases = lora.bias != "none"
        with safe_open(self._adapter_file, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        self.model = empty_model(base.folder, trust_remote_code)
        self._in_4bit = {} if quantization is None else _packed_parameters(self.model, quantization)
        self._embeddings = _embedding_paths(self.model)
        _resize(self.model, self._embeddings, shapes)
        self.shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters(remove_duplicate=False)}
        """Of the plain model's parameters."""
        self._in_file = _names_in_files(self.model, base)
        self._in_float32 = {*self.model._keep_in_fp32_modules_strict} | (  # type: ignore[misc]
            {*self.model._keep_in_fp32_modules} if dtype is torch.float16 else set()  # type: ignore[misc]
        )
        self.peft_model = _attach(self.model, lora)
        self.adapted = _adapted_modules(self.peft_model)
        """Paths of the modules that the adapter changes, by their names in the plain model."""
        self._keys, self._replaced = self._match_keys(shapes)
        if not with_adapter:
            self.adapted, self._replaced = frozenset(), {}
        self._check_files()
        self._made: dict[str, Tensor] = {}
        self.is_tied = self._stays_tied()
        """Whether embedding and head are one matrix after the merge."""

    def names_to_write(self) -> dict[str, str | None]:
        """Return the merged model's tensors, in the order of the base's files.

        Returns:
            The name in the file, and the parameter's name in the model; ``None`` where the model has none such and the
            tensor is passed on as it is. The parameters of an adapted module follow one another.
        """
        parameter = {file: name for name, file in self._in_file.items() if name not in self._tied_names()}
        order: dict[str, str | None] = {}
        for file_name in self.base.names:
            name = parameter.get(file_name)
            if file_name in self._tied_names() and self.is_tied:
                continue  # some files hold the shared matrix twice
            path = None if name is None else self._module_of(name)
            if path is None:
                order.setdefault(file_name, name)
                continue
            for sibling in self.shapes:
                if sibling.startswith(f"{path}.") and sibling in self._in_file and sibling not in self._tied_names():
                    order.setdefault(self._in_file[sibling], sibling)
        if not self.is_tied:
            order.update({name: name for name in self._tied_names()})
        return order

    def shape(self, file_name: str, name: str | None) -> tuple[int, ...]:
        """Return the shape that a tensor will have."""
        return self.base.info(file_name).shape if name is None else self.shapes[name]

    def keeps_float32(self, name: str | None) -> bool:
        """Whether the model's class insists on float32 for a parameter."""
        return name is not None and not self._in_float32.isdisjoint(name.split("."))

    def read(self, file_name: str, name: str | None) -> Tensor:
        """Return a tensor of the merged model: float32 where the adapter changed it, else as the base has it."""
        if name is None:
            return self.base.read(file_name)
        path = self._module_of(name)
        if path is None:
            return self._base_parameter(name)
        if name not in self._made:
            self._made = {}  # before the next one takes memory
            self._made = self._merged_module(path)
        return self._made.pop(name)

    def lora_pairs(self) -> dict[str, tuple[Tensor, Tensor, float]]:
        """Return A of shape (r, in), B of shape (out, r) and their scale, by the name of the weight they change.

        Raises:
            ValueError: If the adapter is more than that: what the pairs alone would leave out.
        """
        pairs = {}
        for path in sorted(self.adapted):
            module = self.peft_model.get_submodule(_PREFIX + path)
            kind = None
            if not isinstance(module, LoraLinear):
                kind = (
                    "modules_to_save or trainable_token_indices"
                    if isinstance(module, AuxiliaryTrainingWrapper)
                    else "a LoRA of the embedding"
                )
            elif module.lora_variant:
                kind = "DoRA"
            elif module.lora_bias["default"]:
                kind = "lora_bias"
            elif f"{path}.weight" in self._tied_names():
                kind = "a LoRA of a head that is tied to the embedding"
            if kind is not None or self._replaced:
                raise ValueError(
                    f"The adapter changes {path if kind else next(iter(self._replaced))} by "
                    f"{kind or 'a trained bias'}, which A and B cannot express. Merge it, and export the merged model."
                )
            trained: Any = module
            a, b = (
                self._adapter_tensor(self._keys[id(part["default"].weight)])
                for part in (trained.lora_A, trained.lora_B)
            )
            pairs[f"{path}.weight"] = (a, b, float(trained.scaling["default"]))
        return pairs

    # One layer

    @torch.no_grad()
    def _merged_module(self, path: str) -> dict[str, Tensor]:
        """Fill a copy of one module with its weights and let PEFT merge it."""
        empty = self.peft_model.get_submodule(_PREFIX + path)
        module = copy.deepcopy(empty)
        for inner, parameter in empty.named_parameters(remove_duplicate=False):
            plain = _plain_name(f"{path}.{inner}")
            if ".original_module." in f".{inner}":  # modules_to_save replaces it
                self._base_parameter(plain)  # for the digest
                continue
            key = self._keys.get(id(parameter))
            value = self._base_parameter(plain) if key is None else self._adapter_tensor(key)
            set_module_tensor_to_device(module, inner, "cpu", value=value, clear_cache=False)
            del value
        if isinstance(module, AuxiliaryTrainingWrapper):
            merged: nn.Module = module.unload_and_optionally_merge_module(True, True, None)
        else:
            module.merge(safe_merge=True)  # type: ignore[operator]  # a copy: the file's own pages are never written
            merged = module.get_base_layer()  # type: ignore[operator]
        tensors = {f"{path}.{inner}": parameter.detach() for inner, parameter in merged.named_parameters()}
        broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if broken:
            raise ValueError(f"{broken[0]} is not finite after merging: the adapter or the base is damaged.")
        return tensors

    def _base_parameter(self, name: str) -> Tensor:
        """Return a parameter as it is without the adapter: 4-bit ones bit for bit as training saw them."""
        if name in self._replaced:
            return self._adapter_tensor(self._replaced[name])
        weight = self.base.read(self._in_file[name])
        if name in self._in_4bit:
            return self._as_trained(name, weight) if self.dequantized else weight
        loaded = weight if self.keeps_float32(name) else weight.to(self.dtype)
        self._note(name, loaded)
        return loaded if self.dequantized and self.quantization is not None else weight

    def _as_trained(self, name: str, weight: Tensor) -> Tensor:
        """Pack a weight into 4 bits and unpack it again."""
        assert self.quantization is not None
        if self.base.is_packed:
            return weight.to(self.dtype)
        turned = self._in_4bit[name]
        packed = quantized(weight.T if turned else weight, self.quantization, self.dtype)
        self._note(name, packed)
        plain: Tensor = dequantize_4bit(packed.data, packed.quant_state)
        return plain.T if turned else plain

    def _note(self, name: str, parameter: Tensor) -> None:
        """Digest what the adapter's manifest has a digest of: the base without what the adapter trains in place."""
        if name not in self._tied_names() and not (self._trains_biases and name.endswith(".bias")):
            self.digest.add(name, parameter)

    def _adapter_tensor(self, key: str) -> Tensor:
        with safe_open(self._adapter_file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    # Which tensor is where

    def _match_keys(self, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[int, str], dict[str, str]]:
        """Find each trained parameter's key in the adapter's file, by PEFT's own naming.

        Returns:
            The key by the parameter's identity, and by the plain name where no adapted module holds the parameter.
        """
        parameters = dict(self.peft_model.named_parameters(remove_duplicate=False))
        expected = get_peft_model_state_dict(self.peft_model, state_dict=parameters, save_embedding_layers=False)
        keys = {id(parameter): key for key, parameter in expected.items() if key in shapes}
        missing = [key for key, parameter in expected.items() if id(parameter) not in keys]
        wrong = [key for key, p in expected.items() if key in shapes and shapes[key] != tuple(p.shape)]
        replaced = {
            _plain_name(name.removeprefix(_PREFIX)): keys[id(parameter)]
            for name, parameter in parameters.items()
            if id(parameter) in keys and self._module_of(_plain_name(name.removeprefix(_PREFIX))) is None
        }
        embeddings = {f"{path}.weight" for path in self._embeddings}
        for key in shapes.keys() - expected.keys():
            plain = _plain_name(key.removeprefix(_PREFIX))
            if plain in embeddings:  # PEFT saves the embeddings whole where the vocabulary was resized
                replaced[plain] = key
            else:
                wrong.append(key)
        if missing or wrong:
            raise ValueError(
                f"The adapter {self._adapter_file.parent} does not fit the base {self.base.folder}: "
                f"{len(missing)} tensors are missing {missing[:3]}, {len(wrong)} do not belong there {wrong[:3]}. "
                "Write --base with the base that it was trained on."
            )
        return keys, replaced

    def _check_files(self) -> None:
        needed = {name for name in self.shapes if self._module_of(name) is not None} | set(self._in_4bit)
        unnamed = sorted(needed - self._in_file.keys())
        if unnamed:
            raise ValueError(
                f"{self.model.config.model_type} models rename tensors while they load: {unnamed[0]} and "
                f"{len(unnamed) - 1} more have other names in the files of {self.base.folder}. Such a base is not "
                "merged tensor by tensor; serve the adapter unmerged, or merge in memory: "
                "PeftModel.from_pretrained(base, folder).merge_and_unload()."
            )

    def _module_of(self, name: str) -> str | None:
        """The adapted module that holds a parameter."""
        parts = name.split(".")
        paths = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
        return next((path for path in paths if path in self.adapted), None)

    def _tied_names(self) -> tuple[str, ...]:
        """The parameter that is another name of the embedding in the base, if there is one."""
        return (f"{self._embeddings[1]}.weight",) if len(self._embeddings) > 1 and self._base_is_tied else ()

    @property
    def _base_is_tied(self) -> bool:
        return bool(getattr(self.model.config, "tie_word_embeddings", False))

    def _stays_tied(self) -> bool:
        """Whether the merged embedding and head are equal, if the base has one matrix for both."""
        if not self._tied_names():
            return False
        names = [f"{path}.weight" for path in self._embeddings]
        if all(self._module_of(name) is None and name not in self._replaced for name in names):
            return True
        embedding, head = (self.read("", name) for name in names)
        return torch.equal(embedding, head)


def _plain_name(name: str) -> str:
    return _WRAPPERS.sub("", re.sub(r"\.modules_to_save\.default(?=\.)", "", name))


def empty_model(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build a base without weights.

    Raises:
        ValueError: If transformers does not know the model.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"The base {str(folder)!r} is no causal language model: {error}") from error
    return cast(PreTrainedModel, model)


def _packed_parameters(model: PreTrainedModel, quantization: BitsAndBytesConfig) -> dict[str, bool]:
    """Name the parameters that transformers packs into 4 bits, and whether their files hold them transposed."""
    transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    copied = copy.deepcopy(model)
    AutoHfQuantizer.from_config(quantization, pre_quantized=False).preprocess_model(
        model=copied, device_map={"": "cpu"}
    )
    packed = [name for name, module in copied.named_modules() if isinstance(module, Linear4bit)]
    return {f"{name}.weight": name in transposed for name in packed}


def _embedding_paths(model: PreTrainedModel) -> tuple[str, ...]:
    """The paths of the embedding and of the head, in this order."""
    path_of = {id(module): path for path, module in model.named_modules()}
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    return tuple(path_of[id(module)] for module in both if id(module) in path_of)


def _resize(model: PreTrainedModel, embeddings: tuple[str, ...], shapes: dict[str, tuple[int, ...]]) -> None:
    """Give the embeddings as many rows as the adapter's file brings for them."""
    keys = [f"{_PREFIX}{path}{end}" for path in embeddings for end in (".weight", ".base_layer.weight")]
    rows = {shapes[key][0] for key in keys if key in shapes} - {model.get_input_embeddings().num_embeddings}
    if rows:
        model.resize_token_embeddings(max(rows), mean_resizing=False)


def _names_in_files(model: PreTrainedModel, base: BaseWeights) -> dict[str, str]:
    """Find each parameter in the files, which may lack or add the prefix of the model without its head."""
    prefix = f"{model.base_model_prefix}."
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in base.names:
                found[name] = candidate
                break
        else:
            shared = [file for other, file in found.items() if model.get_parameter(other) is parameter]
            if shared:
                found[name] = shared[0]
    return found


def _attach(model: PreTrainedModel, lora: LoraConfig) -> PeftModel:
    """Let PEFT put its empty layers where training had them."""
    with warnings.catch_warnings():
        # Remarks about tied weights and transposed layers; both are settled here.
        warnings.simplefilter("ignore", UserWarning)
        return PeftModel(model, copy.deepcopy(lora), low_cpu_mem_usage=True)


def _adapted_modules(model: PeftModel) -> frozenset[str]:
    found: set[str] = set()
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{path}.") for path in found)
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not inside:
            found.add(name)
    return frozenset(name.removeprefix(_PREFIX) for name in found)
