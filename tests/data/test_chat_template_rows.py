"""The verdict on every kind of row: which turns are supervised, and what is refused for which reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
from chat_oracle import template_tokenizer
from tiny import FAMILIES, tiny_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.schema import Completion, Conversation, Message, Origin, RowRefused, TokenizedRow

ORIGIN = Origin("rows.jsonl", 3)
ASK, TELL = Message("user", "Hi there"), Message("assistant", "Hello!")
AGAIN, BYE = Message("user", "And now?"), Message("assistant", "Bye.")
THINK = replace(TELL, reasoning="Hm.")
CALL = {"id": "call1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "<|im_end|>"}}}
CALLING, RESULT = Message("assistant", "", tool_calls=(CALL,)), Message("tool", "3", tool_call_id="call1", name="add")
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}


def template_of(style="chatml", source=None, **options) -> ChatTemplate:
    return ChatTemplate(tiny_tokenizer(style, chat_template=source), **options)


def chat(*messages: Message, tools=(), variables=None) -> Conversation:
    return Conversation(messages, ORIGIN, tools, variables or {})


def learned(tokenizer: PreTrainedTokenizerFast, row: TokenizedRow) -> str:
    """The supervised text of a row, with a bar between stretches."""
    text, before = "", True
    for token_id, supervised in zip(row.input_ids, row.supervised, strict=True):
        if supervised:
            text += ("" if before or not text else "|") + tokenizer.decode([token_id])
        before = supervised
    return text


def supervised(template: ChatTemplate, row: Conversation | Completion) -> str:
    return learned(template.tokenizer, template.encode(row))


@pytest.mark.parametrize(
    ("policy", "messages", "expected"),
    [
        ("all", (ASK, TELL, AGAIN, BYE), "Hello!<|im_end|>|Bye.<|im_end|>"),
        ("last", (ASK, TELL, AGAIN, BYE), "Bye.<|im_end|>"),
        ("last", (ASK, TELL, AGAIN), "Hello!<|im_end|>"),
        ("all", (ASK, replace(TELL, train=False), AGAIN, BYE), "Bye.<|im_end|>"),
        ("last", (ASK, replace(TELL, train=True), AGAIN, BYE), "Hello!<|im_end|>|Bye.<|im_end|>"),
        ("last", (ASK, replace(TELL, train=True), AGAIN, replace(BYE, train=False)), "Hello!<|im_end|>"),
        ("all", (Message("system", "Be kind."), ASK, TELL), "Hello!<|im_end|>"),
        ("all", (TELL, ASK, BYE), "Hello!<|im_end|>|Bye.<|im_end|>"),
        ("all", (ASK, TELL, BYE), "Hello!<|im_end|>|Bye.<|im_end|>"),
        ("all", (Message("user", ""), TELL), "Hello!<|im_end|>"),
        ("all", (ASK, Message("assistant", "  two\n\nlines \n")), "  two\n\nlines \n<|im_end|>"),
        ("all", (ASK, TELL, ASK, TELL), "Hello!<|im_end|>|Hello!<|im_end|>"),
    ],
)  # fmt: skip
def test_which_turns_are_supervised(policy, messages, expected):
    assert supervised(template_of(supervise=policy), chat(*messages)) == expected


@pytest.mark.parametrize(
    ("style", "row", "reason"),
    [
        ("chatml", chat(), "empty-conversation"),
        ("chatml", chat(Message("system", "Alone.")), "no-supervised-tokens"),
        ("chatml", chat(ASK), "no-supervised-tokens"),
        ("chatml", chat(ASK, replace(TELL, train=False)), "no-supervised-tokens"),
        ("chatml", chat(ASK, Message("assistant", "")), "empty-answer"),
        ("chatml", chat(ASK, Message("assistant", " \n ")), "empty-answer"),
        ("chatml", chat(replace(ASK, train=True), TELL), "train-not-assistant"),
        ("chatml", chat(Message("moderator", "Hi"), TELL), "unknown-role"),
        ("chatml", chat(Message("user", ["Hi"]), TELL), "content-not-text"),
        ("chatml", chat(Message("user", "lone \ud800"), TELL), "reserved-character"),
        ("chatml", chat(Message("user", "private \U00100001"), TELL), "reserved-character"),
        ("chatml", chat(ASK, Message("assistant", "sentinel \U00108000")), "reserved-character"),
        ("chatml", chat(ASK, THINK), "reasoning-not-rendered"),
        ("chatml", chat(ASK, CALLING, RESULT, BYE), "message-not-rendered"),
        ("chatml", chat(ASK, TELL, tools=(TOOL,)), "tools-not-rendered"),
        ("mistral", chat(ASK, CALLING, RESULT, BYE), "template-error"),
        ("qwen", chat(ASK, replace(THINK, train=True), AGAIN, BYE), "reasoning-not-rendered"),
        ("chatml", Completion("Once", " ", ORIGIN), "empty-answer"),
        ("chatml", Completion("Once \ud800", "upon", ORIGIN), "reserved-character"),
    ],
)
def test_rows_that_are_refused(style, row, reason):
    result = template_of(style).encode_batch([row])[0]
    assert isinstance(result, RowRefused)
    assert (result.reason, result.origin) == (reason, ORIGIN)


def test_one_bad_row_leaves_the_others_of_its_batch_alone():
    template = template_of()
    good, bad = chat(ASK, TELL), chat(ASK)
    results = template.encode_batch([good, bad, Completion("a", "b", ORIGIN), good])
    assert [type(result).__name__ for result in results] == [
        "TokenizedRow",
        "RowRefused",
        "TokenizedRow",
        "TokenizedRow",
    ]
    assert results[0] == results[3] == template.encode(good)


def test_earlier_reasoning_that_the_template_drops_leaves_the_last_turn():
    row = chat(ASK, THINK, AGAIN, replace(BYE, reasoning="So."))
    assert supervised(template_of("qwen"), row) == "<think>\nSo.\n</think>\n\nBye.<|im_end|>"


@pytest.mark.parametrize("content", ["<think>\nHm.\n</think>\n\nHello!", "<think>Hm.</think>Hello!"])
def test_inline_reasoning_is_found_where_the_template_puts_it(content):
    row = chat(ASK, Message("assistant", content))
    assert supervised(template_of("qwen"), row) == "<think>\nHm.\n</think>\n\nHello!<|im_end|>"


def test_what_the_generation_prompt_writes_is_not_supervised():
    row, template = chat(ASK, TELL), template_of("qwen", template_kwargs={"enable_thinking": False})
    assert supervised(template, row) == "Hello!<|im_end|>"
    assert supervised(template_of("qwen"), row) == "<think>\n\n</think>\n\nHello!<|im_end|>"


def test_calls_are_supervised_and_their_results_are_not():
    template = template_of("qwen")
    expected = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "<|im_end|>"}}\n</tool_call><|im_end|>'
    row = template.encode(chat(ASK, CALLING, RESULT, BYE, tools=(TOOL,)))
    assert learned(template.tokenizer, row) == expected + "|<think>\n\n</think>\n\nBye.<|im_end|>"
    assert row.input_ids.count(template.tokenizer.eos_token_id) == 5, "the argument is text, not a control token"


def test_default_system_prompts_and_what_follows_the_end_token_are_not_supervised():
    template = template_of()
    row = template.encode(chat(ASK, TELL))
    text = template.tokenizer.decode(row.input_ids)
    assert "helpful assistant" in text
    assert text.endswith("<|im_end|>\n")
    assert learned(template.tokenizer, row) == "Hello!<|im_end|>"


@pytest.mark.parametrize("style", ["llama3", "gemma", "mistral"])
def test_there_is_one_beginning_of_sequence(style):
    template = template_of(style)
    ids = template.encode(chat(ASK, TELL)).input_ids
    assert ids.count(template.tokenizer.bos_token_id) == 1
    assert ids[0] == template.tokenizer.bos_token_id


def test_two_beginnings_of_sequence_are_refused():
    template = template_of("llama3", "{{ bos_token }}" + FAMILIES["llama3"].template)
    with pytest.raises(RowRefused, match="double-bos"):
        template.encode(chat(ASK, TELL))


def test_a_template_without_end_token_is_refused_with_the_remedy():
    template = template_of("chatml", FAMILIES["chatml"].template.replace("<|im_end|>", ""))
    with pytest.raises(RowRefused, match="no-end-token: .* Let the template write the end token"):
        template.encode(chat(ASK, TELL))


def test_a_template_that_ignores_the_generation_prompt_is_refused():
    source = FAMILIES["chatml"].template.split("{% if add_generation_prompt %}")[0]
    with pytest.raises(RowRefused, match="prompt-not-prefix"):
        template_of("chatml", source).encode(chat(ASK, TELL))


@pytest.mark.parametrize(
    "change",
    ["{{ message['content'] | upper }}", "{{ message['content'][:4] }}", "{{ message['content'] | length }}",
     "{{ message['content'] ~ message['content'] }}", "{{ message['content'][::-1] }}"],
)  # fmt: skip
def test_templates_that_change_content_are_refused_or_masked_as_rendered(change):
    source = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}" + change
    source += (
        "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    template = template_of("chatml", source)
    result = template.encode_batch([chat(ASK, TELL)])[0]
    if "upper" in change:
        assert learned(template.tokenizer, result) == "HELLO!<|im_end|>"
    else:
        assert isinstance(result, RowRefused)


def test_tokens_across_the_border_of_the_prompt_are_refused():
    with pytest.raises(RowRefused, match="token-straddles-border"):
        template_of().encode(chat(ASK, Message("assistant", "\n\nHello!")))


def test_a_control_token_that_swallows_space_ends_the_prompt():
    source = FAMILIES["chatml"].template.replace("<|im_start|>assistant", "<|bot|>")
    source = source.replace(
        "'<|im_start|>' + message['role']", "('<|bot|>' if message.role == 'assistant' else '<|im_start|>')"
    )
    tokenizer = tiny_tokenizer("chatml", chat_template=source, extra_tokens=[AddedToken("<|bot|>", rstrip=True)])
    template = ChatTemplate(tokenizer)
    spaced = template.encode(chat(ASK, Message("assistant", "  Hello!")))
    assert learned(tokenizer, spaced) == "Hello!<|im_end|>"
    assert spaced == template.encode(chat(ASK, TELL))


@pytest.mark.parametrize("style", FAMILIES)
@pytest.mark.parametrize("kind", ["bytelevel", "unigram", "awkward"])
def test_the_prompt_followed_by_the_answer_is_the_row(style, kind):
    template = ChatTemplate(tiny_tokenizer(style, kind))
    row = template.encode(chat(ASK, TELL, AGAIN, BYE))
    prompt = template.encode_prompt((ASK, TELL, AGAIN))
    last = max(i for i, s in enumerate(row.supervised) if s)
    answer = [i for i, s in zip(row.input_ids[len(prompt) :], row.supervised[len(prompt) :], strict=True) if s]
    assert prompt + answer == row.input_ids[: last + 1]


def test_completions_begin_as_the_tokenizer_begins_and_end_with_the_end_token():
    template = template_of()
    row = template.encode(Completion("Once upon", " a time", ORIGIN))
    assert learned(template.tokenizer, row) == " a time<|im_end|>"
    whole = template.encode(Completion("", "Once upon a time", ORIGIN))
    assert whole.input_ids == row.input_ids
    assert whole.supervised == [False] + [True] * (len(whole.input_ids) - 1)


def test_completions_write_no_control_tokens():
    template = template_of()
    ids = template.encode(Completion("<|im_start|>user", "Hi<|im_end|>", ORIGIN)).input_ids
    assert ids.count(template.tokenizer.bos_token_id) == 0
    assert ids.count(template.tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("kind", ["bytelevel", "gemma"])
def test_prompt_and_completion_without_a_border_are_encoded_apart(kind):
    template = ChatTemplate(tiny_tokenizer("llama3", kind))
    prompt, completion = "The capital of Fra", "nce is Paris."
    row = template.encode(Completion(prompt, completion, ORIGIN))
    assert learned(template.tokenizer, row) == completion + "<|eot_id|>"
    length = row.supervised.index(True)
    assert template.encode(Completion("", prompt, ORIGIN)).input_ids[:-1] == row.input_ids[:length]


def test_a_tokenizer_without_chat_template_takes_completions_only():
    tokenizer = tiny_tokenizer("llama3")
    tokenizer.chat_template = None
    template = ChatTemplate(tokenizer)
    assert template.stop_token_ids == (tokenizer.eos_token_id,)
    assert isinstance(template.encode(Completion("a", "b", ORIGIN)), TokenizedRow)
    with pytest.raises(RowRefused, match="no-chat-template"):
        template.encode(chat(ASK, TELL))


def test_fingerprints_change_with_everything_that_decides_ids_and_masks():
    tokenizer = tiny_tokenizer("qwen")
    other = tiny_tokenizer("qwen", chat_template=FAMILIES["chatml"].template)
    templates = [
        ChatTemplate(tokenizer),
        ChatTemplate(other),
        ChatTemplate(tiny_tokenizer("qwen", "unigram")),
        ChatTemplate(tokenizer, supervise="last"),
        ChatTemplate(tokenizer, template_kwargs={"enable_thinking": False}),
        ChatTemplate(tokenizer, content_tokens=["<think>"]),
    ]
    prints = [template.fingerprint for template in templates]
    assert len(set(prints)) == len(prints)
    assert ChatTemplate(tiny_tokenizer("qwen")).fingerprint == prints[0]


def test_notes_say_what_a_template_does_to_ordinary_chats():
    assert template_of("qwen").notes == (
        "an answer with reasoning that another question follows is not trained on (reasoning-not-rendered)",
    )


def test_notes_tell_of_what_only_the_tokens_show():
    notes = ChatTemplate(template_tokenizer("qwen3_8")).notes
    assert [note for note in notes if "token-straddles-border" in note] == [
        "an answer is not trained on (token-straddles-border)",
        "an answer that another question follows is not trained on (token-straddles-border)",
    ]


def test_supervise_is_checked():
    with pytest.raises(ValueError, match="supervise is 'first'; allowed: all, last"):
        ChatTemplate(tiny_tokenizer(), supervise="first")


@pytest.mark.parametrize("style", FAMILIES)
def test_a_turn_found_in_one_chat_is_found_as_exactly_in_others_of_its_shape(style):
    answers = ("Hello!", "A much longer answer, in several words.", "é", "So <|im_end|> is written.")
    rows = [
        chat(ASK, replace(TELL, content=first, train=train), AGAIN, replace(BYE, content=last))
        for first, last, train in zip(answers, reversed(answers), (None, False, True, None), strict=True)
    ]
    together = template_of(style).encode_batch(rows)
    alone = [template_of(style).encode_batch([row])[0] for row in rows]
    assert [(type(row), str(row)) for row in together] == [(type(row), str(row)) for row in alone]
    assert any(isinstance(row, TokenizedRow) for row in together)


RAG = (
    "{% if documents %}{{ '<|im_start|>system\\n' }}{% for document in documents %}{{ document.text + '\\n' }}"
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}" + FAMILIES["chatml"].template
)


@pytest.mark.parametrize("of_the_run", [True, False])
def test_documents_reach_the_template(of_the_run):
    documents = {"documents": [{"text": "Paris is in France."}]}
    template = template_of(source=RAG, template_kwargs=documents if of_the_run else {})
    row = chat(ASK, TELL, variables={} if of_the_run else documents)
    assert template.render(row).startswith("<|im_start|>system\nParis is in France.\n<|im_end|>\n")
    assert supervised(template, row) == "Hello!<|im_end|>"
    assert "France" not in template_of(source=RAG).render(chat(ASK, TELL))


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_variables_that_are_set_here_are_refused(name):
    with pytest.raises(ValueError, match=f"template_kwargs sets {name}, which .* such as enable_thinking or documents"):
        template_of(template_kwargs={name: [], "enable_thinking": False})


def test_a_document_writes_no_control_tokens():
    documents = {"documents": [{"text": "Paris<|im_end|>\n<|im_start|>assistant"}]}
    template = template_of(source=RAG)
    ids = template.encode(chat(ASK, TELL, variables=documents)).input_ids
    plain = template.encode(chat(ASK, TELL, variables={"documents": [{"text": "Paris"}]})).input_ids
    for token_id in template.control_token_ids:
        assert ids.count(token_id) == plain.count(token_id)


def test_a_chat_of_more_strings_than_there_are_marks_says_so(monkeypatch):
    template = template_of()
    monkeypatch.setattr("lightning_qlora.data.content_marks.MAX_MARKS", 3)
    few, many = template.encode_batch([chat(ASK, TELL), chat(ASK, TELL, AGAIN, BYE)])
    assert isinstance(few, TokenizedRow)
    assert many.reason == "too-many-strings"
    assert "more than 3 strings" in many.detail
