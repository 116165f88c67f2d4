"""FlexAttention's masks and blocks against attention document by document, on the CPU, where it has a forward pass."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention.flex_attention import create_mask

from lightning_qlora.kernels import attention, flex, self_check
from lightning_qlora.kernels.attention import PackedDocuments, document_attention

CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


@st.composite
def documents(draw):
    lengths = draw(st.lists(st.one_of(st.integers(1, 9), st.integers(100, 420)), min_size=1, max_size=6))
    shared, trunk = [], 0
    for index, length in enumerate(lengths):
        shared.append(draw(st.sampled_from([0, draw(st.integers(1, trunk))])) if index else 0)
        trunk = trunk if shared[-1] else length
    return PackedDocuments(lengths, shared)


def inputs(total, heads, dtype=torch.float32, head_dim=16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, n, total, head_dim, generator=generator, dtype=dtype) for n in heads]


def flex_on_cpu(query, key, value, documents, window, softcap, compiled=False):
    with torch.device("meta"):  # Lightning makes the accelerator the default device while a model is built
        mask = documents.block_mask(window, CPU)
    return flex._call(query, key, value, mask, 0.3, softcap, compiled=compiled)


@settings(max_examples=25, deadline=None)
@given(documents=documents(), window=st.sampled_from([None, 1, 5, 128, 150]))
def test_tokens_see_what_they_should(documents, window):
    total = sum(documents.lengths)
    found = create_mask(documents.block_mask(window, CPU).mask_mod, 1, 1, total, total, device="cpu")[0, 0]
    case = self_check.AttentionCase(CPU, torch.float32, 1, 1, 8, documents.lengths, documents.shared_prompts, window)
    assert torch.equal(found, self_check._allowed(case))


@pytest.mark.parametrize(
    ("window", "softcap", "heads"),
    [(None, None, (2, 2, 2)), (None, 2.0, (4, 2, 2)), (150, None, (4, 2, 2)), (7, 2.0, (2, 2, 2))],
)
def test_it_is_what_documents_one_by_one_are(window, softcap, heads):
    documents = PackedDocuments((130, 20, 300, 1), (0, 40, 0, 299))
    tensors = inputs(sum(documents.lengths), heads)
    options = {"scaling": 0.3, "sliding_window": window, "softcap": softcap, "documents": documents}
    expected, _ = document_attention(nn.Module(), *tensors, None, **options)
    torch.testing.assert_close(flex_on_cpu(*tensors, documents, window, softcap), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(documents=documents(), window=st.sampled_from([None, 1, 5, 128, 150, 256]))
def test_blocks_hold_every_pair_and_whole_ones_nothing_else(documents, window):
    case = self_check.AttentionCase(CPU, torch.float32, 1, 1, 8, documents.lengths, documents.shared_prompts, window)
    allowed = self_check._allowed(case)
    total, size = len(allowed), flex._BLOCK
    num = -(-total // size)
    padded = torch.zeros(num * size, num * size, dtype=torch.bool)
    padded[:total, :total] = allowed
    tiles = padded.view(num, size, num, size).transpose(1, 2)
    some, whole = flex._blocks(documents.lengths, documents.shared_prompts, window)
    assert not (some & whole).any()
    assert not (tiles.any(-1).any(-1) & ~(some | whole)).any()
    assert tiles.all(-1).all(-1)[whole].all()


def test_masks_are_made_once_for_a_batch():
    documents = PackedDocuments((5, 200), (0, 0))
    assert documents.block_mask(None, CPU) is documents.block_mask(None, CPU)
    assert documents.block_mask(4, CPU) is documents.block_mask(4, CPU)
    assert documents.block_mask(4, CPU) is not documents.block_mask(None, CPU)


@pytest.mark.slow
@pytest.mark.parametrize(("window", "softcap"), [(None, 2.0), (150, None)])
def test_compiled_it_is_the_same_and_serves_other_batches(window, softcap):
    for lengths, shared in (((130, 20, 300), (0, 40, 0)), ((64, 7, 200, 9), (0, 0, 0, 100)), ((500, 3), (0, 80))):
        documents = PackedDocuments(lengths, shared)
        tensors = inputs(sum(lengths), (4, 2, 2), torch.float32)
        options = {"scaling": 0.3, "sliding_window": window, "softcap": softcap, "documents": documents}
        expected, _ = document_attention(nn.Module(), *tensors, None, **options)
        with torch.no_grad():
            found = flex_on_cpu(*tensors, documents, window, softcap, compiled=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def on_gpu(monkeypatch):
    """As on a GPU, with the kernel run uncompiled and without gradients."""
    plain, calls = flex._call, []

    def call(*args, compiled):
        calls.append(args[3])
        return plain(*(x.detach() if isinstance(x, torch.Tensor) else x for x in args), compiled=False)

    monkeypatch.setattr(flex, "_call", call)
    monkeypatch.setattr(attention, "on_gpu", lambda tensor: True)
    flex._is_trusted.cache_clear()
    yield calls
    flex._is_trusted.cache_clear()


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"shared_prompts": (0, 3)}, {}], ids=str)
def test_it_takes_what_the_varlen_kernel_does_not(on_gpu, monkeypatch, options):
    monkeypatch.setattr(flex, "find_fault", lambda attend, case: None)
    tensors = [x.requires_grad_() for x in inputs(30, (4, 2, 2), torch.bfloat16)]
    documents = PackedDocuments((10, 20), options.pop("shared_prompts", None))
    found, _ = document_attention(nn.Module(), *tensors, None, documents=documents, **options)
    assert on_gpu == [documents.block_mask(None, CPU)]
    monkeypatch.setattr(attention, "on_gpu", lambda tensor: False)
    expected, _ = document_attention(nn.Module(), *tensors, None, documents=documents, **options)
    torch.testing.assert_close(found, expected.detach(), rtol=2e-2, atol=2e-2)
    assert len(on_gpu) == 1


def test_a_kernel_that_fails_the_comparison_is_not_used_and_said_so_once(on_gpu, caplog):
    tensors = inputs(30, (4, 2, 2), torch.bfloat16)  # the stand-in has no gradients, so the comparison fails
    with caplog.at_level("INFO"):
        for _ in range(2):
            document_attention(nn.Module(), *tensors, None, documents=PackedDocuments((10, 20)), softcap=2.0)
    assert len(on_gpu) == 1  # the comparison itself
    assert sum("FlexAttention is not used" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("options", [{"dtype": torch.float32}, {"head_dim": 8}])
def test_inputs_it_does_not_take_go_one_by_one(on_gpu, options):
    tensors = inputs(30, (4, 2, 2), **{"dtype": torch.bfloat16, **options})
    document_attention(nn.Module(), *tensors, None, documents=PackedDocuments((10, 20)), softcap=2.0)
    assert on_gpu == []


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # torch.compile of flex_attention reads .grad of tensors that are no leaves
@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("shape", [(32, 8, 128), (4, 4, 64), (8, 4, 256)])
def test_the_kernel_itself_passes_the_comparison(shape, softcap, window):
    case = self_check.AttentionCase(
        torch.device("cuda", 0), torch.bfloat16, *shape, shared_prompts=(0, 3, 0, 1), window=window, softcap=softcap
    )
    assert self_check.compare_attention(flex._attend_check(case), case) is None
