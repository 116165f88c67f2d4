"""However answers are laid out, a model gives them the same log-probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_tokenizer
from tiny_models import tiny_config
from tiny_pairs import pair_data, write_pairs
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_qlora.data.collators import AnswerKind, Document
from lightning_qlora.data.preference_batching import PreferenceBatching
from lightning_qlora.kernels.attention import packed_attention_arguments, use_document_attention
from lightning_qlora.schema import PreferenceBatch

FAMILIES = ("llama", "gemma3_text")  # the second with a sliding window of 4 tokens


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 10)


def tiny_model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    size = -(-len(tiny_tokenizer()) // 64) * 64
    model = AutoModelForCausalLM.from_config(tiny_config(family, vocab_size=size), dtype=torch.float32).eval()
    assert use_document_attention(model)
    return model


def log_probs(model: PreTrainedModel, batch: PreferenceBatch) -> dict[int, torch.Tensor]:
    """Return the log-probability of each document that is no filler, by its number."""
    inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "position_ids")}
    if batch["attention_mask"] is None:
        shared = batch["shared_prompts"]
        inputs |= packed_attention_arguments(batch["input_ids"], batch["document_lengths"], shared)
    else:
        inputs["attention_mask"] = batch["attention_mask"]
    logits = model(**inputs, use_cache=False).logits.flatten(0, 1)[batch["target_positions"]]
    tokens = logits.log_softmax(-1).gather(1, batch["targets"][:, None])[:, 0]
    sums = torch.zeros(len(batch["row_ids"])).index_add(0, batch["target_documents"], tokens)
    return {row: sums[number] for number, row in enumerate(batch["row_ids"]) if row >= 0}


def gradient(model: PreTrainedModel, found: dict[int, torch.Tensor]) -> torch.Tensor:
    """Of a sum in which every document has a weight of its own."""
    weights = torch.randn(1 + max(found), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    sum(weights[row] * value for row, value in found.items()).backward()  # type: ignore[union-attr]
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("unpaired", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_shared_padded_and_alone_agree(pairs, family, unpaired):
    model = tiny_model(family)
    results = {}
    layouts: dict[str, dict[str, Any]] = {
        "packed": {},
        "shared": {"share_prompts": True},
        "shared and rounded up": {"share_prompts": True, "pad_to_multiple_of": 32},
        "padded": {"packing": False},
    }
    for name, options in layouts.items():
        module = pair_data(pairs, pairs.parent / "cache", unpaired=unpaired, tokens_per_batch=None, **options)
        module.setup("fit")
        found: dict[int, torch.Tensor] = {}
        for batch in module.train_dataloader():
            found |= log_probs(model, batch)
        results[name] = found
    documents, one = module._documents("train"), PreferenceBatching(False, None, 1)
    results["alone"] = {}
    for row in results["packed"]:
        results["alone"] |= log_probs(model, one.collate([documents[row]]))
    assert len(results["alone"]) == (30 if unpaired else 20)
    reference = gradient(model, results["alone"])
    for name, found in results.items():
        assert sorted(found) == sorted(results["alone"]), name
        for row, value in results["alone"].items():
            torch.testing.assert_close(found[row], value, rtol=1e-5, atol=1e-4, msg=f"{name}: {row}")
        if name != "alone":
            torch.testing.assert_close(gradient(model, found), reference, rtol=1e-3, atol=1e-4, msg=name)


def test_layout_of_a_shared_prompt():
    """The example in PreferenceBatch's documentation."""
    prompt, chosen, rejected = [10, 11, 12], [20, 21], [30, 31, 32]
    documents = [Document(*arrays([*prompt, *answer], [[3, 3 + len(answer)]]), row, kind) for row, (answer, kind) in
                 enumerate([(chosen, AnswerKind.CHOSEN), (rejected, AnswerKind.REJECTED)])]  # fmt: skip
    batch = PreferenceBatching(True, 16, 1, share_prompts=True).collate(documents)
    assert batch["input_ids"].tolist() == [[10, 11, 12, 20, 21, 30, 31, 32]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]
    assert batch["document_lengths"] == (5, 3)
    assert batch["shared_prompts"] == (0, 3)
    assert batch["cu_seq_lens"].tolist() == [0, 5, 8]
    assert batch["target_positions"].tolist() == [2, 3, 2, 5, 6]
    assert batch["targets"].tolist() == [20, 21, 30, 31, 32]
    assert batch["labels"].tolist() == [[-100, -100, -100, 20, 21, 30, 31, 32]]
    assert batch["target_documents"].tolist() == [0, 0, 1, 1, 1]
    assert batch["num_targets"] == (2, 3)
    assert (batch["chosen"].tolist(), batch["rejected"].tolist()) == ([0], [1])


def arrays(ids: list[int], spans: list[list[int]]) -> tuple[Any, Any]:
    return np.asarray(ids, dtype=np.int32), np.asarray(spans, dtype=np.int32)


def test_a_filler_holds_no_answer():
    for options in ({}, {"share_prompts": True}):
        batch = PreferenceBatching(True, 16, 1, pad_to_multiple_of=4, **options).filler()
        assert batch["num_targets"] == (0,) * len(batch["document_lengths"])
        for name in ("chosen", "rejected", "mismatched", "targets", "target_documents"):
            assert batch[name].dtype == torch.int64
            assert batch[name].tolist() == []
