"""Exact masks: what is supervised is the assistant's words and the token that ends them, on any template."""

from __future__ import annotations

import pickle

import pytest
from tiny import FAMILIES, tiny_tokenizer

from lightning_qlora.data.chat_template import ChatTemplate, check_stop_tokens
from lightning_qlora.schema import Completion, Conversation, Message, Origin, RowRefused

KINDS = ("bytelevel", "metaspace", "metaspace_always", "unigram", "prepend", "gemma", "awkward")
ORIGIN = Origin("rows.jsonl", 7)


def chat(*turns: tuple[str, str] | Message, **fields) -> Conversation:
    messages = tuple(turn if isinstance(turn, Message) else Message(*turn) for turn in turns)
    return Conversation(messages, ORIGIN, **fields)


def supervised_runs(template: ChatTemplate, row) -> list[str]:
    """The texts of the supervised stretches of a row."""
    encoded = template.encode(row)
    runs: list[list[int]] = []
    before = False
    for token_id, supervised in zip(encoded.input_ids, encoded.supervised, strict=True):
        if supervised:
            if not before:
                runs.append([])
            runs[-1].append(token_id)
        before = supervised
    return [template.tokenizer.decode(run) for run in runs]


def as_dicts(row: Conversation) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in row.messages]


TWO_TURNS = chat(("user", "Hi there"), ("assistant", "Hello! How are you?"), ("user", "Fine"), ("assistant", "Good."))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", FAMILIES)
def test_clean_rows_have_the_ids_of_apply_chat_template(style, kind):
    tokenizer = tiny_tokenizer(style, kind)
    encoded = ChatTemplate(tokenizer).encode(TWO_TURNS)
    assert encoded.input_ids == tokenizer.apply_chat_template(as_dicts(TWO_TURNS), tokenize=True, return_dict=False)
    assert encoded.origin == ORIGIN
    assert len(encoded.supervised) == len(encoded.input_ids)


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("chatml", ["Hello! How are you?<|im_end|>", "Good.<|im_end|>"]),
        ("llama3", ["Hello! How are you?<|eot_id|>", "Good.<|eot_id|>"]),
        ("gemma", ["Hello! How are you?<end_of_turn>", "Good.<end_of_turn>"]),
        ("mistral", [" Hello! How are you?</s>", " Good.</s>"]),
        ("phi", ["Hello! How are you?<|end|>", "Good.<|end|>"]),
        ("qwen", ["Hello! How are you?<|im_end|>", "<think>\n\n</think>\n\nGood.<|im_end|>"]),
    ],
)
def test_supervised_are_the_answers_and_their_end_tokens(style, expected):
    template = ChatTemplate(tiny_tokenizer(style))
    assert supervised_runs(template, TWO_TURNS) == expected


def test_stop_tokens_are_those_that_end_answers_and_the_end_token():
    tokenizer = tiny_tokenizer("phi")
    ids = ChatTemplate(tokenizer).stop_token_ids
    assert tokenizer.convert_ids_to_tokens(list(ids)) == ["<|end|>", "<|endoftext|>"]


def test_generation_that_would_run_past_an_answer_is_refused():
    tokenizer = tiny_tokenizer("phi")
    stops = ChatTemplate(tokenizer).stop_token_ids
    check_stop_tokens(stops, list(stops), tokenizer)
    with pytest.raises(ValueError, match=r"'<\|end\|>' .*generation_config.eos_token_id = "):
        check_stop_tokens(stops, tokenizer.eos_token_id, tokenizer)


def test_completion_supervises_the_completion_and_the_end_token():
    tokenizer = tiny_tokenizer("llama3")
    encoded = ChatTemplate(tokenizer).encode(Completion("The capital of France is", " Paris.", ORIGIN))
    answer = [i for i, supervised in zip(encoded.input_ids, encoded.supervised, strict=True) if supervised]
    assert tokenizer.decode(answer) == " Paris.<|eot_id|>"


def test_a_refusal_names_the_row_and_the_reason():
    template = ChatTemplate(tiny_tokenizer("mistral"))
    with pytest.raises(RowRefused, match=r"rows.jsonl:7: template-error: .*Only user and assistant") as refusal:
        template.encode(chat(("user", "Hi"), ("tool", "x"), ("assistant", "Ok")))
    assert refusal.value.reason == "template-error"


def test_templates_travel_to_worker_processes():
    template = ChatTemplate(tiny_tokenizer("qwen"), supervise="last", template_kwargs={"enable_thinking": False})
    copy = pickle.loads(pickle.dumps(template))
    assert copy.fingerprint == template.fingerprint
    assert copy.encode(TWO_TURNS) == template.encode(TWO_TURNS)
