"""Tiny tokenizers and models, built in-process: no network, no files, milliseconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

Style = Literal["chatml", "llama3", "gemma", "qwen", "mistral", "phi"]
Kind = Literal["bytelevel", "metaspace", "metaspace_always", "unigram", "prepend", "gemma", "awkward"]

SENTENCES = (
    "The quick brown fox jumps over the lazy dog. ",
    "You are a helpful assistant that answers the user in one or two short sentences.\n",
    "What is the capital of France? The capital of France is Paris.\n\n",
    "Please write a function that adds two numbers, then explain how it works.\n",
    'def add(a, b):\n    return a + b\n\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n',
    "system user assistant model tool function think answer question reasoning ",
    "Hello! How are you today? I'm fine, thank you. 0 1 2 3 4 5 6 7 8 9\n",
)

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set prefix = messages[0]['content'] | trim + '\\n\\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set prefix = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + (prefix if loop.first else '') + message['content'] | trim + "
    "'<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
QWEN = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}"
    "{% endif %}{{ '# Tools\\n<tools>' }}{% for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}"
    "{{ '\\n</tools><|im_end|>\\n' }}{% elif messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}"
    "{% set ns = namespace(last=-1) %}{% for message in messages %}{% if message.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% set content = message.content if message.content is string else '' %}"
    "{% if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
    "{{ '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}"
    "{% elif message.role == 'assistant' %}{% set reasoning = message.reasoning_content | default('', true) %}"
    "{% if not reasoning and '</think>' in content %}"
    "{% set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\\n' }}{% if loop.index0 > ns.last and (loop.last or reasoning) %}"
    "{{ '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
    "{% else %}{{ content }}{% endif %}"
    "{% for call in message.tool_calls or [] %}{% if not loop.first or content %}{{ '\\n' }}{% endif %}"
    '{{ \'<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% elif message.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
    "{{ '<|im_start|>user' }}{% endif %}{{ '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set prefix = messages[0]['content'] + '\\n\\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set prefix = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (prefix if loop.first else '') + message['content'] + '[/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant turns are supported.') }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)


class Family(NamedTuple):
    """What distinguishes the tokenizer of one model family."""

    template: str
    bos: str | None
    eos: str
    pad: str
    special: tuple[str, ...]
    ordinary: tuple[str, ...] = ()
    """Added tokens that are not special."""


FAMILIES: dict[Style, Family] = {
    "chatml": Family(
        CHATML, "<|im_start|>", "<|im_end|>", "<|im_end|>", ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    ),
    "llama3": Family(
        LLAMA3,
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|finetune_right_pad_id|>",
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|finetune_right_pad_id|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eom_id|>",
            "<|eot_id|>",
            "<|python_tag|>",
        ),
    ),
    "gemma": Family(
        GEMMA, "<bos>", "<eos>", "<pad>", ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), ("\n\n",)
    ),
    "qwen": Family(
        QWEN,
        None,
        "<|im_end|>",
        "<|endoftext|>",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
    ),
    "mistral": Family(
        MISTRAL,
        "<s>",
        "</s>",
        "<pad>",
        ("<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]"),
    ),
    "phi": Family(
        PHI,
        "<s>",
        "<|endoftext|>",
        "<|endoftext|>",
        ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"),
    ),
}

GPT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def _byte_level(vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GPT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def _sentencepiece(kind: str, vocab_size: int) -> Tokenizer:
    """BPE or Unigram over pieces that begin with the visible space, with byte fallback for everything unseen."""
    tokenizer = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE())
    scheme: Literal["always", "first", "never"] = "always" if kind == "metaspace_always" else "first"
    if kind in ("prepend", "gemma"):
        steps = [normalizers.Prepend("▁")] if kind == "prepend" else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement="▁", prepend_scheme=scheme, split=kind != "metaspace"
        )
    shared: dict[str, Any] = {"vocab_size": vocab_size - 256, "show_progress": False}
    if kind == "unigram":
        tokenizer.train_from_iterator(
            SENTENCES, trainers.UnigramTrainer(unk_token="<unk>", special_tokens=["<unk>"], **shared)
        )
    else:
        trained = Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
        trained.train_from_iterator(SENTENCES, trainers.BpeTrainer(special_tokens=["<unk>"], **shared))
        tokenizer.model = trained.model
    state = json.loads(tokenizer.to_str())
    if kind == "unigram":
        state["model"] |= {"byte_fallback": True, "unk_id": 0}
        state["model"]["vocab"] += [[piece, -12.0] for piece in BYTE_PIECES]
    else:
        vocab = state["model"]["vocab"]
        state["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
        state["model"]["vocab"] = vocab | {piece: len(vocab) + index for index, piece in enumerate(BYTE_PIECES)}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    strip = [decoders.Strip(" ", 1, 0)] if kind != "gemma" else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


@lru_cache
def _backend(kind: Kind, vocab_size: int) -> str:
    if kind in ("bytelevel", "awkward"):
        tokenizer = _byte_level(vocab_size)
        if kind == "awkward":
            tokenizer.normalizer = normalizers.NFC()
        return tokenizer.to_str()
    return _sentencepiece(kind, vocab_size).to_str()


def tiny_tokenizer(
    style: Style = "chatml",
    kind: Kind = "bytelevel",
    *,
    extra_tokens: Sequence[str | AddedToken] = (),
    chat_template: str | None = None,
    vocab_size: int = 640,
) -> PreTrainedTokenizerFast:
    """Build a tokenizer of fewer than 1000 tokens with the control tokens and chat template of a model family.

    Args:
        style: The family, which decides control tokens, chat template, and beginning, end and padding tokens.
        kind: The algorithm: byte-level BPE; ``metaspace`` (BPE with byte fallback, a space put before the first
            word), ``metaspace_always`` (before the words after each added token too), ``unigram`` (Unigram with
            byte fallback), ``prepend`` (Llama 2's normalizer), ``gemma`` (spaces replaced, nothing put before);
            ``awkward`` (byte-level with added tokens that swallow spaces, are normalized, or match whole words only).
        extra_tokens: More added tokens, not special unless they say so.
        chat_template: Replaces the family's template.
        vocab_size: Tokens of the learned vocabulary.
    """
    family = FAMILIES[style]
    backend = Tokenizer.from_str(_backend(kind, vocab_size))
    special = [AddedToken(content, special=True, normalized=False) for content in family.special]
    ordinary = [AddedToken(content, special=False, normalized=False) for content in family.ordinary]
    if kind == "awkward":
        flags = ({"rstrip": True}, {"lstrip": True}, {"lstrip": True, "rstrip": True}, {}, {"normalized": True})
        special = [
            AddedToken(content, special=True, **{"normalized": False, **flags[index % len(flags)]})
            for index, content in enumerate(family.special)
        ]
        ordinary = [AddedToken(content, special=False, normalized=True) for content in family.ordinary]
        ordinary += [AddedToken("Whole", special=False, single_word=True), AddedToken("<tail>", rstrip=True)]
    backend.add_tokens([*special, *ordinary, *extra_tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.pad,
        chat_template=chat_template or family.template,
        clean_up_tokenization_spaces=False,
    )
