import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, tiny_config
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_qlora.kernels.attention import (
    DOCUMENT_ATTENTION,
    PackedDocuments,
    document_attention,
    packed_attention_arguments,
    use_document_attention,
)


def tiny_model(family):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32).eval()


def packed_logits(model, documents):
    ids = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None]
    arguments = packed_attention_arguments(ids, tuple(len(d) for d in documents))
    return model(input_ids=ids, position_ids=positions, use_cache=False, **arguments).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_packed_document_sees_what_it_would_see_alone(family):
    model = tiny_model(family)
    documents = [torch.randint(3, 500, (n,)) for n in (5, 1, 11, 7)]
    with torch.no_grad():
        # The family's own eager attention is the reference, document by document.
        model.set_attn_implementation("eager")
        alone = torch.cat([model(input_ids=d[None], use_cache=False).logits[0] for d in documents])
        assert use_document_attention(model)
        packed = packed_logits(model, documents)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_generation_is_that_of_the_familys_own_attention(family):
    model = tiny_model(family)
    ids = torch.randint(3, 500, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    model.set_attn_implementation("eager")
    expected = model.generate(**arguments)
    use_document_attention(model)
    assert torch.equal(model.generate(**arguments), expected)


def test_packed_position_ids_without_document_lengths_are_isolated_too():
    model = tiny_model("llama")
    use_document_attention(model)
    documents = [torch.randint(3, 500, (n,)) for n in (5, 8)]
    ids = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None]
    with torch.no_grad():
        found = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        torch.testing.assert_close(found, packed_logits(model, documents), rtol=1e-4, atol=1e-5)


def test_gradients_stay_within_their_document():
    model = tiny_model("llama")
    use_document_attention(model)
    embeddings = model.get_input_embeddings()
    documents = [torch.randint(3, 500, (n,)) for n in (6, 6)]
    ids = torch.cat(documents)[None]
    inputs = embeddings(ids).detach().requires_grad_()
    positions = torch.arange(6).repeat(2)[None]
    arguments = packed_attention_arguments(ids, (6, 6))
    logits = model(inputs_embeds=inputs, position_ids=positions, use_cache=False, **arguments).logits
    logits[0, 6:].sum().backward()
    assert inputs.grad[0, :6].abs().max() == 0
    assert inputs.grad[0, 6:].abs().max() > 0


def test_families_with_other_layers_keep_their_own_attention():
    model = tiny_model("llama")
    model.config.layer_types = ["full_attention", "chunked_attention"]
    assert not use_document_attention(model)
    assert model.config._attn_implementation != DOCUMENT_ATTENTION
    model.config.layer_types = ["full_attention", "sliding_attention"]
    assert use_document_attention(model)


# Shared prompts

ROWS = ((6, (5, 4)), (1, (3, 7)), (9, (1, 1)), (4, (2, 6, 5)), (7, (3,)))
"""Tokens of a prompt, and of the answers to it: more and fewer than the sliding windows of 4."""


def tiny_rows(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def tokens(count):
        return torch.randint(3, 500, (count,), generator=generator)

    return [(tokens(prompt), [tokens(n) for n in answers]) for prompt, answers in ROWS]


def shared_inputs(rows):
    """Each prompt once, with the first answer behind it and the others as branches."""
    ids, positions, lengths, shared = [], [], [], []
    for prompt, (first, *others) in rows:
        ids += [prompt, first, *others]
        positions += [torch.arange(len(prompt) + len(first))]
        positions += [torch.arange(len(prompt), len(prompt) + len(other)) for other in others]
        lengths += [len(prompt) + len(first), *(len(other) for other in others)]
        shared += [0, *(len(prompt) for _ in others)]
    ids = torch.cat(ids)[None]
    arguments = packed_attention_arguments(ids, tuple(lengths), tuple(shared))
    return {"input_ids": ids, "position_ids": torch.cat(positions)[None], "use_cache": False, **arguments}


def answer_log_probs_shared(model, rows):
    """The log-probabilities of every answer's tokens, from one pass over shared prompts."""
    logits = model(**shared_inputs(rows)).logits[0].log_softmax(-1)
    found, start = [], 0
    for prompt, answers in rows:
        first = start + len(prompt)
        for number, answer in enumerate(answers):
            begin = first + sum(map(len, answers[:number]))
            predicting = torch.arange(begin - 1, begin + len(answer) - 1)
            predicting[0] = first - 1  # the end of the prompt, for each answer
            found.append(logits[predicting, answer])
        start = first + sum(map(len, answers))
    return found


def answer_log_probs_alone(model, rows):
    found = []
    for prompt, answers in rows:
        for answer in answers:
            logits = model(torch.cat((prompt, answer))[None], use_cache=False).logits[0].log_softmax(-1)
            found.append(logits[len(prompt) - 1 : -1][torch.arange(len(answer)), answer])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_that_share_a_prompt_are_as_likely_as_alone_and_teach_the_same(family):
    model, rows = tiny_model(family), tiny_rows()
    model.set_attn_implementation("eager")  # the family's own attention is the reference
    alone = answer_log_probs_alone(model, rows)
    weights = torch.randn(len(alone), generator=torch.Generator().manual_seed(1))
    sum(w * a.sum() for w, a in zip(weights, alone, strict=True)).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    assert use_document_attention(model)
    shared = answer_log_probs_shared(model, rows)
    torch.testing.assert_close(torch.cat(shared), torch.cat(alone), rtol=1e-4, atol=1e-5)
    sum(w * s.sum() for w, s in zip(weights, shared, strict=True)).backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_answers_that_share_a_prompt_do_not_see_one_another():
    model, rows = tiny_model("llama"), tiny_rows()
    use_document_attention(model)
    inputs = shared_inputs(rows)
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, **inputs).logits
    logits[0, 11:15].sum().backward()  # the second answer of the first row
    reached = embedded.grad[0].abs().amax(-1) > 0
    assert reached[:6].all()  # the prompt
    assert not reached[6:11].any()  # the first answer
    assert reached[11:15].all()
    assert not reached[15:].any()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=3)), min_size=1, max_size=4
    ),
    window=st.none() | st.integers(1, 20),
    softcap=st.sampled_from([None, 2.0]),
    heads=st.sampled_from([(2, 2), (4, 2)]),
)
def test_attention_along_branches_is_that_of_the_mask(rows, window, softcap, heads):
    """Against one softmax over the whole batch under a mask that says for each pair of tokens what sees what."""
    owner, position, lengths, shared = [], [], [], []  # owner: (row, answer), with -1 for the prompt
    for number, (prompt, answers) in enumerate(rows):
        for index, answer in enumerate(answers):
            if index == 0:
                owner += [(number, -1)] * prompt
                position += range(prompt)
            owner += [(number, index)] * answer
            position += range(prompt, prompt + answer)
            lengths.append(answer + (prompt if index == 0 else 0))
            shared.append(prompt if index else 0)
    mask = torch.tensor(
        [
            [
                key[0] == query[0] and key[1] in (-1, query[1]) and 0 <= position[i] - position[j] < (window or 1000)
                for j, key in enumerate(owner)
            ]
            for i, query in enumerate(owner)
        ]
    )
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads[0], len(owner), 8, generator=generator, dtype=torch.float64)
    key, value = (torch.randn(1, heads[1], len(owner), 8, generator=generator, dtype=torch.float64) for _ in range(2))
    found, _ = document_attention(
        nn.Module(), query, key, value, None, sliding_window=window, softcap=softcap,
        documents=PackedDocuments(lengths, shared),
    )  # fmt: skip
    key, value = (x.repeat_interleave(heads[0] // heads[1], 1) for x in (key, value))
    scores = query @ key.mT * 8**-0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_branches_on_the_gpu(dtype, heads):
    """The fused kernel that needs no mask, beside the CPU in float64."""
    lengths, shared = (300, 40, 7, 64, 129), (0, 200, 200, 0, 50)
    generator = torch.Generator().manual_seed(0)
    cpu = [
        torch.randn(1, n, sum(lengths), 64, generator=generator).to(dtype).double().requires_grad_()
        for n in (heads[0], heads[1], heads[1])
    ]
    gpu = [x.detach().to("cuda", dtype).requires_grad_() for x in cpu]
    documents = PackedDocuments(lengths, shared)
    expected = document_attention(nn.Module(), *cpu, None, documents=documents)[0]
    found = document_attention(nn.Module(), *gpu, None, documents=documents)[0]
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(found.double().cpu(), expected, **tolerance)
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    (expected * weights).sum().backward()
    (found * weights.to("cuda", dtype)).sum().backward()
    for on_gpu, on_cpu in zip(gpu, cpu, strict=True):
        torch.testing.assert_close(on_gpu.grad.double().cpu(), on_cpu.grad, **{**tolerance, "atol": 5e-2})
