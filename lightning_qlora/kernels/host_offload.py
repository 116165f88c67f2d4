"""Tensors that autograd saves, kept out of the GPU's memory: on the host, or formed again.

Hooks of autograd see each tensor that a layer saves for its backward pass. One that has a
:class:`~lightning_qlora.kernels.elementwise.Source` is formed of it again; large ones wait in pinned host memory,
copied there and back while other layers compute.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_qlora.kernels.elementwise import Source, source_of

__all__ = ["HostOffload", "formed_again"]

_PIECE = 16 * 2**20  # bytes of each of the blocks on the host that a tensor is cut into
_LEAST_BYTES = 2 * 2**20  # statistics of attention and adapters' products are less, and not worth a copy


def formed_again(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function that saves, in place of a tensor that can be formed again, what it is formed of."""
    with saved_tensors_hooks(_pack_source, _unpack_source):
        return function(*args)


def _pack_source(tensor: Tensor) -> Tensor | Source:
    return source_of(tensor) or tensor


def _unpack_source(packed: Tensor | Source) -> Tensor:
    return packed.form() if isinstance(packed, Source) else packed


class HostOffload:
    """Calls layers with the large tensors that autograd saves in pinned host memory.

    As much of them as one layer saves stays on the device, besides what is in use. In the forward pass a copy stream
    takes each to the host; the compute stream waits for that copy only when there is more than that, and frees the
    tensor there. Freed on the stream that allocated it, the memory is used again at once; ``record_stream`` would let
    it pile up while the host runs ahead of the device. In the backward pass the tensors before the one that is asked
    for are on their way while it is worked on.

    What several operators save, as views or as it is, is copied once. Parameters stay where they are.

    Args:
        everywhere: Also move tensors that are on no GPU (they are copied, without streams), to test the bookkeeping.
        least_bytes: What is smaller stays.
    """

    def __init__(self, everywhere: bool = False, least_bytes: int = _LEAST_BYTES) -> None:
        self.everywhere = everywhere
        self.least_bytes = least_bytes
        self.moved_bytes = 0
        """Bytes that were ever moved to the host."""
        self._budget = 0
        self._of_layer = 0
        self._leaving: deque[_Moved] = deque()  # still on the device, oldest first
        self._here: weakref.WeakSet[_Moved] = weakref.WeakSet()  # on the device, or on their way to it
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, _Moved] = weakref.WeakKeyDictionary()
        self._last: weakref.ref[_Moved] | None = None
        self._streams: dict[int, torch.cuda.Stream] = {}

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a layer, or what recomputes it."""
        self._of_layer = 0
        with saved_tensors_hooks(self._pack, self._unpack):
            return function(*args)

    def stream(self, gpu: int) -> torch.cuda.Stream:
        """Return the stream of the copies from and to a GPU."""
        if gpu not in self._streams:
            self._streams[gpu] = torch.cuda.Stream(gpu)
        return self._streams[gpu]

    def _pack(self, tensor: Tensor) -> Any:
        source = source_of(tensor)
        if source is not None:
            return source._replace(tensors=[self._keep(each) for each in source.tensors])
        return self._keep(tensor)

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Source):
            return packed._replace(tensors=[self._unpack(each) for each in packed.tensors]).form()
        return self._bring(packed) if isinstance(packed, _View) else packed

    def _keep(self, tensor: Tensor) -> Any:
        if not self._is_worth_it(tensor):
            return tensor
        storage = tensor.untyped_storage()
        moved = self._known.get(storage)
        if moved is None or moved.version != tensor._version or moved.dtype != tensor.dtype:
            moved = self._known[storage] = self._send_away(tensor)
        moved.uses += 1
        return _View(moved, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _is_worth_it(self, tensor: Tensor) -> bool:
        if (
            type(tensor) is not Tensor or not tensor.is_floating_point()
        ):  # parameters, parts of sharded tensors; indices
            return False
        if tensor.nbytes < max(1, self.least_bytes):
            return False
        if not (tensor.device.type in ("cuda", "meta") or self.everywhere):
            return False
        owner = tensor if tensor._base is None else tensor._base
        # Of a slice, all that it is cut from would be moved.
        return not isinstance(owner, nn.Parameter) and tensor.untyped_storage().nbytes() <= 8 * tensor.nbytes

    def _send_away(self, tensor: Tensor) -> _Moved:
        moved = _Moved(self, tensor, self._last)
        self._last = weakref.ref(moved)
        self._leaving.append(moved)
        self._here.add(moved)
        self.moved_bytes += moved.nbytes
        self._of_layer += moved.nbytes
        self._budget = max(self._budget, self._of_layer)
        while self._bytes_here() > self._budget and len(self._leaving) > 1:
            oldest = self._leaving.popleft()
            oldest.leave()
            self._here.discard(oldest)
        return moved

    def _bring(self, view: _View) -> Tensor:
        moved = view.moved
        if moved in self._leaving:  # the backward pass has begun: what has not left need not
            self._leaving.clear()
        flat = moved.arrive()
        if moved.on_device is None:
            self._here.discard(moved)
        else:
            self._here.add(moved)
        self._send_for_those_before(moved)
        return flat.as_strided(view.shape, view.stride, view.offset)

    def _send_for_those_before(self, moved: _Moved) -> None:
        """Begin to bring back what will be asked for next, as much as has its place."""
        budget = self._budget - self._bytes_here()
        while moved.before is not None and (before := moved.before()) is not None:
            moved = before
            if moved.on_device is not None or moved.uses <= 0:  # here, or here before
                continue
            budget -= moved.nbytes
            if budget < 0:
                break
            moved.send_for()
            self._here.add(moved)

    def _bytes_here(self) -> int:
        return sum(moved.nbytes for moved in self._here)


class _View(NamedTuple):
    """A tensor as it was saved: what was moved, and how to look at it."""

    moved: _Moved
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Moved:
    """A storage, on the device, on the host, or on its way."""

    def __init__(self, owner: HostOffload, tensor: Tensor, before: weakref.ref[_Moved] | None) -> None:
        self.owner = owner
        self.before = before
        self.uses = 0
        """How often it was saved, and has not been asked for since."""
        self.device, self.dtype, self.version = tensor.device, tensor.dtype, tensor._version
        self.gpu = tensor.get_device()  # a number: torch takes its time to make one of a device
        self.has_left = False
        self.nbytes = tensor.untyped_storage().nbytes()
        numel = self.nbytes // tensor.itemsize
        self.on_device: Tensor | None = tensor.detach().as_strided((numel,), (1,), 0)
        self.copied: torch.cuda.Event | None = None
        self.host: list[Tensor] | None = None
        if not tensor.is_meta:  # a count of memory
            self.sizes = _pieces(numel, tensor.itemsize)
            options: dict[str, Any] = {"dtype": tensor.dtype, "device": "cpu", "pin_memory": tensor.is_cuda}
            self.host = [torch.empty(size, **options) for size in self.sizes]
            self._copy(self.host, self.on_device.split(self.sizes))

    def _copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        if self.device.type != "cuda":
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)
            return
        stream = self.owner.stream(self.gpu)
        stream.wait_stream(torch.cuda.current_stream(self.gpu))  # source is computed, and target's memory is free
        with torch.cuda.stream(stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
            self.copied = stream.record_event()

    def _wait(self) -> None:
        """Let the compute stream, not the host, wait for the copy."""
        if self.copied is not None:
            torch.cuda.current_stream(self.gpu).wait_event(self.copied)
            self.copied = None

    def leave(self) -> None:
        """Free the device's memory once the copy on the host is complete."""
        self._check()
        self._wait()
        self.on_device, self.has_left = None, True

    def _check(self) -> None:
        """Autograd compares versions only of what it keeps itself."""
        if not self.has_left and self.on_device is not None and self.on_device._version != self.version:
            raise RuntimeError(
                "A tensor that autograd had saved for the backward pass, and that is copied to the host, was written "
                "over by an in-place operation. Write --model.activation_checkpointing=full."
            )

    def send_for(self) -> None:
        """Begin to bring it back, if it has left."""
        if self.on_device is None:
            self.has_left = True
            self.on_device = torch.empty(self.nbytes // self.dtype.itemsize, dtype=self.dtype, device=self.device)
            if self.host is not None:
                self._copy(self.on_device.split(self.sizes), self.host)

    def __del__(self) -> None:
        """Nobody asked for it after all: its memory on the device is not used again before the copy is complete."""
        if self.has_left and self.copied is not None:
            self._wait()

    def arrive(self) -> Tensor:
        """Return it on the device, and keep it there only as long as others will ask for it."""
        self._check()
        self.send_for()
        self._wait()
        tensor = self.on_device
        assert tensor is not None
        self.uses -= 1
        if self.uses <= 0:
            self.on_device = None
        return tensor


def _pieces(numel: int, itemsize: int) -> list[int]:
    """Cut so many elements into pieces of one size and a rest.

    torch takes pinned memory in blocks of powers of two, and keeps each for others of its size: as one block, a tensor
    could take twice what it is. The size is the same for all tensors up to 256 MiB; larger ones are 9 to 16 pieces.
    """
    nbytes = numel * itemsize
    piece = max(_PIECE, (1 << (nbytes - 1).bit_length()) // 16) // itemsize
    whole, rest = divmod(numel, piece)
    return [piece] * whole + [rest] * (rest > 0)
