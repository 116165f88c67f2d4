"""Attention that keeps packed documents apart, registered with transformers' ``AttentionInterface``.

A packed batch is one flat row of documents. transformers' own SDPA path isolates them with a dense L x L mask, whose
size grows with the square of the batch; this one attends document by document and needs none: on GPUs all in one call
of torch's varlen flash attention, or of FlexAttention for what that does not compute, elsewhere one after the other. It
is exact: every document sees what it would see alone. Without packing it is ordinary scaled dot-product attention.

Answers to one prompt may share it: then the second is a branch, whose tokens see the prompt and the branch itself, but
not the first answer::

                    keys
                p p p c c r r
    queries  p  x
             p  x x
             p  x x x
    chosen   c  x x x x
             c  x x x x x
    rejected r  x x x     x
             r  x x x     x x
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lightning_qlora.kernels.flex import attend_with_flex, block_mask
from lightning_qlora.kernels.launching import autocast_dtype_of, on_gpu
from lightning_qlora.kernels.varlen import (
    SharedKeys,
    attend_documents,
    attend_in_graph,
    document_offsets,
    fits,
    is_trusted,
    padded_tokens,
    product_dtype,
    shared_keys,
    takes,
)

__all__ = [
    "DOCUMENT_ATTENTION",
    "GRAPH_ATTENTION",
    "PackedDocuments",
    "document_arguments",
    "document_attention",
    "packed_attention_arguments",
    "use_document_attention",
    "use_graph_attention",
]

DOCUMENT_ATTENTION = "lightning_qlora_documents"
"""Name of :func:`document_attention`, which no graph of ``torch.compile`` contains."""
GRAPH_ATTENTION = "lightning_qlora_documents_in_graphs"
"""Name of the same function where graphs may contain it: its varlen kernel takes tensors."""

# Arguments of attention functions that change the result and that this one does not implement.
_UNSUPPORTED_MODEL_TYPES = frozenset({"gpt_oss"})  # attention sinks
_SUPPORTED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


class PackedDocuments:
    """Where the documents of a packed batch lie.

    An object of its own, and no tuple of numbers, so that ``torch.compile`` makes no graph for each batch of them.

    Args:
        lengths: Of the documents, in tokens; they add up to L.
        shared_prompts: For each document how many tokens, at the beginning of the nearest document before it with a 0
            here, it goes on from. ``None`` where all documents stand by themselves.
        starts: (K + 1,) int32 on the device, where documents begin and the last one ends: what torch's varlen kernel
            needs to attend within all documents in one call. Without it they are attended one by one.
        keys: What it needs besides where prompts are shared.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        shared_prompts: Sequence[int] | None = None,
        starts: Tensor | None = None,
        keys: SharedKeys | None = None,
    ) -> None:
        self.lengths = tuple(lengths)
        self.shared_prompts = None if shared_prompts is None else tuple(shared_prompts)
        self.starts = starts
        self.keys = keys
        self.count, self.longest = len(self.lengths), max(self.lengths)
        self.padded = padded_tokens(self.lengths) + (keys.total - sum(self.lengths) if keys is not None else 0)
        self.are_alike = len(set(self.lengths)) == 1 and self.shared_prompts is None
        self._masks: dict[int | None, BlockMask] = {}

    def block_mask(self, window: int | None, device: torch.device) -> BlockMask:
        """Return FlexAttention's mask, which is made once for all layers with this window."""
        if window not in self._masks:
            self._masks[window] = block_mask(self.lengths, self.shared_prompts, window, device)
        return self._masks[window]


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    documents: PackedDocuments | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention in the signature of transformers' ``AttentionInterface``.

    Args:
        module: The attention layer.
        query: (B, heads, L, head_dim).
        key: (B, key-value heads, L', head_dim).
        value: (B, key-value heads, L', head_dim).
        attention_mask: (B, 1, L, L') boolean, true where attention is allowed; ``None`` for causal attention.
            Ignored when ``documents`` are given.
        scaling: Factor on the scores; ``None`` for ``head_dim ** -0.5``.
        dropout: Probability of dropping an attention weight.
        sliding_window: How many positions a token sees, itself included.
        softcap: Bound of the scores, ``softcap * tanh(scores / softcap)`` (Gemma 2).
        documents: Of a packed batch, B = 1.

    Returns:
        (B, L, heads, head_dim) and no attention weights.
    """
    if documents is None:
        is_causal = attention_mask is None and query.shape[2] > 1
        output = _attend(query, key, value, attention_mask, is_causal, scaling, dropout, softcap)
        return output.transpose(1, 2).contiguous(), None
    starts, shared_prompts = documents.starts, documents.shared_prompts
    if on_gpu(query) and documents.are_alike and sliding_window is None and softcap is None:
        return _attend_alike(query, key, value, documents.count, scaling, dropout), None
    is_complete = shared_prompts is None or documents.keys is not None
    if starts is not None and is_complete and softcap is None and not dropout:
        longest, padded, keys = documents.longest, documents.padded, documents.keys
        fast = attend_documents(query, key, value, starts, longest, padded, scaling, sliding_window, keys)
        if fast is not None:
            return fast, None
    if on_gpu(query) and not dropout:
        dtype, masks = product_dtype(query), functools.partial(documents.block_mask, device=query.device)
        flexible = attend_with_flex(query, key, value, masks, dtype, scaling, sliding_window, softcap)
        if flexible is not None:
            return flexible, None
    outputs = []
    lengths = list(documents.lengths)
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    trunk_key, trunk_value = key, value
    for (query_d, key_d, value_d), shared in zip(parts, shared_prompts or (0,) * len(lengths), strict=True):
        if shared:
            first = 0 if sliding_window is None else max(0, shared - sliding_window + 1)  # what the first query sees
            key_d = torch.cat((trunk_key[:, :, first:shared], key_d), dim=2)
            value_d = torch.cat((trunk_value[:, :, first:shared], value_d), dim=2)
        else:
            trunk_key, trunk_value = key_d, value_d
        mask = None
        if sliding_window is not None and key_d.shape[2] > sliding_window:
            mask = _causal_mask(query_d.shape[2], key_d.shape[2], sliding_window, query.device)
        outputs.append(_attend(query_d, key_d, value_d, mask, mask is None, scaling, dropout, softcap))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


# No graph of torch.compile contains it: it would be one for each batch of lengths.
_document_attention_outside_graphs: Callable[..., tuple[Tensor, None]] = torch.compiler.disable(document_attention)


def _graph_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    documents: PackedDocuments | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What :func:`use_graph_attention` puts in place of :func:`document_attention`: in graphs, where a kernel fits."""
    if (
        documents is None
        or documents.starts is None
        or documents.keys is not None
        or dropout
        or not takes(product_dtype(query), query.shape[3])
        or not fits(documents.padded, query.shape[1], query.shape[3])
    ):
        options |= {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, "documents": documents}
        return _document_attention_outside_graphs(module, query, key, value, attention_mask, **options)
    dtype = product_dtype(query)
    found = attend_in_graph(query, key, value, documents.starts, documents.longest, dtype, scaling, sliding_window)
    return found, None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    if softcap is None:
        # CUDA's fused kernels group the heads by themselves; on the CPU that path is slower than repeating them.
        grouped = query.shape[1] != key.shape[1]
        if grouped and not query.is_cuda:
            groups = query.shape[1] // key.shape[1]
            key, value, grouped = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), False
        if is_causal and query.shape[2] != key.shape[2]:
            return _attend_as_branch(query, key, value, scaling, dropout, grouped)
        return functional.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal, scale=scaling, enable_gqa=grouped
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if is_causal:
        mask = _causal_mask(query.shape[2], key.shape[2], key.shape[2], query.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = functional.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout)
    return weights @ value


def _attend_alike(
    query: Tensor, key: Tensor, value: Tensor, num_documents: int, scaling: float | None, dropout: float
) -> Tensor:
    """Attend within documents of one length, which are a batch without padding: torch has faster kernels for these."""
    query, key, value = (x.squeeze(0).unflatten(1, (num_documents, -1)).transpose(0, 1) for x in (query, key, value))
    output = _attend(query, key, value, None, True, scaling, dropout, None)
    return output.transpose(1, 2).flatten(0, 1)[None]


def _attend_as_branch(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float, grouped: bool
) -> Tensor:
    """Causal attention of the last queries; a fused kernel of CUDA aligns them by itself, without a mask."""
    mask: Tensor
    if query.is_cuda:
        mask = causal_lower_right(query.shape[2], key.shape[2])
        dtype = autocast_dtype_of(query)
        if dtype is not None:  # autocast does not see through the bias
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    else:
        mask = _causal_mask(query.shape[2], key.shape[2], key.shape[2], query.device)
    return functional.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling, enable_gqa=grouped)


def _causal_mask(num_queries: int, num_keys: int, window: int, device: torch.device) -> Tensor:
    """(queries, keys), true where one of the last queries may look: not ahead, and less than ``window`` back."""
    position = torch.arange(num_keys, device=device)
    distance = position[num_keys - num_queries :, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def use_document_attention(model: PreTrainedModel) -> bool:
    """Switch a model to :func:`document_attention` where its family allows another attention function.

    Returns:
        Whether it was switched. If not, packed batches must rely on the mask that transformers derives from
        ``position_ids``.
    """
    layer_types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if (
        not model._supports_attention_backend
        or model.config.model_type in _UNSUPPORTED_MODEL_TYPES
        or not _SUPPORTED_LAYER_TYPES.issuperset(layer_types)  # chunked, sparse or recurrent layers
    ):
        return False
    model.set_attn_implementation(DOCUMENT_ATTENTION)
    return True


def use_graph_attention(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Let graphs of ``torch.compile`` contain attention, if torch's varlen kernel does all of it on this device.

    Args:
        model: Switched by :func:`use_document_attention`; on its device.
        dtype: Of the products.

    Returns:
        Whether graphs may contain it.
    """
    config = model.config.get_text_config()
    heads: int = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    windows = {False, getattr(config, "sliding_window", None) is not None}
    if getattr(config, "attn_logit_softcapping", None) is not None or not all(
        is_trusted(model.device, dtype, heads, key_heads, head_dim, windowed) for windowed in windows
    ):
        return False
    model.set_attn_implementation(GRAPH_ATTENTION)
    return True


def packed_attention_arguments(
    input_ids: Tensor, document_lengths: Sequence[int], shared_prompts: Sequence[int] | None = None
) -> dict[str, Tensor | PackedDocuments]:
    """Arguments for a model's forward that isolate packed documents under :func:`document_attention`.

    transformers hands a four-dimensional ``attention_mask`` to the attention function as it is, so an empty one
    keeps it from building the dense mask that nothing here reads.

    Args:
        input_ids: (1, T) token ids.
        document_lengths: Lengths of the packed documents, in tokens.
        shared_prompts: As of :class:`~lightning_qlora.schema.PreferenceBatch`.
    """
    starts = keys = None
    if input_ids.device.type != "cpu":
        starts = document_offsets(document_lengths, input_ids.device)
        if shared_prompts is not None:
            keys = shared_keys(document_lengths, shared_prompts, input_ids.device)
    return document_arguments(input_ids, PackedDocuments(document_lengths, shared_prompts, starts, keys))


def document_arguments(input_ids: Tensor, documents: PackedDocuments) -> dict[str, Tensor | PackedDocuments]:
    """Return :func:`packed_attention_arguments` for documents that are described already."""
    return {"attention_mask": input_ids.new_empty((1, 1, 0, 0)), "documents": documents}


AttentionInterface.register(DOCUMENT_ATTENTION, _document_attention_outside_graphs)
AttentionInterface.register(GRAPH_ATTENTION, _graph_attention)
for _name in (DOCUMENT_ATTENTION, GRAPH_ATTENTION):
    AttentionMaskInterface.register(_name, sdpa_mask)
