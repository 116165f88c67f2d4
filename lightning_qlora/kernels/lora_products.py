"""The operators of fused LoRA: one input, several 4-bit weights, and their adapters.

There are three. :func:`pack_adapters` brings a group's adapters into one matrix of all A and one of all B, in the dtype
of the products, for forward and backward: an adapter is small, and a kernel for each cast of each would take the host
longer than the device. :func:`lora_low` multiplies the input with all A and keeps what the backward pass needs;
:func:`lora_products` makes the products with the weights and keeps nothing. A checkpointed layer is recomputed until
all is there that its backward pass needs, so the product that ends the layer is not made again.

Beside the letters of :mod:`lightning_qlora.schema`, shapes have R for the ranks of a group's adapters together, I for
the width of its input and O for those of its outputs together.

The adapters are added in one of two ways, forward and backward:

- into the output, by ``addmm_``: a skinny product that reads and writes every output once more; or
- inside the base product, whose inner dimension is made longer: ``[x | x A^T] [W | s B]^T`` forward, and backward
  ``[g | s g B] [W ; A]``, which costs a copy of what stands on the left.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import bitsandbytes.functional as bnb
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_qlora.kernels.dequantization import dequantize_into, has_kernel, is_fast, quant_state
from lightning_qlora.kernels.elementwise import Source
from lightning_qlora.kernels.launching import are_operators_wanted
from lightning_qlora.kernels.lora_gradients import both_products, product

__all__ = ["Ways", "choose_ways", "lora_low", "lora_products", "pack_adapters"]

_ALIGNMENT = 8  # elements; matrix products are fast where rows begin at multiples of 16 bytes
_FEW_TOKENS = 1536  # up to here bitsandbytes has products that dequantise nothing


class Ways(NamedTuple):
    """Whether a group's adapters are added inside the base products, forward and backward."""

    forward: bool
    backward: bool


def choose_ways(
    x: Tensor, ranks: Sequence[int], widths: Sequence[int], constants: Sequence[Tensor], blocksize: int, quant_type: str
) -> Ways:
    """Choose how a group's adapters are added, by the bytes that are moved.

    Both ways dequantise all weights and make the same products. What differs, in T x 2 accesses of an element:

    - forward, ``addmm_`` touches every output: ``sum(widths)``; a longer inner dimension copies the input: ``in``. For
      Llama-3.1-8B that is 6,144 against 4,096 for Q, K, V, 28,672 against 4,096 for gate and up, 4,096 against the same
      for O, 4,096 against 14,336 for down.
    - backward, one product after another is added into the input's gradient, and then the adapters':
      ``len(widths) * in``; one product of all copies their gradients: ``sum(widths)``. That is 12,288 against 6,144 for
      Q, K, V, 8,192 against 28,672 for gate and up, 4,096 against the same for O, 14,336 against 4,096 for down.

    Where the weight cannot be dequantised into the longer rows at once, it would be copied too: there ``addmm_`` stays.

    Args:
        x: (T, in).
        ranks: Of the adapters.
        widths: Of the outputs.
        constants: Of the weights.
        blocksize: Values of a weight that share a constant.
        quant_type: Of bitsandbytes.
    """
    nested = len(constants) > len(widths)
    width = x.shape[1]
    if not x.is_cuda or sum(ranks) % _ALIGNMENT or width % _ALIGNMENT:
        return Ways(False, False)
    if not has_kernel(x.device, x.dtype, blocksize, quant_type, nested):
        return Ways(False, False)
    return cheaper_ways(width, widths)


def cheaper_ways(width: int, widths: Sequence[int]) -> Ways:
    """Return the arithmetic of :func:`choose_ways`."""
    return Ways(width < sum(widths), sum(widths) < len(widths) * width)


# As operators, which cost the host more than the products of a small layer cost the device, only where someone looks at
# operators: torch.compile, a count of memory. Otherwise as functions of autograd.


class _Low(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fixed: tuple[Any, ...], *a_and_b: Tensor) -> tuple[Tensor, ...]:
        weights, constants, *others = fixed
        num = len(weights)
        inputs = (x, weights, constants, a_and_b[:num], a_and_b[num:], *others)
        output = _low(*inputs)
        ctx.fixed = weights, constants
        _keep(ctx, (x, (), (), *inputs[3:]), output)  # hooks on what is saved need not see what is frozen
        return tuple(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        of_x, _, _, of_a, of_b, *_ = _gradients(ctx, gradients, *ctx.fixed)
        return (of_x, None, *of_a, *of_b)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, fixed: tuple[Any, ...], *shapes: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(_products(x, low, shapes, *fixed))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return (None, None, None, *gradients)


def pack_adapters(
    a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype
) -> list[Tensor]:
    """Call :func:`_pack`."""
    with torch.no_grad():
        if are_operators_wanted():
            return torch.ops.lightning_qlora.pack_adapters(a, b, scales, dtype)  # type: ignore[no-any-return]
        return _pack(a, b, scales, dtype)


def lora_low(
    x: Tensor,
    weights: Sequence[Tensor],
    constants: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    *others: Any,
) -> Sequence[Tensor]:
    """Call :func:`_low`."""
    if are_operators_wanted():
        return torch.ops.lightning_qlora.lora_low(x, weights, constants, a, b, *others)  # type: ignore[no-any-return]
    apply: Any = _Low.apply
    return apply(x, (weights, constants, *others), *a, *b)  # type: ignore[no-any-return]


def lora_products(x: Tensor, low: Tensor, shapes: Sequence[Tensor], *others: Any) -> Sequence[Tensor]:
    """Call :func:`_products`."""
    if are_operators_wanted():
        return torch.ops.lightning_qlora.lora_products(x, low, shapes, *others)  # type: ignore[no-any-return]
    apply: Any = _Products.apply
    return apply(x, low, others, *shapes)  # type: ignore[no-any-return]


def _pack(a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype) -> list[Tensor]:
    """Copy a group's adapters into two matrices of the products' dtype.

    Args:
        a: (rank_i, in) each.
        b: (out_i, rank_i) each.
        scales: Factors on the adapters' products.
        dtype: Of the products.

    Returns:
        (sum of ranks, in), all A below one another; and (sum of out, sum of ranks), each B, times its factor, in rows
        and columns of its own, and zeros elsewhere.
    """
    ranks, heights = [each.shape[0] for each in a], [each.shape[0] for each in b]
    a_RI = a[0].new_empty(sum(ranks), a[0].shape[1], dtype=dtype)
    allocate = a_RI.new_empty if len(b) == 1 else a_RI.new_zeros
    b_OR = allocate(sum(heights), sum(ranks))
    parts = a_RI.split_with_sizes(ranks), _blocks(b_OR, heights, ranks)
    for own_a, own_b, scale, rows_a, rows_b in zip(a, b, scales, *parts, strict=True):
        rows_a.copy_(own_a)  # one by one: torch._foreach_copy_ takes a GPU longer, for so few and small ones
        torch.mul(own_b, scale, out=rows_b)
    return [a_RI, b_OR]


def _blocks(b_OR: Tensor, heights: Sequence[int], ranks: Sequence[int]) -> list[Tensor]:
    """Return the blocks on the diagonal of all B, one for each adapter."""
    if len(ranks) == 1:
        return [b_OR]
    starts = itertools.accumulate(ranks, initial=0)
    rows = b_OR.split_with_sizes(list(heights))
    return [own.narrow(1, start, rank) for own, start, rank in zip(rows, starts, ranks, strict=False)]


_pack_adapters = torch.library.custom_op("lightning_qlora::pack_adapters", _pack, mutates_args=())


@_pack_adapters.register_fake
def _(a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype) -> list[Tensor]:
    rank = sum(each.shape[0] for each in a)
    shapes = (rank, a[0].shape[1]), (sum(each.shape[0] for each in b), rank)
    return [a[0].new_empty(shape, dtype=dtype) for shape in shapes]


def _low(
    x: Tensor,
    weights: Sequence[Tensor],
    constants: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    a_RI: Tensor,
    b_OR: Tensor,
    scales: Sequence[float],
    blocksize: int,
    quant_type: str,
    inside: bool,
    source_kind: str,
    sources: Sequence[Tensor],
    source_options: Sequence[float],
) -> list[Tensor]:
    """Multiply one input with all A, and keep what the gradients of the whole group need.

    Args:
        x: (T, in) of the dtype of the products.
        weights: 4-bit weights of ``W_i``, (out_i, in) when dequantised.
        constants: Of :func:`constants_of`, one weight's after another's.
        a: (rank_i, in) each.
        b: (out_i, rank_i) each.
        a_RI: (sum of ranks, in), all A, of :func:`_pack`.
        b_OR: (sum of out, sum of ranks), all B, likewise.
        scales: Factors on the adapters' products.
        blocksize: Values of ``W_i`` that share a constant.
        quant_type: Of bitsandbytes.
        inside: Whether the backward pass adds the adapters inside the product with the weights.
        source_kind: What ``x`` is formed of, which is saved in its place: that of a
            :class:`~lightning_qlora.kernels.elementwise.Source`, or empty.
        sources: Its tensors.
        source_options: Its options.

    Returns:
        (T, sum of ranks), the input's product with all A; and for each weight one element, of any value, in the shape
        (T, out_i) of its output. Through these the outputs' gradients come here, where all are formed at once.
    """
    low = x @ a_RI.t()
    return [low, *(x.new_empty(()).expand(x.shape[0], each.shape[0]) for each in b)]


_lora_low = torch.library.custom_op("lightning_qlora::lora_low", _low, mutates_args=())


@_lora_low.register_fake
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    constants: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    a_RI: Tensor,
    *_: Any,
) -> list[Tensor]:
    low = x.new_empty(x.shape[0], a_RI.shape[0])
    return [low, *(x.new_empty(()).expand(x.shape[0], each.shape[0]) for each in b)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, constants, a, b, a_RI, b_OR, *ctx.options, ctx.source_kind, sources, ctx.source_options = inputs
    kept = sources if ctx.source_kind else [x]
    ctx.save_for_backward(output[0], a_RI, b_OR, *weights, *constants, *kept)
    ctx.counts = [1, 1, 1, len(weights), len(constants), len(kept)]
    ctx.ranks, ctx.heights = [each.shape[0] for each in a], [each.shape[0] for each in b]
    ctx.dtype = a[0].dtype
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, gradients: Sequence[Tensor | None], *fixed: Sequence[Tensor]) -> tuple[Any, ...]:
    """Return the gradients of the input and of all A and B; the products with ``W_i`` end with the adapters'."""
    saved = iter(ctx.saved_tensors)
    (low,), (a_RI,), (b_OR,), weights, constants, kept = ([next(saved) for _ in range(count)] for count in ctx.counts)
    weights, constants = map(list, fixed or (weights, constants))
    scales, blocksize, quant_type, inside = ctx.options
    of_outputs: list[Tensor] = []
    of_b: list[Tensor] = []
    lows_TR = low.new_empty(low.shape[0], a_RI.shape[0])
    parts = (
        _blocks(b_OR, ctx.heights, ctx.ranks),
        low.split_with_sizes(ctx.ranks, 1),
        lows_TR.split_with_sizes(ctx.ranks, 1),
    )
    for gradient, scale, own_b, own_low, own_lows in zip(gradients[1:], scales, *parts, strict=True):
        if gradient is None:  # nobody used this output
            gradient = low.new_zeros(low.shape[0], own_b.shape[0])
        gradient = gradient.to(low.dtype)
        of_outputs.append(gradient)
        of_b.append(both_products(gradient, own_b, own_low, scale, own_lows, ctx.dtype))
    x = Source(ctx.source_kind, kept, ctx.source_options).form() if ctx.source_kind else kept[0]
    of_a = product(lows_TR.t(), x.reshape(-1, a_RI.shape[1]), ctx.dtype).split_with_sizes(ctx.ranks)
    del x  # before there are more tensors as large
    of_x = None
    if ctx.needs_input_grad[0]:
        stored = weights, constants, blocksize, quant_type
        of_x = (_input_gradient_at_once if inside else _input_gradient)(of_outputs, lows_TR, a_RI, *stored)
    frozen = ([None] * count for count in ctx.counts[3:5])
    # An empty list of numbers counts as one of tensors.
    of_source: tuple[Any, Any] = ([None] * len(kept), None) if ctx.source_kind else ([], [])
    return (of_x, *frozen, list(of_a), of_b, None, None, None, None, None, None, None, *of_source)


def _input_gradient(
    gradients: Sequence[Tensor],
    lows_TR: Tensor,
    a_RI: Tensor,
    weights: Sequence[Tensor],
    constants: Sequence[Tensor],
    blocksize: int,
    quant_type: str,
) -> Tensor:
    """Add up the products of all gradients with their weights, and that of the adapters."""
    dtype, per_weight = lows_TR.dtype, len(constants) // len(weights)
    of_x: Tensor | None = None
    for i, gradient in enumerate(gradients):
        own = constants[i * per_weight : (i + 1) * per_weight]
        shape = [gradient.shape[1]], a_RI.shape[1]
        weight = _stacked([weights[i]], own, [], *shape, blocksize, quant_type, dtype)
        of_x = gradient @ weight if of_x is None else of_x.addmm_(gradient, weight)
        del weight
    assert of_x is not None
    return of_x.addmm_(lows_TR, a_RI)


def _input_gradient_at_once(
    gradients: Sequence[Tensor],
    lows_TR: Tensor,
    a_RI: Tensor,
    weights: Sequence[Tensor],
    constants: Sequence[Tensor],
    blocksize: int,
    quant_type: str,
) -> Tensor:
    """Make one product of all: ``[g_1 | .. | g_n | lows] [W_1 ; .. ; W_n ; A]``."""
    shape = [each.shape[1] for each in gradients], a_RI.shape[1]
    weights_and_a = _stacked(weights, constants, [a_RI], *shape, blocksize, quant_type, lows_TR.dtype)
    of_x: Tensor = torch.cat([*gradients, lows_TR], 1) @ weights_and_a
    return of_x


def _stacked(*arguments: Any) -> Tensor:
    """Call :func:`_stack`."""
    function: Any = torch.ops.lightning_qlora.stack_4bit if are_operators_wanted() else _stack
    return cast(Tensor, function(*arguments))


def _stack(
    weights: Sequence[Tensor],
    constants: Sequence[Tensor],
    below: Sequence[Tensor],
    heights: Sequence[int],
    width: int,
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    """Dequantise weights into one matrix, (sum of heights, width), with other matrices below them."""
    per_weight = len(constants) // len(weights)
    numbers = constants[0].new_empty(sum(heights) + sum(each.shape[0] for each in below), width, dtype=dtype)
    if len(weights) == 1 and not below and not is_fast(numbers, constants, blocksize, quant_type):
        del numbers
        shape = torch.Size((heights[0], width))
        whole: Tensor = bnb.dequantize_4bit(weights[0], quant_state(constants, shape, blocksize, quant_type, dtype))
        return whole
    parts = numbers.split([*heights, *(each.shape[0] for each in below)])
    for i, weight in enumerate(weights):
        dequantize_into(parts[i], weight, constants[i * per_weight : (i + 1) * per_weight], blocksize, quant_type)
    for part, each in zip(parts[len(weights) :], below, strict=True):
        part.copy_(each)
    return numbers


_stack_4bit = torch.library.custom_op("lightning_qlora::stack_4bit", _stack, mutates_args=())


@_stack_4bit.register_fake
def _(
    weights: Sequence[Tensor],
    constants: Sequence[Tensor],
    below: Sequence[Tensor],
    heights: Sequence[int],
    width: int,
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    return weights[0].new_empty(sum(heights) + sum(each.shape[0] for each in below), width, dtype=dtype)


_lora_low.register_autograd(_gradients, setup_context=_keep)


def _products(
    x: Tensor,
    low: Tensor,
    shapes: Sequence[Tensor],
    weights: Sequence[Tensor],
    constants: Sequence[Tensor],
    biases: Sequence[Tensor],
    b_OR: Tensor,
    heights: Sequence[int],
    blocksize: int,
    quant_type: str,
    inside: bool,
) -> list[Tensor]:
    """Multiply one input with several 4-bit weights and add their adapters, keeping nothing.

    Args:
        x: (T, in), as for :func:`_low`, like all that have the same name there.
        low: What that returned first.
        shapes: What it returned after that; they take this operator's gradients.
        weights: 4-bit weights.
        constants: Of the weights.
        biases: (out_i,) each, or an empty list.
        b_OR: Of :func:`_pack`.
        heights: out_i of each.
        blocksize: Values that share a constant.
        quant_type: Of bitsandbytes.
        inside: Whether the adapters are added inside the products.

    Returns:
        (T, out_i) for each weight.
    """
    per_weight = len(constants) // len(weights)
    own = [constants[i * per_weight : (i + 1) * per_weight] for i in range(len(weights))]
    added = [biases[i].to(x.dtype) if biases else None for i in range(len(weights))]
    rows = b_OR.split_with_sizes(list(heights))
    if inside:
        return _products_inside(x, low, weights, own, added, rows, blocksize, quant_type)
    outputs = []
    for i, bias in enumerate(added):
        output = _base_product(x, weights[i], own[i], bias, heights[i], blocksize, quant_type)
        outputs.append(output.addmm_(low, rows[i].t()))
    return outputs


def _products_inside(
    x: Tensor,
    low: Tensor,
    weights: Sequence[Tensor],
    constants: Sequence[Sequence[Tensor]],
    biases: Sequence[Tensor | None],
    b: Sequence[Tensor],
    blocksize: int,
    quant_type: str,
) -> list[Tensor]:
    """Compute ``[x | low] [W_i | B_i]^T``, with the rows of each weight in all B.

    The weights follow one another in one buffer: a larger one for a single product of all would make the outputs parts
    of one tensor, whose gradients autograd would first have to join.
    """
    x_and_low, width = torch.cat([x, low], 1), x.shape[1]
    buffer = x.new_empty(max(each.shape[0] for each in b), x_and_low.shape[1])
    outputs = []
    for i, bias in enumerate(biases):
        rows = buffer[: b[i].shape[0]]
        numbers, adapters = rows.tensor_split((width,), 1)
        dequantize_into(numbers, weights[i], constants[i], blocksize, quant_type)
        adapters.copy_(b[i])
        outputs.append(torch.nn.functional.linear(x_and_low, rows, bias))
    return outputs


def _base_product(
    x: Tensor,
    weight: Tensor,
    constants: Sequence[Tensor],
    bias: Tensor | None,
    width: int,
    blocksize: int,
    quant_type: str,
) -> Tensor:
    if x.shape[0] > _FEW_TOKENS and is_fast(x, constants, blocksize, quant_type):
        numbers = x.new_empty(width, x.shape[1])
        dequantize_into(numbers, weight, constants, blocksize, quant_type)
        return torch.nn.functional.linear(x, numbers, bias)
    absmax, *second = constants
    offset, absmax2, code2 = second or (None, None, None)
    output: Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
        x,
        weight.view(-1, 1),
        [width, x.shape[1]],
        absmax if absmax2 is None else absmax2,
        blocksize,
        quant_type,
        bias=bias,
        absmax_8bit=None if absmax2 is None else absmax,
        absmax_code=code2,
        absmax_offset=offset,
    )
    return output


_lora_products = torch.library.custom_op("lightning_qlora::lora_products", _products, mutates_args=())


@_lora_products.register_fake
def _(
    x: Tensor,
    low: Tensor,
    shapes: Sequence[Tensor],
    weights: Sequence[Tensor],
    constants: Sequence[Tensor],
    biases: Sequence[Tensor],
    b_OR: Tensor,
    heights: Sequence[int],
    *_: Any,
) -> list[Tensor]:
    return [x.new_empty(x.shape[0], height) for height in heights]


def _count(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.counts = [len(each) for each in inputs[3:6]]
    ctx.set_materialize_grads(False)


def _hand_on(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
    frozen = [[None] * count for count in ctx.counts]
    return (None, None, list(gradients), *frozen, None, None, None, None, None)  # B's gradient is formed where all are


_lora_products.register_autograd(_hand_on, setup_context=_count)
