"""Where turns begin: what a template's source proves about its prompts, and that rows do not bear on each other."""

from __future__ import annotations

import random
import sys
from collections import Counter
from types import FrameType
from typing import Any

import pytest
from chat_oracle import TEMPLATES, template_tokenizer
from tiny import FAMILIES, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.data.prompt_proof import prove_prompt
from lightning_qlora.schema import Conversation, Message, Origin, RowRefused, TokenizedRow

ORIGIN = Origin("rows.jsonl", 4)
MESSAGES = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
)
PROMPT = "<|im_start|>assistant\n"
THINK = "<think>\n"
PLAIN = "{% if add_generation_prompt %}" + PROMPT + "{% endif %}"
SOFT_SWITCH = (
    MESSAGES + "{% if add_generation_prompt %}" + PROMPT + "{% if '/no_think' not in messages[-1]['content'] %}" + THINK
    + "{% endif %}{% endif %}"
)  # fmt: skip
SYSTEM_SWITCH = (
    "{% set mode = 'think' %}{% if '/no_think' in messages[0].content %}{% set mode = 'no' %}{% endif %}" + MESSAGES
    + "{% if add_generation_prompt %}" + PROMPT + "{% if mode == 'think' %}" + THINK + "{% endif %}{% endif %}"
)  # fmt: skip
IN_THE_LOOP = MESSAGES.replace(
    "{% endfor %}",
    "{% if loop.last and add_generation_prompt %}" + PROMPT + "{{ '' if '/no' in m.content else '<think>' }}"
    "{% endif %}{% endfor %}",
)
LATE_END = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{% if loop.last and '/no_think' in m.content %}{{ '<|im_end|>' }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
) + PLAIN
BY_LENGTH = MESSAGES + "{% if add_generation_prompt %}" + PROMPT + "{% if messages|length > 2 %}x{% endif %}{% endif %}"


def template_of(source: str | None = None, style: Any = "chatml") -> ChatTemplate:
    return ChatTemplate(tiny_tokenizer(style, chat_template=source))


def chat(*contents: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[i % 2], content) for i, content in enumerate(contents)), ORIGIN)


@pytest.mark.parametrize("source", [SOFT_SWITCH, SYSTEM_SWITCH])
@pytest.mark.parametrize("switched_first", [True, False])
def test_a_prompt_that_looks_at_contents_is_proven_for_each_row(source, switched_first):
    switched, other = chat("Hi there /no_think", "Answer"), chat("Hi there", "Answer")
    rows = [switched, other] if switched_first else [other, switched]
    results = dict(zip((row.messages[0].content for row in rows), template_of(source).encode_batch(rows), strict=True))
    assert isinstance(results["Hi there /no_think"], TokenizedRow)
    refusal = results["Hi there"]
    assert isinstance(refusal, RowRefused)
    assert refusal.reason == "prompt-not-prefix"


def _random_rows(rng: random.Random) -> list[Conversation]:
    says = ("Hi there", "Hi there /no_think", "<think>\nHm.\n</think>\n\nYes.", " Answer\n", "/no", "More")
    rows = []
    for _ in range(12):
        messages = [Message("system", rng.choice(says))] if rng.random() < 0.3 else []
        for _ in range(rng.randint(1, 3)):
            reasoning = "So." if rng.random() < 0.2 else None
            messages += [
                Message("user", rng.choice(says)),
                Message("assistant", rng.choice(says), reasoning=reasoning, train=rng.choice((None, None, True))),
            ]
        rows.append(Conversation(tuple(messages), ORIGIN))
    return rows


def _tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    sources = {"soft": SOFT_SWITCH, "system": SYSTEM_SWITCH, "loop": IN_THE_LOOP, "end": LATE_END, "length": BY_LENGTH}
    found = {name: tiny_tokenizer("chatml", chat_template=source) for name, source in sources.items()}
    found |= {style: tiny_tokenizer(style) for style in FAMILIES}
    return found | {name: template_tokenizer(name) for name in ("qwen3", "gptoss", "llama3_1", "gemma4", "phi3_5")}


@pytest.mark.parametrize("name", _tokenizers())
def test_a_row_comes_out_as_if_it_were_the_only_one(name):
    rng = random.Random(name)
    tokenizer = _tokenizers()[name]
    rows = _random_rows(rng)
    alone = [ChatTemplate(tokenizer).encode_batch([row])[0] for row in rows]
    order = rng.sample(range(len(rows)), len(rows))
    shared = ChatTemplate(tokenizer)
    for start in range(0, len(order), 5):
        block = order[start : start + 5]
        for index, result in zip(block, shared.encode_batch([rows[index] for index in block]), strict=True):
            assert _told(result) == _told(alone[index])


def _told(result: TokenizedRow | RowRefused) -> Any:
    return (result.reason, result.detail) if isinstance(result, RowRefused) else result


@pytest.mark.parametrize(
    ("source", "proof"),
    [
        (MESSAGES, (True, True)),
        (MESSAGES + PLAIN, (True, True)),
        (MESSAGES + "{% if add_generation_prompt and not plain %}x{% else %}{{ eos_token }}{% endif %}", (True, True)),
        ("{% set t = t if t is defined else true %}{% if add_generation_prompt %}{% if t %}x{% endif %}{% endif %}",
         (True, True)),
        (SOFT_SWITCH, (False, False)),
        (SYSTEM_SWITCH, (False, False)),
        (IN_THE_LOOP, (False, False)),
        (LATE_END, (False, False)),
        (BY_LENGTH, (False, False)),
        (MESSAGES + "{{ messages[-1].content if add_generation_prompt else '' }}", (False, False)),
        (MESSAGES + "{% set ask = add_generation_prompt %}" + PLAIN, (False, False)),
        (MESSAGES + "{% if tools and add_generation_prompt %}x{% endif %}", (False, False)),
        ("{% macro tell() %}{{ add_generation_prompt }}{{ messages[-1].content }}{% endmacro %}{{ tell() }}",
         (False, False)),
        (MESSAGES + "{% set ns = namespace(q='') %}{% for m in messages %}{% set ns.q = m.content %}{% endfor %}"
         "{% if add_generation_prompt %}{% if 'no' in ns.q %}x{% endif %}{% endif %}", (False, False)),
        (MESSAGES + "{% set last %}{{ messages[-1].content }}{% endset %}{% if add_generation_prompt %}"
         "{% if 'no' in last %}x{% endif %}{% endif %}", (False, False)),
        ("{% for m in messages %}{% if m.role == 'assistant' %}{% if loop.last and 'x' in m.content %}y{% endif %}"
         "{% endif %}{{ m.content }}{% endfor %}" + PLAIN, (True, False)),
        ("{% for m in messages %}{% if m.role == 'tool' and loop.last %}y{% endif %}{{ m.content }}{% endfor %}",
         (True, True)),
        ("{% for m in messages %}{% if loop.last %}{% set end = eos_token %}{% endif %}{{ m.content }}"
         "{% if 'no' in m.content %}{{ end }}{% endif %}{% endfor %}", (False, False)),
        ("{% for m in messages %}{% if 'no' in m.content %}{% set end = 'x' %}{% endif %}{{ m.content }}"
         "{% if loop.last %}{{ end }}{% endif %}{% endfor %}", (False, False)),
        ("{% for m in messages %}{% set end = loop.last %}{{ m.content }}"
         "{% if end and 'no' in m.content %}{{ eos_token }}{% endif %}{% endfor %}", (False, False)),
        ("{% macro close(m, end) %}{% if end and 'no' in m.content %}x{% endif %}{% endmacro %}"
         "{% for m in messages %}{{ m.content }}{{ close(m, loop.last) }}{% endfor %}", (False, False)),
        ("{% macro close(m) %}{% if 'no' in m.content %}x{% endif %}{% endmacro %}"
         "{% for m in messages %}{{ m.content }}{{ close(m) }}{% endfor %}", (True, True)),
        ("{% set ns = namespace(all=messages) %}{% for m in ns.all %}{{ m.content }}"
         "{% if loop.last and 'no' in m.content %}x{% endif %}{% endfor %}", (False, False)),
        ("{% for m in messages %}{% if messages[-1].content|length > 3 %}x{% endif %}{% endfor %}", (False, False)),
        ("{% for m in messages %}{{ m.content }}{% if 'no' in m.content %}{% break %}{% endif %}{% endfor %}" + PLAIN,
         (False, False)),
    ],
)  # fmt: skip
def test_what_a_source_proves_about_its_prompts(source, proof):
    assert prove_prompt(source) == proof


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_6", "llama3_1", "llama3_2", "gemma3", "phi3", "lfm2"])
def test_common_templates_need_few_prompts(name):
    assert prove_prompt(TEMPLATES[name].read_text()).behind_others


def _count_steps(template: ChatTemplate, row: Conversation) -> int:
    """Lines of this package that encoding a row runs."""
    steps: Counter[str] = Counter()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if "lightning_qlora" not in frame.f_code.co_filename:
            return None
        steps[event] += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        assert isinstance(template.encode_batch([row])[0], TokenizedRow)
    finally:
        sys.settrace(before)
    return steps["line"]


@pytest.mark.parametrize("style", ["chatml", "qwen"])
def test_the_work_grows_as_the_turns_do(style):
    template = template_of(style=style)
    counts = []
    for exchanges in (50, 200):
        contents = [word for number in range(exchanges) for word in (f"Question {number}", f"Answer {number}")]
        counts.append(_count_steps(template, chat(*contents)))
    assert counts[1] < 5 * counts[0]
