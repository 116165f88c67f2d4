"""How much memory a training run takes, by item and at its peak, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

import torch
from peft import PeftModel

from lightning_qlora.accounting import Storage, count_storage, logical_numel, stored_bytes
from lightning_qlora.kernels.checkpointing import OFFLOADING, MixedPlan, needs_host
from lightning_qlora.memory.layers import decoder_layers, embedding_alone, head_alone, layer_kinds, only_layers
from lightning_qlora.memory.optimizer import OptimizerMemory
from lightning_qlora.memory.simulation import PLANS, Device, Plan, StepMemory, simulate_step

__all__ = ["MemoryEstimate", "MemoryModel", "Moment", "Sharding"]

Sharding: TypeAlias = Literal["none", "ddp", "fsdp"]
"""What each rank holds: everything (``none``, one rank), everything and the buckets that gradients are exchanged in
(``ddp``), or its share, with the layers at work whole (``fsdp``)."""

Moment: TypeAlias = Literal["loading", "forward", "head", "backward", "optimizer"]

_LEAST_SIMULATED_TOKENS = 2048  # above the positions of a chunk of the head, so that all grows linearly from here
_LEAST_DOCUMENT = 64
_WORKSPACES = 64 * 2**20  # of cuBLAS on large GPUs: 32 MiB for each thread, one forward and one backward, and stream


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """What one rank takes, in bytes, without the libraries themselves and the gaps between tensors.

    The items do not add up to the peak: not all are there at once.

    Attributes:
        plan: What is kept between forward and backward.
        num_tokens: Tokens of the micro-batch.
        loading: The most while the model is loaded, before anything is trained.
        weights: The frozen weights as they are stored, with the constants that dequantise them, and buffers.
        adapters: The trained parameters.
        gradients: Of the trained parameters; with DDP also the buckets that they are exchanged in.
        optimizer: Its state.
        paged: Optimizer state that the driver moves to the host when the device is full; not part of the peak.
        activations: Kept between forward and backward.
        logits: Of a chunk of supervised tokens, with their gradient, while head and loss are computed.
        scratch: Dequantised weights, recomputed layers and gradients of activations during the backward pass.
        workspaces: What matrix products work in; with CUDA graphs also what these hold of their own: gradients, and the
            last hidden states with theirs.
        host: Activations that wait in host memory.
        peak: The most at any moment.
        moment: When that is.
    """

    plan: Plan | MixedPlan
    num_tokens: int
    loading: int
    weights: int
    adapters: int
    gradients: int
    optimizer: int
    paged: int
    activations: int
    logits: int
    scratch: int
    workspaces: int
    host: int
    peak: int
    moment: Moment


class MemoryModel:
    """Estimates the memory of training steps of one model, for any batch and plan.

    Args:
        model: A skeleton with its adapters.
        optimizer: What the optimizer takes.
        device: Where the run is to be.
        autocast: Dtype of mixed precision; ``None`` for a run without.
        accumulates: Whether gradients of several micro-batches are added up, so that they are there all the time.
        sharding: What each rank holds.
        world_size: Ranks.
        recorded: Whether passes are run by CUDA graphs where they can be.
    """

    def __init__(
        self,
        model: PeftModel,
        optimizer: OptimizerMemory,
        *,
        device: Device = "cuda",
        autocast: torch.dtype | None = torch.bfloat16,
        accumulates: bool = False,
        sharding: Sharding = "none",
        world_size: int = 1,
        recorded: bool = False,
    ) -> None:
        self.model = model
        self.device = device
        self.autocast = autocast
        self.accumulates = accumulates
        self.recorded = recorded and sharding != "fsdp"  # whose passes never are
        self.storages: list[Storage] = count_storage(model)
        self._kinds = layer_kinds(model)
        self._steps: dict[tuple[int, int, int, Plan], _Steps] = {}
        frozen = sum(s.nbytes for s in self.storages if not s.trainable) + sum(b.nbytes for b in model.buffers())
        trained = sum(s.nbytes for s in self.storages if s.trainable)
        share = world_size if sharding == "fsdp" else 1
        constants = _constants(model) if sharding == "fsdp" else 0  # each rank has them all
        divided = frozen - constants
        gathered = _gathered(model, divided + trained) if sharding == "fsdp" else _Gathered(0, 0, 0)
        self.weights = constants + _divide(divided, share) + gathered.whole
        self.gathering = gathered.at_hand
        self.head = gathered.head
        first = _while_loading(model, autocast or torch.float32, self._kinds)
        whole = divided - first.cut if sharding == "fsdp" else frozen
        cut = _divide(first.cut, share) if sharding == "fsdp" else 0
        self.adapters = _divide(trained, share)
        self.loading = constants + whole + cut + first.at_hand + trained
        first_pass = self.weights + self.adapters + max(self.gathering, self.head)
        self.loading = max(self.loading, first_pass)
        self.gradients = _divide(trained, share)
        self.buckets = trained if sharding == "ddp" else 0
        self.optimizer = OptimizerMemory(*(_divide(nbytes, share) for nbytes in optimizer))

    def estimate(
        self,
        num_tokens: int,
        *,
        plan: Plan | MixedPlan = "none",
        document_length: int | None = None,
        num_supervised: int | None = None,
    ) -> MemoryEstimate:
        """Estimate a run whose micro-batches have this many tokens.

        Args:
            num_tokens: Tokens of one micro-batch, padding included.
            plan: What is kept between forward and backward.
            document_length: Of each packed document; ``None`` for one as long as the batch. It matters for families
                whose attention has no fused kernel.
            num_supervised: Tokens that enter the loss; ``None`` for all.

        Raises:
            SimulationError: If the family cannot be simulated.
        """
        length = min(num_tokens, max(_LEAST_DOCUMENT, document_length or num_tokens))
        supervised = num_tokens if num_supervised is None else num_supervised
        if isinstance(plan, MixedPlan):
            lean, rich = (self._step(num_tokens, length, supervised, each) for each in (plan.lean, plan.rich))
            steps = lean.mix(rich, plan.num_lean)
        else:
            steps = self._step(num_tokens, length, supervised, plan)
        step = steps.all_layers
        workspaces = self._workspaces(num_tokens, plan)
        held = self.weights + self.adapters + self.optimizer.state + self.buckets + workspaces
        accumulated = self.gradients if self.accumulates else 0
        of_a_layer = max(accumulated, self.gradients // steps.num_layers)
        first_layer = steps.few_layers.backward
        moments: dict[Moment, int] = {
            "forward": accumulated + max(step.forward, self.gathering),
            "head": accumulated + self.head + step.head,
            "backward": max(of_a_layer + step.backward, self.gradients + first_layer),
            "optimizer": self.gradients + self.optimizer.scratch,
        }
        peaks: dict[Moment, int] = {name: held + nbytes for name, nbytes in moments.items()}
        peaks["loading"] = self.loading
        moment = max(peaks, key=lambda name: peaks[name])
        return MemoryEstimate(
            plan=plan,
            num_tokens=num_tokens,
            loading=self.loading,
            weights=self.weights,
            adapters=self.adapters,
            gradients=self.gradients + self.buckets,
            optimizer=self.optimizer.state,
            paged=self.optimizer.paged,
            activations=step.kept,
            logits=max(0, step.head - step.kept),
            scratch=max(0, step.backward - step.kept),
            workspaces=workspaces,
            host=step.host,
            peak=peaks[moment],
            moment=moment,
        )

    def fitting_plan(
        self,
        num_tokens: int,
        budget: int,
        *,
        plans: Sequence[Plan] = PLANS,
        mixed: bool = False,
        document_length: int | None = None,
        host_budget: int | None = None,
    ) -> MemoryEstimate | None:
        """Return the fastest plan whose peak stays within a budget, or ``None``.

        Args:
            num_tokens: Tokens of one micro-batch.
            budget: In bytes.
            host_budget: For what waits in host memory; ``None`` for any amount.
            plans: What there is to choose from, the fastest first.
            mixed: Whether only as many layers as must follow the first plan that fits, and the others the one before.
            document_length: As for :meth:`estimate`.
        """

        def estimate(plan: Plan | MixedPlan) -> MemoryEstimate:
            return self.estimate(num_tokens, plan=plan, document_length=document_length)

        def fits_in(found: MemoryEstimate) -> bool:
            return found.peak <= budget and (host_budget is None or found.host <= host_budget)

        fits = next((index for index, plan in enumerate(plans) if fits_in(estimate(plan))), None)
        if fits is None or fits == 0 or not mixed:
            return None if fits is None else estimate(plans[fits])
        num_layers = sum(map(len, self._kinds))
        partial = (estimate(MixedPlan(plans[fits], count, plans[fits - 1])) for count in range(1, num_layers))
        return next((found for found in partial if fits_in(found)), None) or estimate(plans[fits])

    def _workspaces(self, num_tokens: int, plan: Plan | MixedPlan) -> int:
        if self.device != "cuda":
            return 0
        if not self.recorded or needs_host(plan):  # such a plan is never recorded
            return _WORKSPACES
        width = int(self.model.get_input_embeddings().weight.shape[-1])
        hidden = num_tokens * width * (self.autocast or torch.float32).itemsize
        return 2 * _WORKSPACES + self.gradients + 2 * hidden

    def _step(self, num_tokens: int, length: int, supervised: int, plan: Plan) -> _Steps:
        """Simulate a batch; many equal documents are extrapolated from fewer."""
        few = max(4, math.ceil(_LEAST_SIMULATED_TOKENS / length))
        documents = num_tokens / length
        if documents <= 2 * few:
            return self._simulate(num_tokens, length, supervised, plan)
        share = supervised / num_tokens
        small = self._simulate(few * length, length, round(few * length * share), plan)
        large = self._simulate(2 * few * length, length, round(2 * few * length * share), plan)
        return small.combine(large, lambda one, two: round(two + (documents - 2 * few) / few * (two - one)))

    def _simulate(self, num_tokens: int, length: int, supervised: int, plan: Plan) -> _Steps:
        key = num_tokens, length, supervised, plan
        if key not in self._steps:
            self._steps[key] = self._simulate_layers(num_tokens, length, supervised, plan)
        return self._steps[key]

    def _simulate_layers(self, num_tokens: int, length: int, supervised: int, plan: Plan) -> _Steps:
        """Simulate one layer of each kind, and one more of each kind that there are more of.

        Of an offloading plan two: what the last layer saved has not left the device yet.
        """
        documents = [length] * (num_tokens // length) + ([num_tokens % length] if num_tokens % length else [])

        def run(indices: list[int]) -> StepMemory:
            with only_layers(self.model, indices):
                return simulate_step(
                    self.model, documents, supervised, plan=plan, device=self.device, dtype=self.autocast
                )

        least = 2 if plan in OFFLOADING else 1
        first = sorted(index for kind in self._kinds for index in kind[:least])
        few = run(first)
        kept = host = 0
        for kind in self._kinds:
            if (alike := len(kind) - least) > 0:
                more = run(sorted([*first, kind[least]]))
                kept += alike * (more.kept - few.kept)
                host += alike * (more.host - few.host)
        num_layers = sum(map(len, self._kinds))
        others = max(1, num_layers - len(first))
        return _Steps(few, few.with_layers(kept, host), kept // others, host // others, num_layers)


@dataclass(frozen=True, slots=True)
class _Steps:
    """A step with few layers of each kind, and with all of them."""

    few_layers: StepMemory
    all_layers: StepMemory
    per_layer: int
    host_per_layer: int
    num_layers: int

    def mix(self, rich: _Steps, num_lean: int) -> _Steps:
        """Return the step whose first layers are as here, and the others as in the next richer plan.

        The backward pass has two moments that can be the largest: at the last layer, with everything kept, and at the
        last of the first layers, when what the others kept is released.
        """
        own, others = (each.all_layers.kept - self.num_layers * each.per_layer for each in (self, rich))
        whole = rich.all_layers.with_layers(
            max(0, own - others) - num_lean * (rich.per_layer - self.per_layer),
            num_lean * (self.host_per_layer - rich.host_per_layer),
        )
        later = self.all_layers.backward - (self.num_layers - num_lean) * self.per_layer
        return replace(self, all_layers=whole._replace(backward=max(whole.backward, later)))

    def combine(self, other: _Steps, function: Callable[[int, int], int]) -> _Steps:
        def each(one: StepMemory, two: StepMemory) -> StepMemory:
            return StepMemory(*map(function, one, two))

        return _Steps(
            each(self.few_layers, other.few_layers),
            each(self.all_layers, other.all_layers),
            function(self.per_layer, other.per_layer),
            function(self.host_per_layer, other.host_per_layer),
            self.num_layers,
        )


def _divide(nbytes: int, ranks: int) -> int:
    return -(nbytes // -ranks)


def _constants(model: PeftModel) -> int:
    """Bytes that dequantise 4-bit weights."""
    return sum(stored_bytes(p) - p.nbytes for p in model.parameters())


class _WhileLoading(NamedTuple):
    """What sharding cuts up while a base is loaded, and what the weight under work takes, in bytes."""

    cut: int
    at_hand: int


def _while_loading(model: PeftModel, dtype: torch.dtype, kinds: Sequence[Sequence[int]]) -> _WhileLoading:
    """The first layer of each kind stays whole; a weight is read in ``dtype``, then a layer is tried out, gathered."""
    layers = [[p for p in layer.parameters() if p.ndim > 1 and not p.requires_grad] for layer in decoder_layers(model)]
    packed = [sum(p.nbytes for p in layer) for layer in layers]
    first = {kind[0] for kind in kinds}
    weight = max(logical_numel(p) * dtype.itemsize + p.nbytes for layer in layers for p in layer)
    return _WhileLoading(sum(n for i, n in enumerate(packed) if i not in first), max(weight, *packed))


class _Gathered(NamedTuple):
    """What sharding holds whole beside a rank's parts, which stay, in bytes.

    Attributes:
        whole: Throughout a step: two layers, and what lies outside the layers and is not gathered for its own use.
        at_hand: When a step begins, besides: no layer yet, but what lies outside, and the embedding where it is
            gathered by itself, twice: as it was received and as it is used. torch lets go of the first only once the
            second is there.
        head: While the loss is computed, besides: the head where it is gathered for that alone, once.
    """

    whole: int
    at_hand: int
    head: int


def _gathered(model: PeftModel, nbytes: int) -> _Gathered:
    """Sort what is cut up, of so many bytes, by when it is whole."""
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in decoder_layers(model)]
    outside = nbytes - sum(layers)
    embedding, head = (
        0 if module is None else sum(p.nbytes for p in module.parameters())
        for module in (embedding_alone(model), head_alone(model))
    )
    kept = outside - embedding - head
    two_layers = sum(sorted(layers)[-2:])
    return _Gathered(kept + two_layers, kept + 2 * embedding - two_layers, head)
