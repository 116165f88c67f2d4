"""From a batch to the hidden states that predict its supervised tokens, and the head that reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel
from torch import Tensor, nn
from typing_extensions import override

from lightning_qlora.kernels.attention import packed_attention_arguments
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
        self.head: Head | None = head if _head_is_plain(base, head) else None

    def __call__(self, batch: SFTBatch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return (N, D) hidden states and the head that maps (n, D) to (n, V) logits.

        Where a family's logits are more than a head of hidden states, these are (N, V) logits and the identity.
        """
        inputs, positions_N = self._inputs(batch), batch["target_positions"]
        if self.head is not None:
            hidden_BLD = base_model(self.model).get_decoder()(**inputs, use_cache=False).last_hidden_state
            return hidden_BLD.flatten(0, 1)[positions_N], self.head
        logits_BLV = self.model(**inputs, use_cache=False).logits
        return logits_BLV.flatten(0, 1)[positions_N], nn.Identity()

    def _inputs(self, batch: SFTBatch) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        if batch["attention_mask"] is not None:
            inputs["attention_mask"] = batch["attention_mask"]
        elif self.isolates_documents:
            shared: Any = batch.get("shared_prompts")  # of a PreferenceBatch
            inputs.update(packed_attention_arguments(batch["input_ids"], batch["document_lengths"], shared))
        elif batch.get("shared_prompts") is not None:
            raise MisconfigurationException(
                f"{type(base_model(self.model)).__name__} runs on an attention of its own, to which answers that share "
                "a prompt would be one text. Write --data.share_prompts=false, or leave attn_implementation out."
            )
        return inputs


@torch.no_grad()
def _head_is_plain(base: Any, head: Head) -> bool:
    """Whether this family's logits are just the head of the decoder's hidden states.

    Some families scale or offset their logits besides. Two tokens through both ways tell, for any family there will be.
    """
    ids_BL = torch.tensor([[0, 1]], device=head.output_embeddings.weight.device)  # type: ignore[arg-type]
    training = base.training
    base.eval()
    try:
        expected = base(input_ids=ids_BL, use_cache=False).logits
        found = head(base.get_decoder()(input_ids=ids_BL, use_cache=False).last_hidden_state)
    finally:
        base.train(training)
    return found.shape == expected.shape and torch.allclose(found.float(), expected.float(), rtol=1e-3, atol=1e-4)
