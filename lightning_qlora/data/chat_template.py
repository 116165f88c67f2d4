r"""Conversations -> token ids with an exact completion mask, in one rendering; what cannot be proven is refused.

What is supervised in an assistant's turn is what the model has to write by itself: everything from the end of the
generation prompt to the token that ends the turn, that token included::

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n
                                                              ^^^^^^^^^^^^^^^^

Never supervised: role headers and whatever else the generation prompt writes (also an empty ``<think></think>``),
default system prompts, white space after the end token, an end token that the template did not write.

The rules behind it:

* The generation prompt must lead to the turn: the text in front of the supervised characters is what
  ``add_generation_prompt`` writes there, and its tokens are the tokens that generation would be given. Where the
  template knows ``enable_thinking`` and the run leaves it open, the prompt without thinking may be the one that leads
  there: that is how an answer without reasoning is reached in templates that otherwise open with ``<think>``.
* An earlier turn of which that is not true, because the template rewrites history (it drops earlier reasoning,
  writes another end token, or leaves out what the generation prompt opens with), is not supervised, unless its
  ``train`` asks for it: then, as for the last turn, the row is refused. ``ChatTemplate.notes`` tells beforehand.
* A token is supervised when all its characters are. A token that reaches over the border refuses the row, unless
  it is a control token of the generation prompt that swallows white space: generation gives that token whole.
* Content writes no control tokens (``control_tokens``), except for think and tool-call markers in an assistant's text.
* What a template leaves out (a message, the tools, the reasoning of the turn in question) refuses the row.
* Raw text (``Completion``) is content throughout: control tokens in it are text, unless ``content_tokens`` names them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

from transformers import PreTrainedTokenizerBase

from lightning_qlora.data.control_tokens import ControlTokens, Match, Written, shrink
from lightning_qlora.data.formats import RENDERER_VARIABLES
from lightning_qlora.data.rendering import Dialogue, Rendered, Renderer, check_characters, check_messages
from lightning_qlora.data.template_guard import check_template
from lightning_qlora.data.turns import Turn, Turns, check_rendered, other_prompt
from lightning_qlora.schema import Completion, Conversation, Message, Origin, Row, RowRefused, TokenizedRow

__all__ = ["ChatTemplate", "Supervise", "check_stop_tokens"]

CODE_VERSION = 2
"""Part of every fingerprint: to be raised whenever the same row may come out with other ids or another mask."""

Supervise = Literal["all", "last"]
"""Which assistant turns are supervised, where a message does not say so itself."""


class Plan(NamedTuple):
    """A row as text.

    Attributes:
        text: The text to be encoded.
        controls: The control tokens that the template wrote.
        turns: What is supervised in it.
    """

    text: str
    controls: Sequence[Match]
    turns: Sequence[Turn]


class ChatTemplate:
    """Turns rows into token ids and says which of them the model learns to write.

    Args:
        tokenizer: A tokenizer with a backend of the ``tokenizers`` library. Without a chat template it takes
            ``Completion`` rows only.
        supervise: ``all`` assistant turns or only the ``last``; ``Message.train`` overrides it per message.
        template_kwargs: Variables for the chat template, such as ``{"enable_thinking": False}``.
        content_tokens: Added tokens that any content may write as real tokens.

    Attributes:
        stop_token_ids: The tokens that end supervised turns, the tokenizer's end token last.
        control_token_ids: The control tokens that the chat template writes.

    Raises:
        ValueError: ``supervise`` is unknown, ``template_kwargs`` names a variable that is set here, or the tokenizer
            has no backend of the ``tokenizers`` library.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        supervise: Supervise = "all",
        template_kwargs: dict[str, Any] | None = None,
        content_tokens: Iterable[str] = (),
    ) -> None:
        if supervise not in get_args(Supervise):
            raise ValueError(f"supervise is {supervise!r}; allowed: {', '.join(get_args(Supervise))}.")
        self.tokenizer = tokenizer
        self.supervise: Supervise = supervise
        self.template_kwargs = dict(template_kwargs or {})
        if own := sorted(RENDERER_VARIABLES & self.template_kwargs.keys()):
            raise ValueError(
                f"template_kwargs sets {', '.join(own)}, which the rows or this package set; allowed: other variables "
                "of the chat template, such as enable_thinking or documents. Leave it out."
            )
        self.content_tokens = tuple(content_tokens)
        template = tokenizer.chat_template or ""
        self._template_source = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
        for source in template.values() if isinstance(template, dict) else [template] if template else []:
            check_template(source, json.dumps(self.template_kwargs, default=repr))
        self._control_tokens = ControlTokens(tokenizer, self._template_source, self.content_tokens)
        self._renderer = Renderer(tokenizer, self._control_tokens, self.template_kwargs)
        self._turns = Turns(self._renderer, self._control_tokens)
        self._prefix_ids = self._ids_before_text()
        eos = tokenizer.eos_token_id
        stops = [*sorted(self._turns.answer_stops), *sorted(self._turns.call_stops), *([] if eos is None else [eos])]
        self.stop_token_ids: tuple[int, ...] = tuple(dict.fromkeys(stops))
        self.control_token_ids: tuple[int, ...] = tuple(sorted(self._turns.control_token_ids))

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = {name: getattr(self, name) for name in ("supervise", "template_kwargs", "content_tokens")}
        return partial(ChatTemplate, **arguments), (self.tokenizer,)

    @property
    def fingerprint(self) -> str:
        """A digest of all that decides ids and masks: template, tokenizer, policy, variables, this code's version."""
        parts = {
            "version": CODE_VERSION,
            "template": self._template_source,
            "tokenizer": hashlib.sha256(self._control_tokens.state.encode()).hexdigest(),
            "special": {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()},
            "supervise": self.supervise,
            "variables": self.template_kwargs,
            "content_tokens": sorted(self.content_tokens),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()

    @property
    def notes(self) -> tuple[str, ...]:
        """What the template does to ordinary chats that a user should know before training on them."""
        ask, tell = Message("user", "Probe question"), Message("assistant", "Probe answer")
        think = replace(tell, reasoning="Probe reasoning")
        chats = {
            "an answer": (ask, tell),
            "an answer that another question follows": (ask, tell, ask),
            "an answer with reasoning": (ask, think),
            "an answer with reasoning that another question follows": (ask, think, ask),
        }
        found = []
        for name, messages in chats.items():
            row = Conversation(messages, Origin("probe", 1), (), {})
            plan, (result,) = self._try_plan(row), self.encode_batch([row])
            if isinstance(result, RowRefused):
                found.append(f"{name} is not trained on ({result.reason})")
            elif not isinstance(plan, RowRefused) and (mode := plan.turns[0].mode):
                found.append(f"{name} is trained on as what the prompt with {mode} asks for")
        return tuple(found)

    def render(self, conversation: Conversation) -> str:
        """Write a conversation as text, as it is trained on.

        Raises:
            RowRefused: The template cannot render it.
        """
        return self._renderer.write(_dialogue(conversation), for_generation=False)

    def encode(self, row: Row) -> TokenizedRow:
        """Encode one row.

        Raises:
            RowRefused: The row cannot be used; ``reason`` says why.
        """
        result = self.encode_batch([row])[0]
        if isinstance(result, RowRefused):
            raise result
        return result

    def encode_batch(self, rows: Sequence[Row]) -> list[TokenizedRow | RowRefused]:
        """Encode rows together; each comes back as a row or as the reason why it is refused."""
        plans = [self._try_plan(row) for row in rows]
        texts = [plan for plan in plans if not isinstance(plan, RowRefused)]
        encoded = iter(self._control_tokens.encode_batch([p.text for p in texts], [p.controls for p in texts]))
        results: list[TokenizedRow | RowRefused] = []
        for row, plan in zip(rows, plans, strict=True):
            try:
                if isinstance(plan, RowRefused):
                    results.append(plan)
                elif isinstance(row, Completion):
                    results.append(self._supervise_completion(row, next(encoded)))
                else:
                    results.append(self._supervise(row, plan, next(encoded)))
            except RowRefused as refusal:
                results.append(refusal)
        return results

    def _try_plan(self, row: Row) -> Plan | RowRefused:
        try:
            return _plan_completion(row) if isinstance(row, Completion) else self._plan(row)
        except RowRefused as refusal:
            return refusal

    def encode_prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Encode what generation is given: the messages and the generation prompt.

        Raises:
            RowRefused: The template cannot render the messages, or content cannot be kept from writing control tokens.
        """
        dialogue = Dialogue(messages, tools, {}, Origin("prompt", 1))
        check_messages(dialogue)
        rendered = self._renderer.render(dialogue, for_generation=True)
        return self._write(rendered, dialogue.origin).ids

    def _write(self, rendered: Rendered, origin: Origin) -> Written:
        written = self._control_tokens.encode_batch([rendered.text], [rendered.controls])[0]
        if written is None:
            raise _unexpected_controls(origin)
        return written

    # Planning: from a conversation to its text and the characters to be supervised.

    def _plan(self, row: Conversation) -> Plan:
        dialogue = _dialogue(row)
        check_messages(dialogue)
        rendered = self._renderer.render(dialogue)
        dropped = check_rendered(dialogue, rendered)
        turns = []
        for index, required in self._asked(row.messages):
            turn = dropped.get(index) or self._turns.find(dialogue, rendered, index)
            if isinstance(turn, Turn):
                turns.append(turn)
            elif required:
                raise turn
        if not turns:
            raise RowRefused("no-supervised-tokens", "No turn of the row is to be trained on as it stands.", row.origin)
        return Plan(rendered.text, rendered.controls, turns)

    def _asked(self, messages: Sequence[Message]) -> list[tuple[int, bool]]:
        """The assistant turns that are to be supervised, and whether the row is of no use without that turn."""
        assistants = [index for index, message in enumerate(messages) if message.role == "assistant"]
        asked = []
        for index in assistants:
            train, last = messages[index].train, index == assistants[-1]
            if train or (train is None and (last or self.supervise == "all")):
                asked.append((index, last or bool(train)))
        return asked

    # Supervision: from characters to tokens.

    def _supervise(self, row: Conversation, plan: Plan, written: Written | None) -> TokenizedRow:
        if written is None:
            raise _unexpected_controls(row.origin)
        ids = written.ids
        if len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:
            raise RowRefused("double-bos", "The text begins with two beginning-of-sequence tokens.", row.origin)
        supervised = [False] * len(ids)
        for turn in plan.turns:
            first = self._first_token(row, plan, turn, written)
            stop = written.places[turn.stop]
            if first >= stop:
                raise RowRefused("empty-answer", f"The tokenizer reads nothing in message {turn.message}.", row.origin)
            supervised[first : stop + 1] = [True] * (stop + 1 - first)
        supervised[0] = False
        return TokenizedRow(ids, supervised, row.origin)

    def _first_token(self, row: Conversation, plan: Plan, turn: Turn, written: Written) -> int:
        """Find the token that begins at the turn's first character, and prove that the prompt's tokens end there."""
        start = shrink(turn.start, plan.controls) if written.shrunk else turn.start
        first = written.token_at(start)
        if written.start(first) < start:
            before = [match for match in plan.controls if match.end <= turn.start]
            if not before or written.places[len(before) - 1] != first:
                raise RowRefused(
                    "token-straddles-border",
                    f"A token reaches from the prompt into message {turn.message}, so generation, which is given the "
                    "prompt alone, would start from other tokens. Another variable of the template (template_kwargs) "
                    "or text without white space at that place avoids it.",
                    row.origin,
                )
            first += 1
        else:
            while first and written.start(first - 1) >= start:
                first -= 1
        prompt_ids = self._prompt_ids(row, plan, turn) if turn.prompt_ids is None else turn.prompt_ids
        if prompt_ids is None or written.ids[max(first - len(prompt_ids), 0) : first] != prompt_ids:
            raise other_prompt(row.origin, turn.message)
        return first

    def _prompt_ids(self, row: Conversation, plan: Plan, turn: Turn) -> list[int] | None:
        """Encode the whole prompt of a turn: the way out where no control token sets the prompt's end apart."""
        past = Dialogue(row.messages[: turn.message], row.tools, {**turn.mode, **row.template_kwargs}, row.origin)
        prompt = self._renderer.render(past, for_generation=True)
        if plan.text[: turn.start] != prompt.text:
            return None
        return self._write(prompt, row.origin).ids

    def _supervise_completion(self, row: Completion, written: Written | None) -> TokenizedRow:
        """Supervise the completion of raw text, and the end token behind it.

        The text is encoded in one piece; where a token reaches over the border, prompt and completion are encoded
        apart, as generation would meet them, provided that the pieces still read as the text.
        """
        if written is None:
            raise _unexpected_controls(row.origin)
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise RowRefused("no-end-token", "The tokenizer has no end token to finish the completion.", row.origin)
        ids = written.ids
        first = written.token_at(len(row.prompt)) if row.prompt else 0
        if written.start(first) < len(row.prompt):
            ids, first = self._encode_apart(row, ids)
        while first and ids is written.ids and written.start(first - 1) >= len(row.prompt):
            first -= 1
        length = len(self._prefix_ids) + first
        supervised = [False] * length + [True] * (len(ids) - first + 1)
        supervised[0] = False
        return TokenizedRow([*self._prefix_ids, *ids, eos], supervised, row.origin)

    def _encode_apart(self, row: Completion, joint: list[int]) -> tuple[list[int], int]:
        prompt, completion = self._control_tokens.encode_batch([row.prompt, row.completion], [[], []])
        if prompt is not None and completion is not None:
            ids = [*prompt.ids, *completion.ids]
            decode = self._control_tokens.backend.decode
            if decode(ids, skip_special_tokens=False) == decode(joint, skip_special_tokens=False):
                return ids, len(prompt.ids)
        raise RowRefused(
            "token-straddles-border",
            "A token reaches from the prompt into the completion, and the two cannot be encoded apart. "
            "Begin the completion with the space that ends the prompt.",
            row.origin,
        )

    def _ids_before_text(self) -> list[int]:
        """The tokens, such as a beginning-of-sequence token, that the tokenizer puts before raw text."""
        backend = self._control_tokens.backend
        plain, full = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
        starts = (start for start in range(len(full)) if full[start : start + len(plain)] == plain)
        return list(full[: next(starts, 0)])


def check_stop_tokens(
    stop_token_ids: Iterable[int], generation_eos_ids: int | Iterable[int] | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Hold generation to the contract that it stops at every token that answers were trained to end with.

    Args:
        stop_token_ids: ``ChatTemplate.stop_token_ids``.
        generation_eos_ids: ``eos_token_id`` of the generation configuration.
        tokenizer: Names the tokens in the message.

    Raises:
        ValueError: Generation would run past the end of an answer.
    """
    known = {generation_eos_ids} if isinstance(generation_eos_ids, int) else set(generation_eos_ids or ())
    trained = list(dict.fromkeys(stop_token_ids))
    if missing := [token_id for token_id in trained if token_id not in known]:
        names = ", ".join(f"{tokenizer.convert_ids_to_tokens(token_id)!r} ({token_id})" for token_id in missing)
        raise ValueError(
            f"Answers are trained to end with {names}, but generation stops only at {sorted(known) or 'no token'}: it "
            f"would run on past every answer. Set generation_config.eos_token_id = {sorted(known | set(trained))}."
        )


def _plan_completion(row: Completion) -> Plan:
    text = row.prompt + row.completion
    if not row.completion.strip():
        raise RowRefused("empty-answer", "The completion holds no text.", row.origin)
    check_characters(text, row.origin)
    return Plan(text, (), ())


def _dialogue(row: Conversation) -> Dialogue:
    return Dialogue(row.messages, row.tools, row.template_kwargs, row.origin)


def _unexpected_controls(origin: Origin) -> RowRefused:
    return RowRefused(
        "control-token-mismatch", "The tokenizer reads other control tokens than the chat template wrote.", origin
    )
