"""From a batch to the hidden states that predict its supervised tokens, and the head that reads them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_qlora.kernels.attention import PackedDocuments, document_arguments, packed_attention_arguments
from lightning_qlora.kernels.checkpointing import MixedPlan, Plan, needs_host
from lightning_qlora.kernels.graphs import DecoderGraphs, Recorder, record_on_gpu
from lightning_qlora.kernels.host_pace import HostPace
from lightning_qlora.kernels.launching import autocast_dtype_of
from lightning_qlora.memory import free_memory
from lightning_qlora.model import base_model
from lightning_qlora.schema import SFTBatch

__all__ = ["Head", "SupervisedForward"]


class Head(nn.Module):
    """The output embedding with the model's own softcap, as one function from hidden states to logits."""

    def __init__(self, output_embeddings: nn.Module, softcap: float | None) -> None:
        super().__init__()
        self.output_embeddings = output_embeddings
        self.softcap = softcap

    @override
    def forward(self, hidden_ND: Tensor) -> Tensor:
        logits_NV: Tensor = self.output_embeddings(hidden_ND)
        return logits_NV if self.softcap is None else self.softcap * torch.tanh(logits_NV / self.softcap)


class SupervisedForward:
    """Runs a model on a batch as far as the positions that predict supervised tokens.

    It is no ``nn.Module``, so that the parameters it refers to are not registered a second time.

    Args:
        model: The model with adapters; not wrapped by a strategy yet.
        isolates_documents: Whether its attention keeps packed documents apart by their lengths, without a mask.
    """

    def __init__(self, model: PeftModel, isolates_documents: bool) -> None:
        self.model = model
        self.isolates_documents = isolates_documents
        base = base_model(model)
        head = Head(base.get_output_embeddings(), getattr(base.config, "final_logit_softcapping", None))
        is_plain, self.keeps_documents_apart = _probe(base, head, isolates_documents)
        self.head: Head | None = head if is_plain else None
        self.graphs: DecoderGraphs | None = None
        self._made_room = False

    def __call__(self, batch: SFTBatch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return (N, D) hidden states and the head that maps (n, D) to (n, V) logits.

        Where a family's logits are more than a head of hidden states, these are (N, V) logits and the identity.
        """
        positions_N = batch["target_positions"]
        hidden_BLD = self._replay(batch)
        if hidden_BLD is not None and self.head is not None:
            return hidden_BLD.flatten(0, 1)[positions_N], self.head
        inputs = self._inputs(batch)
        if self.head is not None:
            base = base_model(self.model)
            hidden_BLD = _call_through(base, base.get_decoder(), **inputs, use_cache=False).last_hidden_state
            return hidden_BLD.flatten(0, 1)[positions_N], self.head
        logits_BLV = self.model(**inputs, use_cache=False).logits
        return logits_BLV.flatten(0, 1)[positions_N], nn.Identity()

    def record(
        self,
        wanted: bool | Literal["auto"],
        plan: Plan | MixedPlan | None,
        *,
        is_compiled: bool = False,
        most_tokens: int | None = None,
        recorder: Callable[[], Recorder] | None = None,
    ) -> None:
        """Run packed batches in training by CUDA graphs from now on, where that can be; forget those there are.

        Args:
            wanted: ``auto`` for only where it pays, since the host is what is slow, and costs nothing that somebody
                could miss: memory, where a step takes more than half of it; results that are the same to the last bit,
                where algorithms are to be deterministic. With ``True`` it is said what stands in the way.
            plan: What layers keep for the backward pass.
            is_compiled: Whether they are run by ``torch.compile``.
            most_tokens: Of any batch, if that is known.
            recorder: As of :class:`~lightning_qlora.kernels.graphs.DecoderGraphs`; ``None`` for CUDA graphs.
        """
        self.graphs, self._made_room = None, False
        if wanted is False:
            return
        base = base_model(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        obstacles = {
            "there are none on a CPU": recorder is None and base.device.type != "cuda",
            f"{type(base).__name__} is not all attention": self.head is None or not self.keeps_documents_apart,
            "attn_implementation has other kernels": not self.isolates_documents,
            "activation_checkpointing keeps tensors in host memory": needs_host(plan),
            "compile_layers is on": is_compiled,
            "the model is in parts": any(isinstance(p, DTensor) for p in trained),
            "dropout draws random numbers": _draws(self.model),
            "algorithms are to be deterministic": torch.are_deterministic_algorithms_enabled() and wanted == "auto",
        }
        found = [reason for reason, is_there in obstacles.items() if is_there]
        if not found:
            self.graphs = DecoderGraphs(
                self._decode,
                base.get_decoder(),
                outer=[base],
                recorder=recorder or record_on_gpu,
                obstacle=functools.partial(_obstacle, may_fill_memory=wanted is True),
                state=functools.partial(_state, self.model, _numbers(self.model), next(base.parameters())),
                pace=HostPace if wanted == "auto" and recorder is None else None,
                tells=wanted is True,
                most_tokens=most_tokens,
            )
        elif wanted is True:
            rank_zero_info(f"cuda_graphs: not used, {found[0]}.")

    def make_room(self) -> None:
        """Let go of recordings once, before something takes memory of which nobody knows how much: then it is known."""
        if self.graphs is not None and not self._made_room:
            self._made_room = True
            self.graphs.release()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this object alone, for copies."""
        return {**vars(self), "graphs": None}

    def _decode(self, input_ids: Tensor, position_ids: Tensor, documents: PackedDocuments) -> Tensor:
        arguments = document_arguments(input_ids, documents)
        decoder = base_model(self.model).get_decoder()
        hidden_BLD: Tensor = decoder(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, **arguments
        ).last_hidden_state
        return hidden_BLD

    def _replay(self, batch: SFTBatch) -> Tensor | None:
        """Return (1, T', D) hidden states from a graph, if there is one for such a batch."""
        if self.graphs is None or not self.model.training:
            return None
        if batch["attention_mask"] is not None or cast(Any, batch.get("shared_prompts")) is not None:
            return None
        return self.graphs(batch["input_ids"], batch["position_ids"], batch["document_lengths"])

    def _inputs(self, batch: SFTBatch) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        if batch["attention_mask"] is not None:
            return inputs | {"attention_mask": batch["attention_mask"]}
        name, shared = type(base_model(self.model)).__name__, cast(Any, batch.get("shared_prompts"))
        if len(batch["document_lengths"]) > 1 and not self.keeps_documents_apart:
            raise MisconfigurationException(
                f"In {name} packed documents would read one another: its layers carry more than attention from token "
                "to token, or its attn_implementation ignores where documents begin. Write --data.packing=false."
            )
        if self.isolates_documents:
            return inputs | packed_attention_arguments(batch["input_ids"], batch["document_lengths"], shared)
        if shared is not None:
            raise MisconfigurationException(
                f"{name} runs on an attention of its own, to which answers that share a prompt would be one text. "
                "Write --data.share_prompts=false, or leave attn_implementation out."
            )
        return inputs


def _draws(model: nn.Module) -> bool:
    """Whether dropout is to be seen anywhere in a model."""
    attributes = (value for module in model.modules() for name, value in vars(module).items() if "dropout" in name)
    layers = (module.p for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd))
    return any(value > 0 for value in (*attributes, *layers) if isinstance(value, float))


def _numbers(model: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Return where modules keep numbers and switches: in which attributes, under which name."""
    return [
        (vars(module), name)
        for module in model.modules()
        for name, value in vars(module).items()
        if name == "scaling" or (isinstance(value, bool | float) and name != "training")
    ]


def _state(model: PeftModel, numbers: list[tuple[dict[str, Any], str]], near: Tensor) -> object:
    """Return what the code of a model decides by, and what it computes in."""
    values = [attributes.get(name) for attributes, name in numbers]
    plain = [tuple(value.values()) if isinstance(value, dict) else value for value in values]
    return model.active_adapters, plain, autocast_dtype_of(near)


def _obstacle(*, may_fill_memory: bool) -> str | None:
    """Return what speaks against recording now, whatever the model."""
    if torch.is_anomaly_enabled():
        return "detect_anomaly looks at every operator"
    if not may_fill_memory and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        if 2 * torch.cuda.max_memory_allocated() > free_memory(device) + torch.cuda.memory_reserved():
            return "a step takes more than half of the memory"
    return None


def _call_through(outer: nn.Module, inner: Callable[..., Any], **inputs: Any) -> Any:
    """Call a part of a module in place of its forward, so that the hooks of the whole run around it.

    A strategy that shards the model gathers in such hooks what lies outside of its layers, such as the last norm.
    """
    before = vars(outer).get("forward")  # some libraries put one on the instance
    outer.forward = lambda **inputs: inner(**inputs)  # a module would become a child of that name
    try:
        return outer(**inputs)
    finally:
        if before is None:
            del outer.forward
        else:
            outer.forward = before


@torch.no_grad()
def _probe(base: Any, head: Head, isolates_documents: bool) -> tuple[bool, bool]:
    """Find out by a document of four tokens, for any family there will be, what its forward may be replaced by.

    Returns:
        Whether its logits are just the head of the decoder's hidden states: some families scale or offset them
        besides. And whether a document comes out the same behind another one as before it: attention sees to that by
        the lengths or the positions it is given; recurrent and convolutional layers (Mamba, LFM2, ...) go on over the
        border.
    """
    # No two tokens are the same: of one that pads, whose embedding may be zero, layers carry nothing over the border.
    ids_BL = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]], device=head.output_embeddings.weight.device)  # type: ignore[arg-type]
    arguments: dict[str, Any] = {"position_ids": ids_BL.new_tensor([[0, 1, 2, 3, 0, 1, 2, 3]]), "use_cache": False}
    if isolates_documents:
        arguments |= packed_attention_arguments(ids_BL, (4, 4))
    training = base.training
    base.eval()
    try:
        first = base(input_ids=ids_BL, **arguments).logits
        by_head = head(base.get_decoder()(input_ids=ids_BL, **arguments).last_hidden_state)
        # The batch has the same shape, so that a deep model's rounding is the same too.
        second = base(input_ids=ids_BL.roll(4, 1), **arguments).logits
        expected, found = first[:, :4].float(), second[:, 4:].float()
        distance = math.inf if base._is_stateful else float((found - expected).norm())
    finally:
        base.train(training)
    is_plain = by_head.shape == first.shape and torch.allclose(by_head.float(), first.float(), rtol=1e-3, atol=1e-4)
    tolerance = 1e-4 if base.dtype.itemsize >= 4 else 3e-2
    return is_plain, distance <= tolerance * float(expected.norm())
