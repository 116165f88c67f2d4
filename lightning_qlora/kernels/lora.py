"""LoRA at the cost of its arithmetic, on 4-bit linear layers.

PEFT computes ``base(x) + scale * B(A(x))``, and to do so clones, scales and adds every output. Here the adapter's
product is added into the base's output by the matrix product itself, projections of one input share its product with
all their A, and the backward pass keeps nothing but that input and that product. It is the same sum in another order:
equal to PEFT's within the rounding of the dtype.

The operators are in :mod:`lightning_qlora.kernels.lora_products`. Only plain LoRA is computed by them. Each call asks
whether it is (:meth:`FusedLinear4bit.forward`), and everything else runs PEFT's own code: DoRA and other variants,
dropout, several adapters at once, merged or disabled ones, inference.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from bitsandbytes.functional import QuantState
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_qlora.kernels.dequantization import NESTED_BLOCK, constants_of
from lightning_qlora.kernels.elementwise import source_of
from lightning_qlora.kernels.launching import autocast_dtype_of
from lightning_qlora.kernels.lora_products import choose_ways, lora_low, lora_products, pack_adapters
from lightning_qlora.kernels.self_check import in_clean_thread

__all__ = ["FusedLinear4bit", "fuse_lora", "fuse_lora_if_equal", "is_fused"]

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Projections that families compute from one input, in the order they are called."""

_CHECKED_TOKENS = 2048  # above what bitsandbytes multiplies without dequantising
_TOLERANCE = 2e-2  # bfloat16 keeps 8 bits


def fuse_lora(model: nn.Module) -> int:
    """Let a model's 4-bit layers with LoRA add it inside their products, where it is plain LoRA.

    Parameters, their names and what is saved stay as they are.

    Args:
        model: With adapters of PEFT; changed in place.

    Returns:
        How many layers were switched.
    """
    count = 0
    for module in list(model.modules()):
        children = dict(module.named_children())
        for names in (*_SIBLINGS, *((name,) for name in children)):
            members = [children.get(name) for name in names]
            if all(type(member) is Linear4bit for member in members) and _are_alike(members):
                group = _Group(members)
                for index, member in enumerate(cast(list[Any], members)):
                    member.__class__ = FusedLinear4bit
                    member.fused_group, member.fused_index = group, index
                count += len(members)
    return count


def fuse_lora_if_equal(model: nn.Module) -> bool:
    """Switch to fused LoRA if it computes here, on this device, what PEFT does; otherwise say so and leave it.

    One layer of each shape is compared on random numbers, forward and backward.
    """
    fuse_lora(model)
    checked = set()
    for layer in [module for module in model.modules() if isinstance(module, FusedLinear4bit)]:
        shapes = tuple(member.base_layer.weight.quant_state.shape for member in layer.fused_group.members)
        if shapes in checked:
            continue
        checked.add(shapes)
        fault = in_clean_thread(functools.partial(_compare, layer))
        if fault is not None:
            _unfuse_lora(model)
            rank_zero_info(
                f"Fused LoRA is not used on {layer.weight.device}: on a layer of {shapes[0][1]} inputs {fault}. PEFT's "
                "own code is used."
            )
            return False
    return is_fused(model)


def _unfuse_lora(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FusedLinear4bit):
            del module.fused_group, module.fused_index
            cast(Any, module).__class__ = Linear4bit


def _compare(layer: FusedLinear4bit) -> str | None:
    """Return what is wrong with a group's outputs or gradients, compared with PEFT's, or ``None``.

    Computed on a copy of the group, with adapters that are not zero.
    """
    members = copy.deepcopy(layer).fused_group.members
    base = members[0].base_layer
    device, dtype = base.weight.device, base.compute_dtype or torch.float32
    generator = torch.Generator().manual_seed(0)
    adapters = []
    for member in members:
        a, b = (each[member.train().active_adapters[0]].weight for each in (member.lora_A, member.lora_B))
        b.data.copy_(0.05 * torch.randn(b.shape, generator=generator))  # they begin at zero
        adapters += [a, b]
    x = torch.randn(_CHECKED_TOKENS, base.in_features, generator=generator).to(device, dtype).requires_grad_()
    widths = [member.base_layer.out_features for member in members]
    weights = [torch.randn(_CHECKED_TOKENS, width, generator=generator).to(device, dtype) for width in widths]
    found = []
    with torch.enable_grad(), torch.autocast(device.type, dtype, enabled=dtype != adapters[0].dtype):
        arithmetic = _Arithmetic.of(x)
        plain = [arithmetic is not None and member.is_plain(arithmetic) for member in members]
        if not all(plain):  # never fused together
            members, adapters, weights = members[:1], adapters[:2], weights[:1]
        if not plain[0]:  # never fused, so never wrong
            return None
        for forward in (FusedLinear4bit.forward, Linear4bit.forward):
            outputs = [forward(member, x) for member in members]
            cotangents = [each.to(output.dtype) for each, output in zip(weights, outputs, strict=True)]
            gradients = torch.autograd.grad(outputs, (x, *adapters), cotangents)
            found.append([*(output.detach() for output in outputs), *gradients])
    error = max(float((one - two).norm() / two.norm()) for one, two in zip(*found, strict=True))
    # NaN never passes.
    return None if error <= _TOLERANCE else f"it is off by {error:.2g} of the norm from PEFT's own code"


def is_fused(model: nn.Module) -> bool:
    """Whether a model's layers were switched by :func:`fuse_lora`."""
    return any(isinstance(module, FusedLinear4bit) for module in model.modules())


def _are_alike(members: Sequence[Any]) -> bool:
    """Whether the products of these layers can be one call."""
    kinds = set()
    for member in members:
        state = getattr(member.get_base_layer().weight, "quant_state", None)
        if state is None or (state.nested and state.state2.blocksize != NESTED_BLOCK):
            return False
        kinds.add((state.shape[1], state.blocksize, state.quant_type, state.nested, member.base_layer.bias is None))
    return len(kinds) == 1


class FusedLinear4bit(Linear4bit):
    """PEFT's LoRA layer over a 4-bit one, whose plain case is computed with its siblings'."""

    fused_group: _Group
    fused_index: int

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute base and adapter; as PEFT does, unless it is plain LoRA in training."""
        if not (args or kwargs):
            group = self.fused_group
            if group.has(self.fused_index, x):
                return group.take(self.fused_index)
            arithmetic = _Arithmetic.of(x)
            if arithmetic is not None and self.is_plain(arithmetic):
                return group(self.fused_index, x, arithmetic)
        output: Tensor = super().forward(x, *args, **kwargs)
        return output

    def is_plain(self, arithmetic: _Arithmetic) -> bool:
        """Whether this is one adapter's plain LoRA, in training, with all in the dtype of the products."""
        active = self.active_adapters
        if not self.training or self.disable_adapters or self.merged_adapters or len(active) != 1:
            return False
        parts: Any = _Parts.of(self, active[0])
        if parts is None:
            return False
        base, a, b, dropout = parts
        dtype, bias = arithmetic.dtype, _parameter(base, "bias")
        weight_a, weight_b = _parameter(a, "weight"), _parameter(b, "weight")
        return (
            (arithmetic.mixed or weight_a.dtype == weight_b.dtype == dtype)
            and base.compute_dtype in (None, dtype)
            and type(dropout) is nn.Identity
            and (type(a), type(b)) == (nn.Linear, nn.Linear)
            and _parameter(a, "bias") is None
            and _parameter(b, "bias") is None
            and (bias is None or not bias.requires_grad)
            and not isinstance(weight_a, DTensor)
            and not getattr(_state_of(base), "packing_format_for_cpu", False)
        )


class _Arithmetic(NamedTuple):
    """What a call's products are made in.

    Attributes:
        dtype: Of the input and the products.
        mixed: Whether autocast brings adapters into it.
    """

    dtype: torch.dtype
    mixed: bool

    @classmethod
    def of(cls, x: Tensor) -> _Arithmetic | None:
        """Return them for an input that is trained on in its own dtype."""
        if not torch.is_grad_enabled():
            return None
        autocast = autocast_dtype_of(x)
        dtype = autocast or x.dtype
        return cls(dtype, autocast is not None) if x.dtype == dtype else None


class _Parts(NamedTuple):
    """The modules of a layer and its adapter."""

    base: Any
    a: Any
    b: Any
    dropout: Any

    @classmethod
    def of(cls, layer: Any, name: str) -> _Parts | None:
        """Return them where the adapter is of no variant, by the dictionaries they are in.

        ``nn.Module.__getattr__`` takes longer than all the rest of asking.
        """
        modules = layer._modules
        if name in layer.lora_variant:
            return None
        a = modules["lora_A"]._modules.get(name)
        if a is None:
            return None
        return cls(modules["base_layer"], a, modules["lora_B"]._modules[name], modules["lora_dropout"]._modules[name])


class _Group:
    """Layers of one input: whoever is called first computes for all, and the others collect their outputs.

    Args:
        members: The layers.
    """

    def __init__(self, members: Sequence[Any]) -> None:
        self.members = list(members)
        self.input: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}

    def has(self, index: int, x: Tensor) -> bool:
        """Whether a sibling that was called with this very input has computed a layer's output."""
        return self.input is x and index in self.outputs

    def take(self, index: int) -> Tensor:
        """Return it, once."""
        output = self.outputs.pop(index)
        if not self.outputs:
            self.input = None
        return output

    def __call__(self, index: int, x: Tensor, arithmetic: _Arithmetic) -> Tensor:
        together = all(member.is_plain(arithmetic) for member in self.members if member is not self.members[index])
        wanted = range(len(self.members)) if together else [index]
        outputs = dict(zip(wanted, _products(x, [self.members[i] for i in wanted]), strict=True))
        output = outputs.pop(index)
        self.input, self.outputs = (x, outputs) if outputs else (None, {})
        return output


def _products(x: Tensor, members: Sequence[Any]) -> list[Tensor]:
    names = [member.active_adapters[0] for member in members]
    parts = [cast(_Parts, _Parts.of(member, name)) for member, name in zip(members, names, strict=True)]
    states = [_state_of(each.base) for each in parts]
    with torch._C.DisableTorchFunctionSubclass():  # bitsandbytes looks at each use of its parameters
        weights = [_parameter(each.base, "weight").detach() for each in parts]
    x_TD = x.reshape(-1, x.shape[-1])
    constants = [tensor for state in states for tensor in constants_of(state)]
    biases = [bias for bias in [_parameter(each.base, "bias") for each in parts] if bias is not None]
    a, b = [_parameter(each.a, "weight") for each in parts], [_parameter(each.b, "weight") for each in parts]
    scales = [float(member.scaling[name]) for member, name in zip(members, names, strict=True)]
    heights, stored = [each.shape[0] for each in b], (states[0].blocksize, states[0].quant_type)
    ways = choose_ways(x_TD, [each.shape[0] for each in a], heights, constants, *stored)
    packed = pack_adapters(a, b, scales, x.dtype)
    source = source_of(x) or ("", [], [])
    low, *shapes = lora_low(x_TD, weights, constants, a, b, *packed, scales, *stored, ways.backward, *source)
    outputs = lora_products(x_TD, low, shapes, weights, constants, biases, packed[1], heights, *stored, ways.forward)
    return [output.view(*x.shape[:-1], output.shape[-1]) for output in outputs]


def _parameter(module: nn.Module, name: str) -> Any:
    return module._parameters[name]


def _state_of(base: Any) -> QuantState:
    """Return what dequantises a layer's weight; a weight that was gathered from its shards has lost it."""
    state: QuantState = getattr(_parameter(base, "weight"), "quant_state", None) or base.quant_state
    return state
