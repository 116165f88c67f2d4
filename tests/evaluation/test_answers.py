from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from peft import LoraConfig
from tiny import tiny_tokenizer
from tiny_models import save_tiny_model

from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.evaluation import (
    Question,
    adapters_off,
    answer_questions,
    encode_prompts,
    encode_references,
    evaluation_mode,
    generate_answers,
    reference_losses,
    stop_tokens,
)
from lightning_qlora.model import attach_adapters, load_base_model
from lightning_qlora.schema import IGNORE_INDEX, Message, Origin

PROMPTS = (
    "Hi",
    "What is the capital of France?",
    "Please write a function that adds two numbers, then explain.",
    "0 1 2",
)


@pytest.fixture(scope="module")
def template():
    return ChatTemplate(tiny_tokenizer("chatml"))


@pytest.fixture(scope="module")
def folder(template, tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"), tokenizer=template.tokenizer)


@pytest.fixture
def model(folder):
    """A 4-bit base with adapters that have learned something."""
    model = attach_adapters(load_base_model(folder), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def ask(*prompts, reference=None):
    return [
        Question(str(i), (Message("user", prompt),), Origin("q.jsonl", i), reference)
        for i, prompt in enumerate(prompts, start=1)
    ]


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_batched_answers_are_those_of_one_question_at_a_time(model, template, batch_size):
    alone = generate_answers(model, template, ask(*PROMPTS), batch_size=1, max_new_tokens=12)
    together = generate_answers(model, template, ask(*PROMPTS), batch_size=batch_size, max_new_tokens=12)

    assert together == alone
    assert [answer.question_id for answer in together] == ["1", "2", "3", "4"]
    assert len({answer.text for answer in together}) > 1


def test_reference_loss_is_that_of_the_answer_and_its_terminator(model, template):
    questions = ask(*PROMPTS, reference="The capital of France is Paris.") + ask("unanswered")

    *losses, nothing = reference_losses(model, template, questions, batch_size=3)

    assert nothing is None
    model.eval()
    tokenizer = template.tokenizer
    for question, loss in zip(questions, losses, strict=False):
        answer = tokenizer(question.reference + tokenizer.eos_token, add_special_tokens=False).input_ids
        context = encode_prompts(template, [question])[0]
        scaffold = encode_references(template, [question])[0][0][len(context) : -len(answer)]
        ids = torch.tensor([[*context, *scaffold, *answer]])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
        expected = -sum(log_probs[-len(answer) - 1 + i, token] for i, token in enumerate(answer))
        assert loss.num_tokens == len(answer)
        assert loss.nll_sum == pytest.approx(float(expected), rel=1e-4)


def test_only_the_reference_is_labelled_in_a_conversation(template):
    turns = (Message("user", "Hi"), Message("assistant", "Hello!"), Message("user", "How are you?"))
    question = Question("1", turns, Origin("q.jsonl", 1), "I'm fine.")

    ((ids, labels),) = encode_references(template, [question])

    labelled = [token for token in labels if token != IGNORE_INDEX]
    assert template.tokenizer.decode(labelled) == "I'm fine.<|im_end|>"
    assert ids[-len(labelled) :] == labelled


def test_a_reference_that_cannot_be_supervised_names_its_line(template):
    question = Question("1", (Message("user", "Hi"),), Origin("q.jsonl", 9), "")

    with pytest.raises(ValueError, match=r"q\.jsonl:9: the reference cannot be used"):
        encode_references(template, [question])


def test_nothing_is_left_changed(model, template):
    model.base_model.model.model.layers[0].eval()
    frozen = next(p for n, p in model.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    base = model.get_base_model()

    def state():
        flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
        rng = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
        return flags, rng, model.generation_config, base.generation_config, base.config.use_cache

    before = state()
    with adapters_off(model):
        answer_questions(model, template, ask(*PROMPTS, reference="Yes"), name="x", max_new_tokens=3)

    assert state() == before
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert state() == before


def test_training_goes_on_after_answers_in_inference_mode(model, template):
    with torch.inference_mode():
        generate_answers(model, template, ask(*PROMPTS), max_new_tokens=3)

    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_adapters_off_is_the_base(model, folder, template):
    base = load_base_model(folder)
    questions = ask(*PROMPTS, reference="Yes")

    with adapters_off(model):
        off = answer_questions(model, template, questions, name="x", max_new_tokens=8)
    on = answer_questions(model, template, questions, name="x", max_new_tokens=8)

    assert off == answer_questions(base, template, questions, name="x", max_new_tokens=8)
    assert off.answers != on.answers
    assert off.reference_losses != on.reference_losses


def test_the_models_own_sampling_defaults_take_no_part(model, template):
    expected = generate_answers(model, template, ask(*PROMPTS), max_new_tokens=8)
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.do_sample = True
    model.generation_config.temperature = 9.0

    assert generate_answers(model, template, ask(*PROMPTS), max_new_tokens=8) == expected


def test_an_answer_ends_at_a_stop_token(model, template):
    (free,) = generate_answers(model, template, ask("Hi"), max_new_tokens=8)
    prompt = torch.tensor(encode_prompts(template, ask("Hi")))
    model.eval()
    tokens = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :].tolist()
    stop = next(token for i, token in enumerate(tokens) if i and token not in tokens[:i])
    place = tokens.index(stop)

    model.get_base_model().generation_config.eos_token_id = [stop]
    (ended,) = generate_answers(model, template, ask("Hi"), max_new_tokens=8)

    assert (free.stopped, free.num_tokens) == (False, 8)
    assert (ended.stopped, ended.num_tokens) == (True, place + 1)
    assert ended.text == template.tokenizer.decode(tokens[:place], skip_special_tokens=True)
    assert set(stop_tokens(model, template)) == {stop, *template.stop_token_ids}


def test_shows_progress(model, template, capsys):
    generate_answers(model, template, ask(*PROMPTS), batch_size=3, max_new_tokens=4, progress="Answers")

    assert "Answers: 100%" in capsys.readouterr().err


def test_sampling_can_be_asked_for(model, template):
    greedy = generate_answers(model, template, ask(*PROMPTS), max_new_tokens=8)
    torch.manual_seed(3)
    sampled = generate_answers(
        model, template, ask(*PROMPTS), max_new_tokens=8, do_sample=True, temperature=5.0, top_k=0
    )

    assert sampled != greedy


def test_no_questions_no_answers(model, template):
    assert generate_answers(model, template, []) == []
    assert reference_losses(model, template, []) == []
