"""A decoder's forward and backward pass as one launch each: CUDA graphs.

A step is thousands of kernels. Where they are small, as in a small model or a batch of few tokens, the GPU is done with
one before the host has launched the next. A CUDA graph is recorded once and launched as a whole, but with the very
addresses and sizes that it was recorded with: so batches are padded to one size, by documents of padding that nobody
looks at, and what is different in each of them, the tokens and where documents begin, is copied to where the graph
reads it.

What decides by numbers of the batch on the host cannot be recorded. So a batch is run in the form of the recording
first, kernel by kernel, where waiting for the GPU is an error and the lengths of documents are not to be had; what
fails there, or draws random numbers, is never recorded.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_qlora.kernels.attention import PackedDocuments
from lightning_qlora.kernels.checkpointing import random_state_left_alone
from lightning_qlora.kernels.launching import autocast_dtype_of
from lightning_qlora.kernels.self_check import first_line
from lightning_qlora.kernels.varlen import document_offsets

__all__ = ["DecoderGraphs", "Form", "Recorder", "record_on_gpu"]

_TOKENS = 128  # sizes are rounded up to multiples of these
_DOCUMENTS = 16
_RECORDINGS = 8  # before they have to pay
_BATCHES_EACH = 100  # that a further one has to pay in

Decoder: TypeAlias = Callable[[Tensor, Tensor, PackedDocuments], Tensor]
"""From (1, T) token ids, (1, T) positions and the documents to (1, T, D) hidden states."""
Recorder: TypeAlias = Callable[[Callable[[], Sequence[Tensor | None]]], tuple[Callable[[], None], list[Tensor | None]]]
"""Runs some work once; returns what runs it again, and the tensors that it writes each time."""


def record_on_gpu() -> Recorder:
    """Return a recorder of CUDA graphs that share their memory."""
    pool = torch.cuda.graph_pool_handle()

    def record(work: Callable[[], Sequence[Tensor | None]]) -> tuple[Callable[[], None], list[Tensor | None]]:
        graph = torch.cuda.CUDAGraph()
        # Threads that bring batches or watch over ranks may ask the GPU for things meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            found = work()
        return graph.replay, list(found)

    return record


class Form(NamedTuple):
    """The size of the batches that a recording takes.

    Attributes:
        tokens: Of a batch with its padding.
        documents: Of the same; some may be empty.
        longest: The most tokens of a document.
        are_alike: Whether all are of that length, so that attention sees a batch without padding.
    """

    tokens: int
    documents: int
    longest: int
    are_alike: bool

    @classmethod
    def around(cls, lengths: Sequence[int], before: Form | None = None, most_tokens: int | None = None) -> Form:
        """Return one for documents of these lengths and somewhat larger ones; not less than another was made for.

        Only what was all of one length so far is recorded as such, where it is that again.

        Args:
            lengths: Of a batch's documents.
            before: What they did not fit.
            most_tokens: Of any batch, if that is known.
        """
        total = sum(lengths)
        if len(set(lengths)) == 1 and (before is None or before.are_alike):
            return cls(total, len(lengths), lengths[0], True)
        tokens, longest = _up(total, _TOKENS), 1 << (max(lengths) - 1).bit_length()
        if most_tokens is not None and total <= most_tokens < 2 * total:
            tokens = most_tokens
        documents = 2 * len(lengths)
        if before is not None:
            tokens, longest = max(tokens, before.tokens), max(longest, before.longest)
            documents = max(documents, before.documents - (not before.are_alike))
        longest = min(longest, tokens)
        # One more, so that they are never all of one length, and there is always one to put padding in.
        return cls(tokens, _up(max(documents, -(-tokens // longest)) + 1, _DOCUMENTS), longest, False)

    def padded(self, lengths: Sequence[int]) -> list[int] | None:
        """Return the lengths with those of documents of padding behind them, or ``None`` where they do not fit."""
        if self.are_alike:
            fits = len(lengths) <= self.documents and set(lengths) == {self.longest}
            return [self.longest] * self.documents if fits else None
        rest, free = self.tokens - sum(lengths), self.documents - len(lengths)
        if rest < 0 or free < 0 or max(lengths) > self.longest or rest > free * self.longest:
            return None
        if not rest:
            return [*lengths, *([0] * free)]
        each = -(-rest // free)  # of equal length, for the sake of attention
        padding = [each] * (rest // each) + [rest % each]
        return [*lengths, *padding, *([0] * free)][: self.documents]

    def largest(self) -> list[int]:
        """Return lengths that are as large as can be."""
        if self.are_alike:
            return [self.longest] * self.documents
        found = self.padded([self.longest])
        assert found is not None, f"a form has room for its tokens: {self}"
        return found


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class _Inputs:
    """Where a graph reads its batch; padding is tokens of the first one, or whatever was there since.

    Args:
        form: Of the recording.
        input_ids: (1, T) of a batch.
    """

    def __init__(self, form: Form, input_ids: Tensor) -> None:
        self.input_ids = input_ids.repeat(1, -(-form.tokens // input_ids.shape[1]))[:, : form.tokens].contiguous()
        self.position_ids = torch.zeros_like(self.input_ids)
        self.starts = input_ids.new_zeros(form.documents + 1, dtype=torch.int32)
        self.documents = PackedDocuments(form.largest(), starts=self.starts)
        del self.documents.lengths  # they are other ones in each batch: whoever asks for them cannot be recorded

    def fill(self, input_ids: Tensor, position_ids: Tensor, padded: Sequence[int]) -> None:
        """Write a batch."""
        tokens = input_ids.shape[1]
        self.input_ids[:, :tokens].copy_(input_ids)
        self.position_ids[:, :tokens].copy_(position_ids)
        self.starts.copy_(document_offsets(padded, self.starts.device))

    def __iter__(self) -> Iterator[Any]:
        return iter((self.input_ids, self.position_ids, self.documents))


class DecoderGraphs:
    """Runs a decoder in training by graphs, which it records as batches come.

    The first batch of a size runs as it is, the second in the form of a recording, and with the third it is recorded.
    A batch that does not fit lets go of the recording, whose memory it needs, and begins a larger one.

    Args:
        decoder: What is recorded.
        parameters: Of the decoder.
        recorder: Makes what records; CUDA graphs.
        obstacle: Says what speaks against recording, just before it; ``None`` where nothing does.
        tells: Whether it is said that, and why, nothing is recorded.
        most_tokens: Of any batch, if that is known.
    """

    def __init__(
        self,
        decoder: Decoder,
        parameters: Iterable[Tensor],
        recorder: Callable[[], Recorder] = record_on_gpu,
        obstacle: Callable[[], str | None] = lambda: None,
        tells: bool = True,
        most_tokens: int | None = None,
    ) -> None:
        self.decoder = decoder
        self.parameters = list(parameters)
        self.recorder = recorder
        self.obstacle = obstacle
        self.tells = tells
        self.most_tokens = most_tokens
        self.refusal: str | None = None
        """Why nothing is recorded any more."""
        self.replays = 0
        """How many batches were run by a recording."""
        self._form: Form | None = None
        self._inputs: _Inputs | None = None  # after a rehearsal
        self._recording: _Recording | None = None
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
        padded = None if self._form is None else self._form.padded(lengths)
        if padded is None:
            self.release()
            self._form = Form.around(lengths, self._form, self.most_tokens)
            return None
        if self._recording is not None and self._recording.is_stale():
            self.release()
        batch = input_ids, position_ids, padded
        if self._inputs is None:
            return self._rehearse(*batch)
        if self._recording is None and not self._record():
            return None
        assert self._recording is not None
        if self._recording.is_in_use():
            return None
        self.replays += 1
        return self._recording.run(*batch)

    def release(self) -> None:
        """Let go of the recording and its memory."""
        had_one = self._recording is not None
        self._recording = self._inputs = None
        if had_one and torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # of which only graphs could make use

    def _rehearse(self, *batch: Any) -> Tensor | None:
        """Run a batch as it would be recorded."""
        assert self._form is not None
        inputs = _Inputs(self._form, batch[0])
        inputs.fill(*batch)
        before = _random_states(inputs.starts)
        try:
            with _waiting_refused(inputs.starts):
                hidden = self.decoder(*inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # models decide by numbers in many ways
            self._refuse(f"the model cannot be recorded: {first_line(error)}")
            return None
        if not all(map(torch.equal, before, _random_states(inputs.starts))):
            self._refuse("the model draws random numbers")
        self._inputs = inputs
        return hidden

    def _record(self) -> bool:
        assert self._form is not None
        assert self._inputs is not None
        reason = self.obstacle()
        if self._recordings >= _RECORDINGS + self._batches // _BATCHES_EACH:
            reason = "batches differ too much in size"
        if reason is not None:
            self._refuse(reason)
            return False
        try:
            self._recording = _Recording(self.decoder, self.parameters, self._inputs, self.recorder())
        except Exception as error:  # for want of memory, or since a model does what a driver does not record
            self._refuse(f"recording failed: {first_line(error)}")
            return False
        if not self._recordings:
            rank_zero_info(f"cuda_graphs: passes of up to {self._form.tokens:,} tokens are launched as a whole.")
        self._recordings += 1
        return True

    def _refuse(self, reason: str) -> None:
        self.release()
        self.refusal = reason
        if self.tells:
            rank_zero_info(f"cuda_graphs: not used, {reason}.")


class _Run:
    """One use of a recording, from its forward pass to its backward pass."""

    is_done = False


class _Recording:
    """A decoder's forward and backward pass, recorded for batches of a form."""

    def __init__(self, decoder: Decoder, parameters: list[Tensor], inputs: _Inputs, record: Recorder) -> None:
        self.decoder, self.inputs = decoder, inputs
        self.all_parameters = parameters
        self.parameters = [each for each in parameters if each.requires_grad]
        self.places = self._places()
        self._hidden: Tensor | None = None
        self._last: weakref.ref[_Run] | None = None  # what a backward pass may come for
        self.replay_forward, (output,) = record(self._forward)
        assert output is not None
        self.output = output
        self.of_output = torch.zeros_like(output)
        self.replay_backward, self.of_parameters = record(self._backward)

    def _forward(self) -> list[Tensor | None]:
        near = self.inputs.starts
        dtype = autocast_dtype_of(near)
        # autocast would hand out casts that it made before, and keep some of the recording's.
        autocast = torch.autocast(near.device.type, dtype, enabled=dtype is not None, cache_enabled=False)
        with torch.enable_grad(), autocast, random_state_left_alone():
            self._hidden = self.decoder(*self.inputs)
        return [self._hidden.detach()]

    def _backward(self) -> Sequence[Tensor | None]:
        hidden, self._hidden = self._hidden, None
        assert hidden is not None
        return torch.autograd.grad(hidden, self.parameters, self.of_output, allow_unused=True)

    def is_stale(self) -> bool:
        """Whether a parameter is elsewhere than when it was recorded, or others are trained."""
        return self._places() != self.places

    def _places(self) -> list[int]:
        return [each.data_ptr() for each in self.all_parameters if each.requires_grad]

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
        hidden: Tensor = apply(self, run, *self.parameters)
        return hidden


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: _Recording, run: _Run, *parameters: Tensor) -> Tensor:
        recording.replay_forward()
        ctx.recording, ctx.run = recording, run
        return recording.output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        if ctx.run.is_done:
            raise RuntimeError(
                "A second backward pass through one forward pass: under cuda_graphs what it needs has been written "
                "over. Write --model.cuda_graphs=false for retain_graph."
            )
        ctx.run.is_done = True
        ctx.recording.of_output.copy_(gradient)
        ctx.recording.replay_backward()
        return None, None, *ctx.recording.of_parameters


@contextmanager
def _waiting_refused(near: Tensor) -> Iterator[None]:
    """Let what would wait for the GPU fail."""
    if not near.is_cuda:
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not find all of them yet
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _random_states(near: Tensor) -> list[Tensor]:
    """Return the state of the generators that a model may draw from, as they are on the host."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(near.device)] if near.is_cuda else [])]
