"""A decoder's forward and backward pass as one launch each: CUDA graphs.

A step is thousands of kernels. Where they are small, as in a small model or a batch of few tokens, the GPU is done with
one before the host has launched the next. A CUDA graph is recorded once and launched as a whole, but with the very
addresses and sizes that it was recorded with: so batches are padded to one size, by documents of padding that nobody
looks at, and what is different in each of them, the tokens and where documents begin, is copied to where the graph
reads it.

What decides by numbers of the batch on the host cannot be recorded. So a batch is run in the form of the recording
first, kernel by kernel, where it is seen who waits for the GPU and the lengths of documents are not to be had; who
does, or draws random numbers, is never recorded.

What Python does is in no graph. A recording is made anew where weights have moved, others are trained or adapters have
been switched, and given up where hooks would not be called.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, TypeAlias

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_debug, rank_zero_info
from torch import Tensor, nn

from lightning_qlora.kernels.attention import PackedDocuments
from lightning_qlora.kernels.checkpointing import random_state_left_alone
from lightning_qlora.kernels.graph_forms import Form, GraphInputs
from lightning_qlora.kernels.host_pace import HostPace
from lightning_qlora.kernels.launching import autocast_dtype_of
from lightning_qlora.kernels.self_check import first_line
from lightning_qlora.random_state import are_equal, capture_random_state, restore_random_state

__all__ = ["DecoderGraphs", "Recorder", "record_on_gpu"]

_RECORDINGS = 8  # before they have to pay
_BATCHES_EACH = 100  # that a further one has to pay in
_WAITED = "called a synchronizing CUDA operation"  # torch's warning
_HOOKED = "hooks of its modules would not be called"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Decoder: TypeAlias = Callable[[Tensor, Tensor, PackedDocuments], Tensor]
"""From (1, T) token ids, (1, T) positions and the documents to (1, T, D) hidden states."""
Recorder: TypeAlias = Callable[[Callable[[], Sequence[Tensor | None]]], tuple[Callable[[], None], list[Tensor | None]]]
"""Runs some work once; returns what runs it again, and the tensors that it writes each time."""


def record_on_gpu() -> Recorder:
    """Return a recorder of CUDA graphs that share their memory, on the current GPU."""
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # torch's own is of the first GPU that asked

    def record(work: Callable[[], Sequence[Tensor | None]]) -> tuple[Callable[[], None], list[Tensor | None]]:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Threads that bring batches or watch over ranks may ask the GPU for things meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                found = work()
        except BaseException:  # torch leaves these as they were in the middle of it
            torch.cuda.set_stream(before)
            with suppress(Exception):
                torch._C._cuda_endAllocateToPool(stream.device_index, pool)
                torch._C._cuda_releasePool(stream.device_index, pool)
            with suppress(Exception):
                numbers = torch.cuda.default_generators[stream.device_index]
                numbers.graphsafe_set_state(numbers.clone_state())
            raise
        return graph.replay, list(found)

    return record


class DecoderGraphs:
    """Runs a decoder in training by graphs, which it records as batches come.

    The first batch of a size runs as it is, the second in the form of a recording, and with the third it is recorded;
    two more are timed first where it has to pay. A batch that does not fit lets go of the recording, whose memory it
    needs, and begins a larger one.

    Args:
        run: Runs the decoder.
        decoder: Whose parameters are trained.
        outer: Modules whose own hooks are called where ``run`` is not.
        recorder: Makes what records; CUDA graphs.
        obstacle: Says what speaks against recording, just before it; ``None`` where nothing does.
        state: Returns what the decoder's code decides by besides: what a recording was made for.
        pace: Times batches: nothing is recorded then where the GPU is what is slow.
        tells: Whether it is said that, and why, nothing is recorded, and not only to who debugs.
        most_tokens: Of any batch, if that is known.
    """

    def __init__(
        self,
        run: Decoder,
        decoder: nn.Module,
        *,
        outer: Sequence[nn.Module] = (),
        recorder: Callable[[], Recorder] = record_on_gpu,
        obstacle: Callable[[], str | None] = lambda: None,
        state: Callable[[], object] = lambda: None,
        pace: Callable[[], HostPace] | None = None,
        tells: bool = True,
        most_tokens: int | None = None,
    ) -> None:
        self.run, self.decoder, self.outer = run, decoder, list(outer)
        self.recorder = recorder
        self.obstacle = obstacle
        self.state = state
        self.pace = pace
        self.tells = tells
        self.most_tokens = most_tokens
        self.refusal: str | None = None
        """Why nothing is recorded any more."""
        self.replays = 0
        """How many batches were run by a recording."""
        self._form: Form | None = None
        self._rehearsals = 0
        self._timed: HostPace | None = None  # those after the first
        self._recording: _Recording | None = None
        self._made_for: object = None
        self._hooks: list[dict[Any, Any]] = []
        self._tensors: list[dict[str, Any]] = []
        self._constants: list[object] = []
        self._batches = self._recordings = 0

    def __call__(self, input_ids: Tensor, position_ids: Tensor, lengths: Sequence[int]) -> Tensor | None:
        """Run a batch.

        Args:
            input_ids: (1, T) int64 of packed documents.
            position_ids: (1, T) int64.
            lengths: Of the documents, in tokens.

        Returns:
            (1, T', D) hidden states, of T tokens and of padding behind them, that are valid until the next batch; or
            ``None`` where the caller has to run the decoder itself.
        """
        if self.refusal is not None or not torch.is_grad_enabled():
            return None
        self._batches += 1
        lengths = [int(length) for length in lengths]
        padded = None if self._form is None else self._form.padded(lengths)
        if self._form is None or padded is None:
            self.release()
            self._form = Form.around(lengths, self._form, self.most_tokens)
            return None
        if self._form.is_too_large(lengths):
            return None
        if self._recording is not None:
            if any(map(len, self._hooks)):
                self._refuse(_HOOKED)
                return None
            if self._made_for != self._identity():
                self.release()
        batch = input_ids, position_ids, padded
        if not self._rehearsals or (self._timed is not None and not self._timed.is_known):
            return self._rehearse(*batch)
        if self._recording is None:
            self._record(*batch)
        if self._recording is None or self._recording.is_in_use():
            return None
        self.replays += 1
        return self._recording.run(*batch)

    def release(self) -> None:
        """Let go of the recording and its memory."""
        had_one = self._recording is not None
        self._recording = self._timed = None
        self._constants = []
        self._rehearsals = 0
        if had_one:
            _free_pools()

    def _rehearse(self, *batch: Any) -> Tensor | None:
        """Run a batch as it would be recorded."""
        assert self._form is not None
        reason = self._reason()
        if reason is not None:
            self._refuse(reason)
            return None
        inputs = GraphInputs(self._form, batch[0])
        inputs.fill(*batch)
        before = capture_random_state()
        try:
            with self._timed or nullcontext(), _waiting_noticed(inputs.starts) as waits:
                hidden = self.run(*inputs)
        except Exception as error:  # models decide by numbers in many ways; or there is not the memory
            reason = f"the model cannot be recorded: {first_line(error)}"
        if reason is None and waits:
            reason = "the model decides by numbers that it waits for"
        if reason is None and not are_equal(before, capture_random_state()):
            reason = "the model draws random numbers"
        if reason is not None:
            restore_random_state(before)  # as if nothing had been
            self._refuse(reason)
            return None
        if hidden.requires_grad:  # something is trained
            if self.pace is not None and not self._rehearsals:
                self._timed = self.pace()  # kernels are compiled by now
            self._rehearsals += 1
        return hidden

    def _record(self, *batch: Any) -> None:
        assert self._form is not None
        reason = self._reason()
        if self._timed is not None and not self._timed.host_is_slow():
            reason = f"the GPU is what is slow: {self._timed}"
        if self._recordings >= _RECORDINGS + self._batches // _BATCHES_EACH:
            reason = "it would have to be recorded again and again"
        if reason is not None:
            self._refuse(reason)
            return
        inputs = GraphInputs(self._form, batch[0])
        inputs.fill(*batch)
        try:
            self._recording = _Recording(self.run, self.decoder, inputs, self.recorder())
        except Exception as error:  # for want of memory, or since a model does what a driver does not record
            self._refuse(f"recording failed: {first_line(error)}")
            _free_pools()
            return
        if not self._recordings:
            why = f" ({self._timed})" if self._timed is not None else ""
            rank_zero_info(f"cuda_graphs: passes of up to {self._form.tokens:,} tokens are launched as a whole{why}.")
        self._recordings += 1
        self._tensors = [values for each in self.decoder.modules() for values in (each._parameters, each._buffers)]
        self._made_for = self._identity()
        self._constants = list(_constants_of(self._present()))  # alive, so that nothing else is at their places

    def _reason(self) -> str | None:
        """Return what speaks against recording now."""
        inside = [vars(module)[name] for module in self.decoder.modules() for name in _HOOKS]
        outside = [vars(module)[name] for module in self.outer for name in _HOOKS]
        everywhere = [vars(nn.modules.module)["_global" + name] for name in _HOOKS]
        self._hooks = [*inside, *outside, *everywhere]
        return _HOOKED if any(map(len, self._hooks)) else self.obstacle()

    def _identity(self) -> object:
        """Return where the decoder's tensors are, which of them are trained, and what else it decides by."""
        with torch._C.DisableTorchFunctionSubclass():  # bitsandbytes looks at each use of its parameters
            tensors = self._present()
            places = [(each.data_ptr(), each.requires_grad) for each in tensors]
        return places, list(map(id, _constants_of(tensors))), self.state()

    def _present(self) -> list[Tensor]:
        return [each for values in self._tensors for each in values.values() if each is not None]

    def _refuse(self, reason: str) -> None:
        self.release()
        self.refusal = reason
        (rank_zero_info if self.tells else rank_zero_debug)(f"cuda_graphs: not used, {reason}.")


def _constants_of(tensors: list[Tensor]) -> Iterator[object]:
    """Yield what quantised weights are decoded by, which are no tensors of a module."""
    for each in tensors:
        attributes = vars(each)
        yield attributes.get("SCB")
        state = attributes.get("quant_state")
        while state is not None:
            yield state
            yield state.absmax
            state = state.state2


class _Run:
    """One use of a recording, from its forward pass to its backward pass."""

    is_done = False


class _Recording:
    """A decoder's forward and backward pass, recorded for batches of a form."""

    def __init__(self, run: Decoder, decoder: nn.Module, inputs: GraphInputs, record: Recorder) -> None:
        self._decode, self.inputs = run, inputs
        self._hidden: Tensor | None = None
        self._last: weakref.ref[_Run] | None = None  # what a backward pass may come for
        with _leaves_in_place(decoder) as (parameters, self._leaves):
            self.replay_forward, (output,) = record(self._forward)
            assert output is not None
            self._check_leaves()
            self.output, self.of_output = output, torch.zeros_like(output)
            self.replay_backward, found = record(self._backward)
        self.trained = [p for p, gradient in zip(parameters, found, strict=True) if gradient is not None]
        self.of_trained = [gradient for gradient in found if gradient is not None]

    def _forward(self) -> list[Tensor | None]:
        near = self.inputs.starts
        dtype = autocast_dtype_of(near)
        # autocast would hand out casts that it made before, and keep some of the recording's.
        autocast = torch.autocast(near.device.type, dtype, enabled=dtype is not None, cache_enabled=False)
        with torch.enable_grad(), autocast, random_state_left_alone():
            self._hidden = self._decode(*self.inputs)
        return [self._hidden.detach()]

    def _check_leaves(self) -> None:
        """See that no gradient is lost: that of a tensor which is not found among the modules' parameters."""
        assert self._hidden is not None
        if not _leaves_of(self._hidden) <= set(map(id, self._leaves)):
            raise RuntimeError("the decoder trains what is no parameter of its modules")

    def _backward(self) -> Sequence[Tensor | None]:
        hidden, self._hidden = self._hidden, None
        assert hidden is not None
        return torch.autograd.grad(hidden, self._leaves, self.of_output, allow_unused=True)

    def is_in_use(self) -> bool:
        """Whether a backward pass may still come for the last run."""
        run = None if self._last is None else self._last()
        return run is not None and not run.is_done

    def run(self, input_ids: Tensor, position_ids: Tensor, padded: Sequence[int]) -> Tensor:
        """Return the hidden states of a batch."""
        self.inputs.fill(input_ids, position_ids, padded)
        run = _Run()
        self._last = weakref.ref(run)
        apply: Any = _Replay.apply
        hidden: Tensor = apply(self, run, *self.trained)
        return hidden


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: _Recording, run: _Run, *parameters: Tensor) -> Tensor:
        recording.replay_forward()
        ctx.recording, ctx.run = recording, run
        return recording.output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled() or ctx.run.is_done:
            raise RuntimeError(
                "A gradient of a gradient, or a second backward pass through one forward pass: what they need is not "
                "there under cuda_graphs. Write --model.cuda_graphs=false for create_graph and retain_graph."
            )
        ctx.run.is_done = True
        ctx.recording.of_output.copy_(gradient)
        ctx.recording.replay_backward()
        # Copies, for the next pass writes there.
        return None, None, *torch._foreach_mul(ctx.recording.of_trained, 1)


def _leaves_of(output: Tensor) -> set[int]:
    """Return the identities of all that a backward pass would bring gradients to."""
    found, seen, nodes = set(), set(), [output.grad_fn]
    while nodes:
        node: Any = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found |= {id(node.variable)} if hasattr(node, "variable") else set()
            nodes += [before for before, _ in node.next_functions]
    return found


def _free_pools() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # of which only graphs could make use


@contextmanager
def _leaves_in_place(module: nn.Module) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Put other leaves, on the same memory, in the places of a module's trained parameters; yield these and those.

    Nobody has a hook or a node of autograd for them: a node that is alive belongs to another stream than a recording's.
    """
    places = [
        (each._parameters, name, parameter)
        for each in module.modules()
        for name, parameter in each._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    trained: list[Tensor] = list({id(parameter): parameter for _, _, parameter in places}.values())
    leaves = {id(parameter): nn.Parameter(parameter.detach()) for parameter in trained}
    for parameters, name, parameter in places:
        parameters[name] = leaves[id(parameter)]
    try:
        yield trained, list(leaves.values())
    finally:
        for parameters, name, parameter in places:
            parameters[name] = parameter


@contextmanager
def _waiting_noticed(near: Tensor) -> Iterator[list[str]]:
    """Yield a list that is filled, at the end, with what waited for the GPU."""
    found: list[str] = []
    if not near.is_cuda:
        yield found
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # an error would be one in other threads too
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    found += [str(each.message) for each in said if _WAITED in str(each.message)]
