"""What a mask has to be, worked out from the text alone: transformers renders, unique words tell whose text is whose.

Nothing here uses the package's own rendering, marks or borders.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import trl
from tiny import Kind, tiny_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from lightning_qlora.schema import Conversation, Message, Origin, TokenizedRow

TEMPLATES = {path.stem: path for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))}

NAMED_TOKENS = re.compile(
    r"<[|｜][^|｜<>\n'\"{}]+[|｜]>|<\|[a-z_]+>|<[a-z_]+\|>|<\|\"\|>|</?[a-z]+(?:_of_turn|_of_utterance)>|</s>|<sop>"
    r"|</?(?:think|tool_call|tool_response|arg_key|arg_value)>|\[/?[A-Z_]+\]|\[gMASK\]"
)
ORDINARY = re.compile(r"</?(?:think|tool_call|tool_response|arg_key|arg_value)>")
HEADERS = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|turn>|<｜Assistant｜>|<｜User｜>|<\|START_OF_TURN_TOKEN\|>"
    r"|<\|user\|>|<\|assistant\|>|\[INST\]|<\|observation\|>"
)
"""Control tokens that open a turn: never the model's to write (glm ends answers by ``<|user|>``; see END_TOKENS)."""

END_TOKENS = {
    "cohere": ("<|END_OF_TURN_TOKEN|>",),
    "cohere2": ("<|END_RESPONSE|>",),
    "deepseek": ("<｜end▁of▁sentence｜>",),
    "diffusion_gemma": ("<turn|>", "<|tool_response>"),
    "gemma": ("<end_of_turn>",),
    "gemma4": ("<turn|>", "<|tool_response>"),
    "glm4moe": ("<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|call|>"),
    "idefics3": ("<end_of_utterance>",),
    "lfm2": ("<|im_end|>",),
    "llama3": ("<|eot_id|>",),
    "llava_next": ("</s>",),
    "muse_glimmer": ("<|eot|>",),
    "nemotron": ("<|im_end|>",),
    "phi3": ("<|end|>",),
    "qwen": ("<|im_end|>",),
    "smolvlm": ("<end_of_utterance>",),
}
"""By how a template's name begins, the longest match: the tokens by which its model ends a turn."""

PARTS = ("idefics3", "llava_next", "smolvlm")
"""Templates that want content as a list of parts."""

ORIGIN = Origin("oracle.jsonl", 1)
CALL_ID = "call00001"
TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Toolword looks up.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where."},
                "n": {"type": "integer", "description": "How many."},
            },
            "required": ["city"],
        },
    },
}


def _call(city: str) -> tuple[dict[str, Any], ...]:
    return ({"id": CALL_ID, "type": "function", "function": {"name": "lookup", "arguments": {"city": city, "n": 3}}},)


USER, SECOND = Message("user", "Userone asks."), Message("user", "Usertwo asks.")
ANSWER, REPLY = Message("assistant", "Answerone é 漢 says."), Message("assistant", "Answertwo says.")
CALLING = Message("assistant", "", tool_calls=_call("Cityone"))
RESULT = Message("tool", '{"found": "Resultone"}', name="lookup", tool_call_id=CALL_ID)

CHATS: dict[str, tuple[Message, ...]] = {
    "one turn": (USER, ANSWER),
    "two turns": (USER, ANSWER, SECOND, REPLY),
    "system": (Message("system", "Systemone rules."), USER, ANSWER),
    "white space": (Message("user", "\n  Userone \n"), Message("assistant", "  \n Answerone\n\n  says \n\n")),
    "inline reasoning": (USER, Message("assistant", "<think>\nThinkone\n</think>\n\nAnswerone says.")),
    "reasoning": (USER, replace(ANSWER, reasoning="Thinkone."), SECOND, replace(REPLY, reasoning="Thinktwo.")),
    "tools": (USER, CALLING, RESULT, REPLY),
    "tools and words": (USER, replace(CALLING, content="Answerone."), RESULT, REPLY, SECOND, ANSWER),
}


def conversation(name: str) -> Conversation:
    """One of ``CHATS``, with tools where it calls them."""
    return Conversation(CHATS[name], ORIGIN, (TOOL,) if name.startswith("tools") else ())


@lru_cache(maxsize=32)
def template_tokenizer(name: str, kind: Kind = "bytelevel") -> PreTrainedTokenizerFast:
    """A tiny tokenizer that has all the control tokens that a template of TRL's names."""
    source = TEMPLATES[name].read_text()
    named = [
        token for token in sorted(set(NAMED_TOKENS.findall(source))) if token not in ("<|im_start|>", "<|im_end|>")
    ]
    extra = [AddedToken(token, special=not ORDINARY.fullmatch(token), normalized=False) for token in [*named, "<bos>"]]
    tokenizer = tiny_tokenizer("chatml", kind, extra_tokens=extra, chat_template=source)
    tokenizer.bos_token = "<bos>"
    return tokenizer


def end_tokens(name: str) -> tuple[str, ...]:
    return END_TOKENS[max((prefix for prefix in END_TOKENS if name.startswith(prefix)), key=len)]


def as_dicts(messages: tuple[Message, ...], parts: bool = False) -> list[dict[str, Any]]:
    """Messages as a user of transformers would write them."""
    written = []
    for message in messages:
        content: Any = [{"type": "text", "text": message.content}] if parts else message.content
        turn: dict[str, Any] = {"role": message.role, "content": content}
        if message.reasoning:
            turn |= dict.fromkeys(("reasoning_content", "reasoning", "thinking"), message.reasoning)
        if message.tool_calls:
            turn["tool_calls"] = list(message.tool_calls)
        for key in ("name", "tool_call_id"):
            if getattr(message, key) is not None:
                turn[key] = getattr(message, key)
        written.append(turn)
    return written


def words_of(message: Message) -> list[str]:
    """The unique words of a message; those of an assistant are to be supervised."""
    text = " ".join([message.content, message.reasoning or "", str(message.tool_calls)])
    return re.findall(r"(?:User|Answer|System|Think|City|Result)(?:one|two)", text)


def errors_of(name: str, kind: Kind, row: Conversation, encoded: TokenizedRow) -> list[str]:
    """Everything that is wrong with an encoded row; an empty list means that ids and mask are exact."""
    tokenizer = template_tokenizer(name, kind)
    parts = name.startswith(PARTS)
    options: dict[str, Any] = {"tools": list(row.tools) or None}
    text = tokenizer.apply_chat_template(as_dicts(row.messages, parts), tokenize=False, **options)
    plain = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if encoded.input_ids != plain["input_ids"]:
        return ["the ids are not those of apply_chat_template"]
    errors, offsets = [], plain["offset_mapping"]
    stretches, position = [], 0
    for supervised, group in groupby(encoded.supervised):
        count = len(list(group))
        if supervised:
            stretches.append((position, position + count))
        position += count
    learned = [text[offsets[start][0] : offsets[end - 1][1]] for start, end in stretches]
    everything = "\n".join(learned)
    for message in row.messages:
        for word in words_of(message):
            if message.role != "assistant" and word in everything:
                errors.append(f"{word} of the {message.role} is supervised")
    for index, message in enumerate(row.messages):
        missing = [word for word in words_of(message) if message.role == "assistant" and word not in everything]
        if missing and (index == len(row.messages) - 1 or not _is_rewritten(name, row, index, parts, text)):
            errors.append(f"{missing} of the assistant are not supervised")
    ends = end_tokens(name)
    for (start, _), stretch in zip(stretches, learned, strict=True):
        stop = next((end for end in ends if stretch.rstrip().endswith(end)), None)
        if stop is None:
            errors.append(f"{stretch!r} does not end with an end token")
        elif header := HEADERS.search(stretch.rstrip()[: -len(stop)]):
            errors.append(f"{stretch!r} holds the header {header.group()}")
        errors += _prompt_errors(tokenizer, row, parts, text[: offsets[start][0]], encoded.input_ids[:start], stretch)
    if len(stretches) > sum(message.role == "assistant" for message in row.messages):
        errors.append("more stretches than answers")
    return errors


def _is_rewritten(name: str, row: Conversation, index: int, parts: bool, text: str) -> bool:
    """Whether the template writes an earlier answer in another way than generation would have come to it."""
    tokenizer = template_tokenizer(name)
    if not all(word in text for word in words_of(row.messages[index])):
        return True  # it drops the reasoning

    def render(messages: tuple[Message, ...], prompt: bool) -> str:
        tools = list(row.tools) or None
        dicts = as_dicts(messages, parts)
        return tokenizer.apply_chat_template(dicts, tools=tools, tokenize=False, add_generation_prompt=prompt)

    answered = render(row.messages[: index + 1], False)
    prompt = render(row.messages[:index], True)
    return not (answered.startswith(prompt) and text.startswith(answered.rstrip()))


def _prompt_errors(
    tokenizer: PreTrainedTokenizerFast, row: Conversation, parts: bool, before: str, ids: list[int], stretch: str
) -> list[str]:
    """Whether what stands before a supervised stretch is what generation would be given there."""
    prompts = []
    for index, message in enumerate(row.messages):
        if message.role != "assistant" or not index or not any(word in stretch for word in words_of(message)):
            continue
        for mode in ({}, {"enable_thinking": False}):
            prompts.append(
                tokenizer.apply_chat_template(
                    as_dicts(row.messages[:index], parts), tools=list(row.tools) or None, tokenize=False,
                    add_generation_prompt=True, **mode,
                )
            )  # fmt: skip
    # A template may have dropped reasoning from the turns before: then only the end of the prompt is the same.
    tail = max((len(p) - p.rfind("Userone") - len("Userone") if "Usertwo" not in p else 40 for p in prompts), default=0)
    if not any(before == prompt or before.endswith(prompt[-tail:]) for prompt in prompts):
        return [f"{before[-80:]!r} is not the prompt of {stretch!r}"]
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    if not any(ids[-3:] == prompt[-3:] for prompt in encoded):
        return [f"the tokens before {stretch!r} are not the prompt's"]
    return []
