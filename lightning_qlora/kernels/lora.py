"""LoRA at the cost of its arithmetic, on 4-bit linear layers.

PEFT computes ``base(x) + scale * B(A(x))``, and to do so clones, scales and adds every output. Here the adapter's
product is added into the base's output by the matrix product itself, projections of one input share its product with
all their A, and the backward pass keeps nothing but that input and that product. It is the same sum in another order:
equal to PEFT's within the rounding of the dtype.

What is kept is kept before the product with the base begins, by an operator of its own. A checkpointed layer is
recomputed until all is there that its backward pass needs: so the product that ends the layer is not made again.

Only plain LoRA is computed here. Each call asks whether it is (:meth:`FusedLinear4bit.forward`), and everything else
runs PEFT's own code: DoRA and other variants, dropout, several adapters at once, merged or disabled ones, inference.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.functional import QuantState
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_qlora.kernels.dequantization import NESTED_BLOCK, constants_of, quant_state

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
        error = _difference(layer)
        if not error <= _TOLERANCE:  # NaN never passes
            _unfuse_lora(model)
            rank_zero_info(
                f"Fused LoRA is off by {error:.2g} of the norm from PEFT's own code on {layer.weight.device}, on a "
                f"layer of {shapes[0][1]} inputs. PEFT's own code is used."
            )
            return False
    return is_fused(model)


def _unfuse_lora(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FusedLinear4bit):
            del module.fused_group, module.fused_index
            cast(Any, module).__class__ = Linear4bit


def _difference(layer: FusedLinear4bit) -> float:
    """Return how far a copy's output and gradients are from PEFT's, relative to their norms, at the worst."""
    layer = copy.deepcopy(layer).train()
    name, base = layer.active_adapters[0], cast(Any, layer.base_layer)
    device, dtype = base.weight.device, base.compute_dtype or torch.float32
    generator = torch.Generator().manual_seed(0)
    a, b = (cast(Tensor, each[name].weight) for each in (layer.lora_A, layer.lora_B))
    with torch.no_grad():
        b.copy_(0.05 * torch.randn(b.shape, generator=generator))  # they begin at zero
    x = torch.randn(_CHECKED_TOKENS, base.in_features, generator=generator).to(device, dtype).requires_grad_()
    weights = torch.randn(_CHECKED_TOKENS, base.out_features, generator=generator).to(device, dtype)
    found = []
    with torch.enable_grad(), torch.autocast(device.type, dtype, enabled=dtype != a.dtype):
        if not layer.is_plain(x):  # never fused, so never wrong
            return 0.0
        for forward in (layer.forward, super(FusedLinear4bit, layer).forward):
            output = forward(x)
            found.append([output.detach(), *torch.autograd.grad(output, (x, a, b), weights.to(output.dtype))])
    return max(float((one - two).norm() / two.norm()) for one, two in zip(*found, strict=True))


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
        if args or kwargs or not self.is_plain(x):
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        return self.fused_group(self.fused_index, x)

    def is_plain(self, x: Tensor) -> bool:
        """Whether this call is one adapter's plain LoRA, in training, with all in the dtype of the products."""
        if not (self.training and torch.is_grad_enabled()) or self.disable_adapters or self.merged_adapters:
            return False
        active = self.active_adapters
        if len(active) != 1 or active[0] not in self.lora_A or active[0] in self.lora_variant:
            return False
        name, base = active[0], cast(Any, self.base_layer)
        a, b = cast(Any, self.lora_A[name]), cast(Any, self.lora_B[name])
        kind = "cuda" if x.device.type == "meta" else x.device.type  # a simulation of a GPU
        mixed = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if mixed else x.dtype
        return (
            x.dtype == dtype
            and (mixed or a.weight.dtype == b.weight.dtype == dtype)
            and base.compute_dtype in (None, dtype)
            and type(self.lora_dropout[name]) is nn.Identity
            and (type(a), type(b)) == (nn.Linear, nn.Linear)
            and a.bias is None
            and b.bias is None
            and (base.bias is None or not base.bias.requires_grad)
            and not isinstance(a.weight, DTensor)
            and not getattr(_state_of(base), "packing_format_for_cpu", False)
        )


class _Group:
    """Layers of one input: whoever is called first computes for all, and the others collect their outputs.

    Args:
        members: The layers.
    """

    def __init__(self, members: Sequence[Any]) -> None:
        self.members = list(members)
        self.input: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}

    def __call__(self, index: int, x: Tensor) -> Tensor:
        if self.input is x and index in self.outputs:
            output = self.outputs.pop(index)
            if not self.outputs:
                self.input = None
            return output
        together = all(member.is_plain(x) for member in self.members if member is not self.members[index])
        wanted = range(len(self.members)) if together else [index]
        outputs = dict(zip(wanted, _products(x, [self.members[i] for i in wanted]), strict=True))
        output = outputs.pop(index)
        self.input, self.outputs = (x, outputs) if outputs else (None, {})
        return output


def _products(x: Tensor, members: Sequence[Any]) -> list[Tensor]:
    names = [member.active_adapters[0] for member in members]
    states = [_state_of(member.base_layer) for member in members]
    x_TD = x.reshape(-1, x.shape[-1])
    weights = [member.base_layer.weight for member in members]
    constants = [tensor for state in states for tensor in constants_of(state)]
    biases = [member.base_layer.bias for member in members if member.base_layer.bias is not None]
    a = [member.lora_A[name].weight for member, name in zip(members, names, strict=True)]
    b = [member.lora_B[name].weight for member, name in zip(members, names, strict=True)]
    scales = [float(member.scaling[name]) for member, name in zip(members, names, strict=True)]
    stored = scales, states[0].blocksize, states[0].quant_type
    low, *shapes = torch.ops.lightning_qlora.lora_low(x_TD, weights, constants, a, b, *stored)
    outputs = torch.ops.lightning_qlora.lora_products(x_TD, low, shapes, weights, constants, biases, b, *stored)
    return [output.view(*x.shape[:-1], output.shape[-1]) for output in outputs]


def _state_of(base: Any) -> QuantState:
    """Return what dequantises a layer's weight; a weight that was gathered from its shards has lost it."""
    state: QuantState = getattr(base.weight, "quant_state", None) or base.quant_state
    return state


@torch.library.custom_op("lightning_qlora::lora_low", mutates_args=())
def _lora_low(
    x: Tensor,
    weights: Sequence[Tensor],
    constants: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    blocksize: int,
    quant_type: str,
) -> list[Tensor]:
    """Multiply one input with all A, and keep what the gradients of the whole group need.

    Args:
        x: (T, in) of the dtype of the products.
        weights: 4-bit weights of ``W_i``, (out_i, in) when dequantised.
        constants: Of :func:`constants_of`, one weight's after another's.
        a: (rank_i, in) each.
        b: (out_i, rank_i) each.
        scales: Factors on the adapters' products.
        blocksize: Values of ``W_i`` that share a constant.
        quant_type: Of bitsandbytes.

    Returns:
        (T, sum of ranks), the input's product with all A; and for each weight one number in the shape (T, out_i) of its
        output. Through these the outputs' gradients come here, where all gradients are formed at once.
    """
    low = x @ torch.cat([each.to(x.dtype) for each in a]).t()
    return [low, *(x.new_zeros(()).expand(x.shape[0], each.shape[0]) for each in b)]


@_lora_low.register_fake
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    constants: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    blocksize: int,
    quant_type: str,
) -> list[Tensor]:
    low = x.new_empty(x.shape[0], sum(each.shape[0] for each in a))
    return [low, *(x.new_empty(()).expand(x.shape[0], each.shape[0]) for each in b)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, constants, a, b, *ctx.options = inputs
    ctx.save_for_backward(x, output[0], *weights, *constants, *a, *b)
    ctx.num_weights = len(weights)
    ctx.num_constants = len(constants)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Return the gradients of the input and of all A and B; the products with ``W_i`` end with the adapters'."""
    (x, low, *saved), num = ctx.saved_tensors, ctx.num_weights
    weights, constants = saved[:num], saved[num : num + ctx.num_constants]
    a, b = saved[-2 * num : -num], saved[-num:]
    scales, blocksize, quant_type = ctx.options
    per_weight = len(constants) // num
    ranks = [each.shape[0] for each in a]
    lows, of_b, of_x = [], [], None
    for i, (gradient, part) in enumerate(zip(gradients[1:], low.split(ranks, 1), strict=True)):
        if gradient is None:  # nobody used this output
            gradient = x.new_zeros(x.shape[0], b[i].shape[0])
        gradient = gradient.to(x.dtype)
        lows.append((gradient @ b[i].to(x.dtype)).mul_(scales[i]))
        of_b.append((gradient.t() @ part).mul_(scales[i]).to(b[i].dtype))
        if ctx.needs_input_grad[0]:
            shape = torch.Size((b[i].shape[0], x.shape[1]))
            state = quant_state(constants[i * per_weight : (i + 1) * per_weight], shape, blocksize, quant_type, x.dtype)
            weight = bnb.dequantize_4bit(weights[i], state)
            of_x = gradient @ weight if of_x is None else of_x.addmm_(gradient, weight)
    lows_TR = lows[0] if num == 1 else torch.cat(lows, 1)
    if of_x is not None:
        of_x = of_x.addmm_(lows_TR, torch.cat([each.to(x.dtype) for each in a]))
    of_a = (lows_TR.t() @ x).split(ranks)
    of_a = [each.to(parameter.dtype) for each, parameter in zip(of_a, a, strict=True)]
    return (of_x, [None] * num, [None] * ctx.num_constants, of_a, of_b, None, None, None)


_lora_low.register_autograd(_gradients, setup_context=_keep)


@torch.library.custom_op("lightning_qlora::lora_products", mutates_args=())
def _lora_products(
    x: Tensor,
    low: Tensor,
    shapes: Sequence[Tensor],
    weights: Sequence[Tensor],
    constants: Sequence[Tensor],
    biases: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    blocksize: int,
    quant_type: str,
) -> list[Tensor]:
    """Multiply one input with several 4-bit weights and add their adapters, keeping nothing.

    Args:
        x: As for :func:`_lora_low`, like all that have the same name there.
        low: What that returned first.
        shapes: What it returned after that; they take this operator's gradients.
        weights: 4-bit weights.
        constants: Of the weights.
        biases: (out_i,) each, or an empty list.
        b: (out_i, rank_i) each.
        scales: Factors.
        blocksize: Values that share a constant.
        quant_type: Of bitsandbytes.

    Returns:
        (T, out_i) for each weight.
    """
    outputs = []
    per_weight = len(constants) // len(weights)
    for i, part in enumerate(low.split([each.shape[1] for each in b], 1)):
        absmax, *second = constants[i * per_weight : (i + 1) * per_weight]
        offset, absmax2, code2 = second or (None, None, None)
        output = torch.ops.bitsandbytes.gemm_4bit.default(
            x,
            weights[i].view(-1, 1),
            [b[i].shape[0], x.shape[1]],
            absmax if absmax2 is None else absmax2,
            blocksize,
            quant_type,
            bias=biases[i].to(x.dtype) if biases else None,
            absmax_8bit=None if absmax2 is None else absmax,
            absmax_code=code2,
            absmax_offset=offset,
        )
        outputs.append(output.addmm_(part, b[i].to(x.dtype).t(), alpha=scales[i]))
    return outputs


@_lora_products.register_fake
def _(
    x: Tensor,
    low: Tensor,
    shapes: Sequence[Tensor],
    weights: Sequence[Tensor],
    constants: Sequence[Tensor],
    biases: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    blocksize: int,
    quant_type: str,
) -> list[Tensor]:
    return [x.new_empty(x.shape[0], each.shape[0]) for each in b]


def _count(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.counts = [len(each) for each in inputs[3:7]]
    ctx.set_materialize_grads(False)


def _hand_on(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
    frozen = [[None] * count for count in ctx.counts]  # B's gradient too is formed where all are
    return (None, None, list(gradients), *frozen, None, None, None)


_lora_products.register_autograd(_hand_on, setup_context=_count)
