import pytest
import torch
from tiny_models import FAMILIES, tiny_config
from transformers import AutoModelForCausalLM

from lightning_qlora.kernels.attention import packed_attention_arguments, use_document_attention


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
