"""When torch's varlen kernel is called, with what, and when it is not: on the CPU with a stand-in that computes it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tiny_models import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_qlora.kernels import self_check, varlen
from lightning_qlora.kernels.attention import (
    PackedDocuments,
    document_attention,
    packed_attention_arguments,
    use_document_attention,
)

LENGTHS = (7, 1, 20, 4)


class StandIn:
    """Flash attention's contract in plain operators, which checks what it is given."""

    def __init__(self):
        self.calls = []
        self.wrong = 0.0

    def attend(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, left, grouped):
        assert query.dtype == key.dtype == value.dtype
        assert query.dtype in (torch.bfloat16, torch.float16)
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        total, heads, head_dim = query.shape
        assert key.shape == value.shape
        assert grouped or key.shape[1] == heads
        offsets, key_offsets = cu_seq_q.tolist(), cu_seq_k.tolist()
        assert (offsets[-1], key_offsets[-1]) == (total, key.shape[0])
        lengths, key_lengths = ([end - start for start, end in pairwise(each)] for each in (offsets, key_offsets))
        assert (max(lengths), max(key_lengths)) == (max_q, max_k)
        assert isinstance(max_q, int)
        self.calls.append((lengths, scale, left))
        scale = head_dim**-0.5 if scale is None else scale
        key, value = (x.float().repeat_interleave(heads // key.shape[1], 1) for x in (key, value))
        parts = []
        for (start, end), (first, last) in zip(pairwise(offsets), pairwise(key_offsets), strict=True):
            scores = torch.einsum("qhd,khd->hqk", query[start:end].float(), key[first:last]) * scale
            index = torch.arange(last - first)
            distance = index[last - first - (end - start) :, None] - index[None, :]  # the queries are the last ones
            allowed = (distance >= 0) & ((left < 0) | (distance <= left))
            weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
            parts.append(torch.einsum("hqk,khd->qhd", weights, value[first:last]))
        return (torch.cat(parts) * (1 + self.wrong)).to(query.dtype)


@pytest.fixture(params=["bare", "2.13", "2.12", "2.10"])
def stand_in(request, monkeypatch):
    """The kernel with the signatures it has had, and without the operator around it."""
    kernel = StandIn()

    def forward(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale,
                window_size_left, window_size_right):  # fmt: skip
        assert (dropout_p, return_debug_mask, window_size_right, is_causal) == (0.0, False, 0, window_size_left < 0)
        ends = cu_seq_q, cu_seq_k, max_q, max_k
        output = kernel.attend(query, key, value, *ends, scale, window_size_left, True)
        return output, query.new_ones(query.shape[:2], dtype=torch.float32).t(), None, None, None

    def backward(grad_out, query, key, value, out, logsumexp, cu_seq_q, cu_seq_k, max_q, max_k, dropout_p, is_causal,
                 rng_state, unused, *, scale, window_size_left, window_size_right):  # fmt: skip
        assert logsumexp.shape == query.shape[1::-1]
        assert rng_state.dtype == torch.uint64
        inputs = [each.detach().requires_grad_() for each in (query, key, value)]
        done = len(kernel.calls)
        with torch.enable_grad():
            ends = cu_seq_q, cu_seq_k, max_q, max_k
            again = kernel.attend(*inputs, *ends, scale, window_size_left, True)
        del kernel.calls[done:]
        assert again.isnan().any() or torch.equal(again, out)
        return torch.autograd.grad(again, inputs, grad_out)

    def newest(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
               window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):  # fmt: skip
        assert window_size[1] == 0, "not causal"
        return kernel.attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size[0], enable_gqa)

    def before(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
               window_size=(-1, -1), seqused_k=None):  # fmt: skip
        assert window_size[1] == 0, "not causal"
        return kernel.attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size[0], True)

    def first(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        assert is_causal
        return kernel.attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, None, -1, True)

    def around(*args, window_size=None, enable_gqa=None, scale=None, **options):
        pytest.fail("the operator was called")

    kernel.version = request.param
    if kernel.version == "bare":
        monkeypatch.setattr(varlen, "_flash_forward", forward)
        monkeypatch.setattr(varlen, "_flash_backward", backward)
    operators = {"2.13": newest, "2.12": before, "2.10": first, "bare": around}
    monkeypatch.setattr(varlen, "varlen_attn", operators[kernel.version])
    monkeypatch.setattr(varlen, "on_gpu", lambda tensor: True)
    clear()
    yield kernel
    clear()


def clear():
    for function in (varlen._parameters, varlen._is_bare_trusted, varlen._is_trusted, varlen._say_once):
        function.cache_clear()


def random_inputs(heads=4, key_heads=2, dtype=torch.bfloat16, head_dim=16):
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    # As attention layers make them: (1, T, heads, head_dim) seen with heads first.
    return [
        torch.randn(1, total, n, head_dim, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for n in (heads, key_heads, key_heads)
    ]


def attend(inputs, **options):
    documents = PackedDocuments(
        LENGTHS,
        options.pop("shared_prompts", None),
        options.pop("starts", varlen.document_offsets(LENGTHS, inputs[0].device)),
        options.pop("keys", None),
    )
    return document_attention(nn.Module(), *inputs, None, documents=documents, **options)[0]


def step_calls(kernel):
    """Calls but for those of the comparison."""
    return [call for call in kernel.calls if call[0] != list(self_check.CHECK_LENGTHS)]


@pytest.mark.parametrize("options", [{}, {"scaling": 0.3}, {"sliding_window": 5}, {"sliding_window": 20}])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
def test_one_call_for_all_documents_computes_what_they_do_one_by_one(stand_in, options, heads):
    inputs = random_inputs(*heads)
    found = attend(inputs, **options)
    gradients = torch.autograd.grad(found.float().square().sum(), inputs)
    calls = step_calls(stand_in)
    if stand_in.version == "2.10" and options.get("sliding_window") == 5:
        assert calls == []
    else:
        scale = options.get("scaling") if stand_in.version != "2.10" else None
        window = options.get("sliding_window") if stand_in.version != "2.10" else None
        assert calls == [(list(LENGTHS), scale, -1 if window is None else window - 1)]
    expected = attend(inputs, **options, starts=None)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    references = torch.autograd.grad(expected.float().square().sum(), inputs)
    for one, two in zip(gradients, references, strict=True):
        torch.testing.assert_close(one, two, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize(
    "options",
    [{"softcap": 2.0}, {"dropout": 0.5}, {"shared_prompts": (0, 3, 0, 2)}, {"starts": None}],
    ids=lambda options: next(iter(options)),
)
def test_what_the_kernel_does_not_compute_is_not_asked_of_it(stand_in, options):
    attend(random_inputs(), **options)
    assert stand_in.calls == []


@pytest.mark.parametrize("window", [None, 4, 9])
@pytest.mark.parametrize("prompts", [(0, 3, 0, 2), (0, 7, 7, 0), (0, 1, 5, 2)])
def test_answers_that_share_a_prompt_see_copies_of_its_keys(stand_in, prompts, window):
    inputs = random_inputs()
    keys = varlen.shared_keys(LENGTHS, prompts, inputs[0].device)
    found = attend(inputs, shared_prompts=prompts, keys=keys, sliding_window=window)
    gradients = torch.autograd.grad(found.float().square().sum(), inputs)
    if not (stand_in.version == "2.10" and window is not None):
        assert len(step_calls(stand_in)) == 1
    expected = attend(inputs, shared_prompts=prompts, starts=None, sliding_window=window)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    references = torch.autograd.grad(expected.float().square().sum(), inputs)
    for one, two in zip(gradients, references, strict=True):
        torch.testing.assert_close(one, two, rtol=5e-2, atol=5e-2)


def test_keys_of_answers_that_share_a_prompt():
    with torch.device("meta"):  # Lightning makes the accelerator the default device while a model is built
        keys = varlen.shared_keys((4, 2, 3, 1, 2), (0, 2, 4, 0, 1), torch.device("cpu"))
    assert keys.tokens.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 0, 1, 2, 3, 6, 7, 8, 9, 9, 10, 11]
    assert keys.starts.tolist() == [0, 4, 8, 15, 16, 19]
    assert (keys.longest, keys.total) == (7, 19)


@pytest.mark.parametrize("shape", [{"dtype": torch.float32}, {"head_dim": 12}, {"head_dim": 264}])
def test_inputs_it_does_not_take_go_one_by_one(stand_in, shape):
    attend(random_inputs(**shape))
    assert stand_in.calls == []


def test_without_a_gpu_or_the_kernel_it_is_not_called(stand_in, monkeypatch):
    monkeypatch.setattr(varlen, "on_gpu", lambda tensor: tensor.is_cuda)
    attend(random_inputs())
    monkeypatch.setattr(varlen, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(varlen, "varlen_attn", None)
    attend(random_inputs())
    assert stand_in.calls == []


@pytest.mark.parametrize("stand_in", ["2.13", "2.12", "2.10"], indirect=True)
@pytest.mark.parametrize("wrong", [0.2, float("nan")])
def test_a_kernel_that_is_off_is_not_used_and_said_so_once(stand_in, wrong, caplog):
    stand_in.wrong = wrong
    inputs = random_inputs()
    with caplog.at_level("INFO"):
        first, second = attend(inputs), attend(inputs)
    assert step_calls(stand_in) == []
    assert torch.equal(first, second)
    assert not first.isnan().any()
    said = [record.getMessage() for record in caplog.records if "varlen" in record.getMessage()]
    assert len(said) == 1
    assert "its output is off" in said[0]


@pytest.mark.parametrize("stand_in", ["bare"], indirect=True)
@pytest.mark.parametrize("fault", ["wrong", "nan", "missing"])
def test_without_its_operator_a_kernel_is_called_where_it_computes_the_same(stand_in, monkeypatch, caplog, fault):
    operator = []

    def newest(*args, scale=None, window_size=None, enable_gqa=None):
        operator.append(args)
        stand_in.wrong = 0.0
        return stand_in.attend(*args, scale, window_size[0], enable_gqa)

    monkeypatch.setattr(varlen, "varlen_attn", newest)
    stand_in.wrong = {"wrong": 0.2, "nan": float("nan"), "missing": 0.0}[fault]
    if fault == "missing":
        monkeypatch.setattr(varlen, "_flash_forward", None)
    inputs = random_inputs()
    with caplog.at_level("INFO"):
        found = attend(inputs)
    assert len(operator) == 2  # compared, and used
    torch.testing.assert_close(found, attend(inputs, starts=None), rtol=2e-2, atol=2e-2)
    assert not caplog.records


@pytest.mark.parametrize("stand_in", ["bare"], indirect=True)
def test_who_looks_at_operators_sees_one(stand_in, monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    called = []

    def newest(*args, scale=None, window_size=None, enable_gqa=None):
        called.append(args)
        return stand_in.attend(*args, scale, window_size[0], enable_gqa)

    monkeypatch.setattr(varlen, "varlen_attn", newest)
    attend(random_inputs())
    assert called == []
    with Look():
        attend(random_inputs())
    assert called


@pytest.mark.parametrize("stand_in", ["2.13", "2.12", "2.10"], indirect=True)
def test_a_kernel_that_fails_is_not_used(stand_in, monkeypatch, caplog):
    def fail(*args, window_size=None, **options):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(varlen, "varlen_attn", fail)
    with caplog.at_level("INFO"):
        assert not attend(random_inputs()).isnan().any()
    assert any("no kernel image" in record.getMessage() for record in caplog.records)


def test_the_comparison_runs_once_and_sees_nothing_of_the_step(stand_in):
    hooked = []

    def note(tensor):
        hooked.append(tensor.shape)
        return tensor

    state = torch.get_rng_state()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.no_grad():
        attend(random_inputs())
        attend(random_inputs())
    assert len(stand_in.calls) - len(step_calls(stand_in)) == 1
    assert len(step_calls(stand_in)) == 2
    assert hooked == []
    assert torch.equal(state, torch.get_rng_state())


def test_batches_beyond_the_index_of_the_backward_pass_go_one_by_one(stand_in, monkeypatch, caplog):
    padded = (sum(LENGTHS) + 128 * len(LENGTHS)) * 4 * 16
    monkeypatch.setattr(varlen, "_INDEX_LIMIT", padded + 1)
    attend(random_inputs())
    assert len(step_calls(stand_in)) == 1
    monkeypatch.setattr(varlen, "_INDEX_LIMIT", padded)
    with caplog.at_level("INFO"):
        attend(random_inputs())
        attend(random_inputs())
    assert len(step_calls(stand_in)) == 1
    assert sum("than the varlen attention kernel can index" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize("stand_in", ["bare", "2.13", "2.12"], indirect=True)  # the first one knew no windows
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_model_calls_it_once_a_layer(stand_in, family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.bfloat16).eval()
    assert use_document_attention(model)
    ids = torch.randint(3, 500, (1, sum(LENGTHS)))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    arguments = packed_attention_arguments(ids, LENGTHS)
    assert arguments["documents"].starts is None  # the CPU has no use for them
    fast = {**arguments, "documents": PackedDocuments(LENGTHS, None, varlen.document_offsets(LENGTHS, ids.device))}
    with torch.no_grad():
        expected = model(input_ids=ids, position_ids=positions, use_cache=False, **arguments).logits
        assert stand_in.calls == []
        found = model(input_ids=ids, position_ids=positions, use_cache=False, **fast).logits
    assert len(step_calls(stand_in)) == 2
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)


def test_offsets():
    with torch.device("meta"):  # Lightning makes the accelerator the default device while a model is built
        offsets = varlen.document_offsets((3, 1, 4), torch.device("cpu"))
    assert offsets.tolist() == [0, 3, 4, 8]
    assert offsets.dtype is torch.int32


def test_the_installed_signature_is_one_that_is_known():
    assert varlen.varlen_attn is not None
    varlen._parameters.cache_clear()
    assert varlen._parameters() >= {"query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "window_size"}


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(32, 8, 128), (4, 4, 64), (8, 4, 256)])
@pytest.mark.parametrize("bare", [False, True])
def test_the_kernel_itself_passes_the_comparison(shape, dtype, windowed, shared, bare):
    case = varlen._case(torch.device("cuda", 0), dtype, *shape, windowed=windowed, shared=shared)
    assert self_check.compare_attention(varlen._attend_check(case, bare), case) is None
