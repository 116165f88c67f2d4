"""Norms, gated activations and rotary embeddings by one kernel each, where they are what the kernel computes.

transformers composes them of many operators, each of which reads and writes whole tensors and keeps some. Whether a
family's norm, MLP or rotation is one of those known here is not read off its name but tried: its own code gets random
numbers, and what computes something else stays as it is. The kernels themselves are compared with the same arithmetic,
forward and backward, when a device first uses them.

A norm's output and an activation can be formed again from what is kept for their own gradients: what saves one of them
for the backward pass may save its :class:`Source` in its place.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor
from torch.nn import functional

from lightning_qlora.kernels.launching import on_device_of, on_gpu
from lightning_qlora.kernels.self_check import first_line, in_clean_thread, may_be_used

triton_kernels: Any
try:
    from lightning_qlora.kernels import elementwise_triton as triton_kernels
except ImportError:  # torch for CPUs comes without Triton
    triton_kernels = None

__all__ = [
    "Source",
    "fuse_elementwise",
    "gated_activation",
    "has_fused_parts",
    "rms_norm",
    "rotary_embedding",
    "source_of",
]

_TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}  # of the norm
_CHECKED_ROWS = 6
_LARGEST_WIDTH = 16384
_ROTATION = "apply_rotary_pos_emb"  # how transformers names the function in every family that has one


# The operators


class Source(NamedTuple):
    """What an output is formed of.

    Attributes:
        kind: ``norm`` or ``activation``.
        tensors: The inputs, which the backward pass of their own operator holds too.
        options: The other arguments.
    """

    kind: str
    tensors: list[Tensor]
    options: list[float]

    def form(self) -> Tensor:
        """Return the output's numbers."""
        function: Any = {"norm": _RMSNorm, "activation": _GatedActivation}[self.kind]
        output: Tensor = function.apply(*self.tensors, *self.options)
        _SOURCES[output.untyped_storage()] = self
        return output


_SOURCES: weakref.WeakKeyDictionary[torch.UntypedStorage, Source] = weakref.WeakKeyDictionary()
"""Of the outputs that are alive. By their storage: what autograd hands out of what it saved is another tensor of it."""


def source_of(tensor: Tensor) -> Source | None:
    """Return what a tensor is formed of, if it is the whole of what a norm or a gated activation has returned."""
    source = _SOURCES.get(tensor.untyped_storage())
    return source if source is not None and source.tensors[0].numel() == tensor.numel() else None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, centred: bool) -> Tensor:
        x_RD = x.reshape(-1, x.shape[-1]).contiguous()
        y_RD, inverse_R = torch.empty_like(x_RD), x_RD.new_empty(x_RD.shape[0], dtype=torch.float32)
        if x.device.type != "meta":
            with on_device_of(x):
                triton_kernels.normalise(x_RD, weight, y_RD, inverse_R, eps, centred)
        ctx.save_for_backward(x_RD, weight, inverse_R)
        ctx.centred = centred
        return y_RD.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x_RD, weight, inverse_R = ctx.saved_tensors
        of_x = torch.empty_like(x_RD)
        gradient_RD = gradient.reshape(x_RD.shape).contiguous()
        if of_x.device.type != "meta":
            with on_device_of(of_x):
                triton_kernels.normalise_backward(gradient_RD, x_RD, weight, inverse_R, of_x, ctx.centred)
        return of_x.view(gradient.shape), None, None, None


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.tanh = tanh
        y = torch.empty_like(gate)
        if y.device.type != "meta":
            with on_device_of(y):
                triton_kernels.activate(gate, up, y, tanh)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        gradient = gradient.contiguous()
        # Written over what nobody needs any more: these are the largest tensors of a layer.
        if gate.device.type != "meta":
            with on_device_of(gate):
                triton_kernels.activate_backward(gradient, gate, up, gate, up, ctx.tanh)
        increment_version((gate, up))  # whoever does need them, in a second backward pass, is told
        return gate, up, None


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _rotate(query, cos, sin, False), _rotate(key, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_query: Tensor, of_key: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(of_query, cos, sin, True), _rotate(of_key, cos, sin, True), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    batch, heads, length, head_dim = x.shape
    y = x.new_empty(batch, length, heads, head_dim).transpose(1, 2)  # as attention wants it
    if y.device.type != "meta":
        with on_device_of(y):
            triton_kernels.rotate(x, cos, sin, y, backward)
    return y


def _apply(function: Any, *args: Any) -> Any:
    return function.apply(*args)


def _note(output: Tensor, kind: str, tensors: list[Tensor], *options: float) -> Tensor:
    if output.requires_grad:
        _SOURCES[output.untyped_storage()] = Source(kind, tensors, [float(option) for option in options])
    return output


def rms_norm(x: Tensor, weight: Tensor, eps: float, centred: bool = False) -> Tensor:
    """Divide rows by their root mean square and multiply them with a frozen weight.

    Args:
        x: (..., width).
        weight: (width,), of the dtype of ``x``.
        eps: Added to the mean square.
        centred: Whether the weight is the factor's distance from one (Gemma).

    Returns:
        Like ``x``.
    """
    return _note(_apply(_RMSNorm, x, weight, eps, centred), "norm", [x.detach(), weight], eps, centred)


def gated_activation(gate: Tensor, up: Tensor, tanh: bool = False) -> Tensor:
    """Compute ``silu(gate) * up`` (SwiGLU), or with ``tanh`` its GELU kin (Shazeer 2020, arXiv:2002.05202).

    Args:
        gate: (..., width).
        up: Like ``gate``.
        tanh: Whether the activation is GELU in its approximation by tanh.

    Returns:
        Like ``gate``.
    """
    return _note(_apply(_GatedActivation, gate, up, tanh), "activation", [gate.detach(), up.detach()], tanh)


def rotary_embedding(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate halves of heads by their positions (Su et al. 2021, arXiv:2104.09864).

    Args:
        query: (B, heads, L, head_dim).
        key: (B, key-value heads, L, head_dim).
        cos: (B or 1, L, head_dim).
        sin: Like ``cos``.

    Returns:
        The two, rotated, with a token's heads side by side in memory.
    """
    rotated: tuple[Tensor, Tensor] = _apply(_Rotation, query, key, cos, sin)
    return rotated


def _plain_norm(x: Tensor, weight: Tensor, eps: float, centred: bool) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (1 + weight if centred else weight)


def _plain_activation(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    return (functional.gelu(gate, approximate="tanh") if tanh else functional.silu(gate)) * up


def _plain_rotation(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def rotate(x: Tensor) -> Tensor:
        one, two = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-two, one), -1) * sin[:, None]

    return rotate(query), rotate(key)


# What families have of them


def fuse_elementwise(model: nn.Module) -> dict[str, int]:
    """Let a model's norms, gated MLPs and rotations run by one kernel each on a GPU.

    Parameters and their names stay as they are. Under ``torch.compile``, which fuses by itself, and wherever else a
    kernel does not apply, modules run their own code.

    Args:
        model: Changed in place.

    Returns:
        How many modules of each kind were switched.
    """
    counts = dict.fromkeys(_FINDERS, 0)
    found: dict[Any, Callable[..., Any] | None] = {}
    for module in model.modules():
        for kind, (describe, find) in _FINDERS.items():
            key = None if "forward" in vars(module) else describe(module)
            if key is None:
                continue
            if key not in found:
                found[key] = find(module)
            forward = found[key]
            if forward is not None:
                stateful: Any = module
                stateful.forward = functools.partial(forward, module)
                counts[kind] += 1
    return counts


def has_fused_parts(model: nn.Module) -> bool:
    """Whether parts of a model were switched by :func:`fuse_elementwise`."""
    forwards = (getattr(vars(module).get("forward"), "func", None) for module in model.modules())
    return any(forward in (_run_norm, _run_mlp, _run_attention) for forward in forwards)


def _describe_norm(module: nn.Module) -> Any:
    weight = getattr(module, "weight", None)
    is_norm = type(module).__name__.endswith("RMSNorm") and isinstance(weight, Tensor) and weight.dim() == 1
    return (type(module), _eps(module)) if is_norm and _eps(module) is not None else None


def _eps(module: Any) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _find_norm(module: nn.Module) -> Callable[..., Any] | None:
    own, eps = type(module).forward, cast(float, _eps(module))
    x, weight = _random(_CHECKED_ROWS, 8), _random(8)
    for centred in (False, True):
        tried = functools.partial(_stand_in(module, _parameters={"weight": nn.Parameter(weight)}), x)
        if _are_equal(tried, functools.partial(_plain_norm, x, weight, eps, centred)):
            return functools.partial(_run_norm, own, eps, centred)
    return None


def _run_norm(own: Callable[..., Any], eps: float, centred: bool, module: Any, x: Tensor) -> Tensor:
    weight = module.weight
    is_frozen = not (weight.requires_grad or isinstance(weight, DTensor))
    if is_frozen and weight.dtype == x.dtype and x.shape[-1] <= _LARGEST_WIDTH and _is_fast("norm", x, centred):
        return rms_norm(x, weight, eps, centred)
    return cast(Tensor, own(module, x))


def _describe_mlp(module: nn.Module) -> Any:
    names = dict(module.named_children())
    return (type(module), str(names.get("act_fn"))) if {"gate_proj", "up_proj", "down_proj"} <= set(names) else None


def _find_mlp(module: nn.Module) -> Callable[..., Any] | None:
    x = _random(_CHECKED_ROWS, 8)
    gate, up = x.chunk(2, -1)
    parts = {"gate_proj": _Constant(gate), "up_proj": _Constant(up), "down_proj": nn.Identity()}
    for tanh in (False, True):
        tried = functools.partial(_stand_in(module, _modules=parts), x)
        if _are_equal(tried, functools.partial(_plain_activation, gate, up, tanh)):
            return functools.partial(_run_mlp, type(module).forward, tanh)
    return None


def _run_mlp(own: Callable[..., Any], tanh: bool, module: Any, x: Tensor) -> Tensor:
    if not _is_fast("activation", x, tanh):
        return cast(Tensor, own(module, x))
    gate, up = module.gate_proj(x), module.up_proj(x)
    if gate.dtype != up.dtype or not _is_fast("activation", gate, tanh):
        return cast(Tensor, own(module, x))
    return cast(Tensor, module.down_proj(gated_activation(gate, up, tanh)))


def _describe_rotation(module: nn.Module) -> Any:
    forward: Any = type(module).forward
    is_plain = isinstance(forward, types.FunctionType) and not hasattr(forward, "__wrapped__")
    return forward if is_plain and _ROTATION in forward.__code__.co_names else None


def _find_rotation(module: nn.Module) -> Callable[..., Any] | None:
    forward: Any = type(module).forward
    own = forward.__globals__.get(_ROTATION)
    inputs = _random(1, 4, 5, 8), _random(1, 2, 5, 8), _random(1, 5, 8), _random(1, 5, 8, seed=1)
    if own is None or not _are_equal(functools.partial(own, *inputs), functools.partial(_plain_rotation, *inputs)):
        return None

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **options: Any) -> Any:
        alike = (
            query.dtype == key.dtype == cos.dtype == sin.dtype and cos.dim() == 3 and cos.shape[-1] == query.shape[-1]
        )
        if args or options or not alike or not _is_fast("rotation", query):
            return own(query, key, cos, sin, *args, **options)
        return rotary_embedding(query, key, cos, sin)

    # The family's own code, but for the one function that it calls by this name.
    code = {**forward.__globals__, _ROTATION: rotate}
    fused = types.FunctionType(forward.__code__, code, forward.__name__, forward.__defaults__, forward.__closure__)
    fused.__kwdefaults__ = forward.__kwdefaults__
    return functools.partial(_run_attention, forward, fused)


def _run_attention(own: Callable[..., Any], fused: Callable[..., Any], module: Any, *args: Any, **options: Any) -> Any:
    return (own if torch.compiler.is_compiling() else fused)(module, *args, **options)


_FINDERS: dict[str, tuple[Callable[[nn.Module], Any], Callable[[nn.Module], Callable[..., Any] | None]]] = {
    "norms": (_describe_norm, _find_norm),
    "activations": (_describe_mlp, _find_mlp),
    "rotations": (_describe_rotation, _find_rotation),
}
"""For each kind: what modules of it are told apart by, and how one of them is to run instead, if it is known."""


class _Constant(nn.Module):
    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, _: Tensor) -> Tensor:
        return self.output


def _stand_in(module: nn.Module, **parts: dict[str, Any]) -> Callable[..., Any]:
    """Return the code of a module on other parameters or children."""
    other = copy.copy(module)
    for name, values in parts.items():
        vars(other)[name] = {**vars(module)[name], **values}
    return functools.partial(type(module).forward, other)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def _are_equal(own: Callable[[], Any], plain: Callable[[], Any]) -> bool:
    """Whether a family's code computes on the CPU what is written here."""

    def compare() -> str | None:
        try:
            with torch.no_grad():
                torch.testing.assert_close(own(), plain(), rtol=1e-5, atol=1e-6)
        except Exception as error:  # code that needs more than it is given here is not what is known here
            return first_line(error)
        return None

    return in_clean_thread(compare) is None


# The check of the kernels


class _Kind(NamedTuple):
    """What decides which kernel runs."""

    name: str
    device: torch.device
    dtype: torch.dtype
    option: bool


def _is_fast(name: str, x: Tensor, option: bool = False) -> bool:
    """Whether a kernel takes such a tensor and can be trusted with it."""
    if torch.compiler.is_compiling() or not on_gpu(x) or x.dtype not in _TOLERANCES:
        return False
    return _is_trusted(_Kind(name, x.device, x.dtype, option))


@cache
def _is_trusted(kind: _Kind) -> bool:
    """Whether a kernel computes here what it should; found out once for each kind of call."""
    complaint = (
        f"Triton's kernel for a model's {kind.name}s is not used on {kind.device} for {kind.dtype}: {{fault}}. They "
        "run as transformers has them."
    )
    return may_be_used(triton_kernels, kind.device, functools.partial(_compare, kind), complaint)


def _compare(kind: _Kind) -> str | None:
    """Return what is wrong with a kernel's outputs or gradients, compared with float32, or ``None``."""
    fast, plain, num_free, inputs = _case(kind)
    found = []
    for function, device, dtype in ((fast, kind.device, kind.dtype), (plain, torch.device("cpu"), torch.float32)):
        given = [x.to(kind.dtype).to(device, dtype, copy=True) for x in inputs]
        free = [x.requires_grad_() for x in given[:num_free]]
        outputs = function(*given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = [_random(*output.shape, seed=9).to(device, output.dtype) for output in outputs]
        gradients = torch.autograd.grad(outputs, free, weights)
        found.append([x.detach().float().cpu() for x in (*outputs, *gradients)])
    distance = max(float((one - two).norm() / two.norm()) for one, two in zip(*found, strict=True))
    # NaN never passes.
    return None if distance <= _TOLERANCES[kind.dtype] else f"it is off by {distance:.2g} of the norm"


def _case(kind: _Kind) -> tuple[Callable[..., Any], Callable[..., Any], int, list[Tensor]]:
    """Return the kernel, the arithmetic, how many inputs have gradients, and the inputs."""
    rows, width, eps, option = _CHECKED_ROWS, 200, 1e-5, kind.option
    if kind.name == "norm":
        inputs = [_random(rows, width), _random(width)]
        return (lambda x, weight: rms_norm(x, weight, eps, option),
                lambda x, weight: _plain_norm(x, weight, eps, option), 1, inputs)  # fmt: skip
    if kind.name == "activation":
        inputs = [_random(rows, width), _random(rows, width, seed=1)]
        return (lambda gate, up: gated_activation(gate, up, option),
                lambda gate, up: _plain_activation(gate, up, option), 2, inputs)  # fmt: skip
    query, key = _random(2, 7, 3, 24).transpose(1, 2), _random(2, 2, 7, 24)
    return rotary_embedding, _plain_rotation, 2, [query, key, _random(2, 7, 24), _random(2, 7, 24, seed=1)]
