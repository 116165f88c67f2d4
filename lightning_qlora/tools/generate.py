"""One prompt, a file of questions, or a chat in the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.evaluation import (
    Answer,
    Question,
    adapters_off,
    decoding_config,
    generate_answers,
    read_questions,
)
from lightning_qlora.evaluation.files import write_whole
from lightning_qlora.evaluation.tables import printable
from lightning_qlora.schema import Message, Origin
from lightning_qlora.tools.loading import (
    AdapterPaths,
    QuantizationName,
    find_adapters,
    load_for_answers,
    plain_model,
    sampling_options,
)

__all__ = ["generate"]

_HELP = """\
/adapter            show the adapters
/adapter NAME|off   answer with this adapter, or as the base
/system TEXT        set the system prompt and start over
/reset              forget the conversation
/help               show this
/quit               leave (or end of input)
An interrupt (Ctrl-C) stops the answer being written."""


def generate(
    adapter: AdapterPaths = None,
    *,
    base: str | None = None,
    revision: str | None = None,
    prompt: str | None = None,
    file: str | None = None,
    output: str | None = None,
    system: str | None = None,
    quantization: QuantizationName = "auto",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    template_kwargs: dict[str, Any] | None = None,
    allow_mismatch: list[str] | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Answer one prompt or a file of questions, or chat in the terminal, with an adapter or the base alone.

    Chat template and stop tokens are those of the training, from the adapter's folder. Without prompt and file it
    chats: answers appear as they are written, and /help lists what else can be typed.

    Args:
        adapter: A PEFT folder, as AdapterCheckpoint writes it, or a run's folder of checkpoints for the newest one;
            several, and the chat can switch between them. Each is named by its folder, or as NAME: FOLDER says.
            Without one the base answers.
        base: The base model: a Hugging Face id, a folder, a .gguf file or package:NAME. Needed without an adapter;
            with one it replaces the base that the adapter names.
        revision: Branch, tag or commit of a base that is a Hugging Face id.
        prompt: Answer this and end.
        file: Answer a file of questions and end: JSONL as for AnswerComparison, or .txt with one prompt a line.
        output: Write the answers to this JSONL file instead of the terminal; goes with file.
        system: A system prompt before each prompt, for questions that bring none.
        quantization: How the base is stored; auto takes what the adapter was trained on, else nf4.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 always takes the most likely token; above it, tokens are drawn at this temperature.
        top_p: Draw from the most likely tokens that make up this share of the probability; 1 for all.
        top_k: Draw from this many most likely tokens; 0 for all.
        repetition_penalty: Above 1, tokens that have occurred become less likely.
        seed: Of the random draws.
        batch_size: Questions of a file that are answered together.
        template_kwargs: Extra variables for the chat template, such as enable_thinking: false.
        allow_mismatch: What may differ from the training when an adapter is loaded: base, quantization, tokenizer,
            chat_template.
        trust_remote_code: Whether Python code from the base's repository may run.
    """
    _check_options(adapter, base, prompt, file, output)
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, batch_size {batch_size}; write whole numbers above 0.")
    sampling = sampling_options(temperature, top_p, top_k, repetition_penalty)
    questions = [] if file is None else _read_file(Path(file), system)
    model, template = load_for_answers(
        find_adapters(adapter),
        base,
        revision=revision,
        quantization=quantization,
        template_kwargs=template_kwargs,
        allow_mismatch=allow_mismatch or (),
        trust_remote_code=trust_remote_code,
    )
    torch.manual_seed(seed)
    if file is not None:
        answers = generate_answers(
            model,
            template,
            questions,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            progress="Answers" if sys.stderr.isatty() else None,
            **sampling,
        )
        _write_answers(questions, answers, output)
        return
    chat = _Chat(model, template, system, decoding_config(model, template, max_new_tokens, **sampling))
    if prompt is not None:
        chat.answer(prompt)
    else:
        chat.run()


class _Chat:
    """A conversation in the terminal."""

    def __init__(
        self, model: PreTrainedModel | PeftModel, template: ChatTemplate, system: str | None, decoding: GenerationConfig
    ) -> None:
        self.model = model
        # The model's own defaults would take part in every option left unset.
        self.decoding = model.generation_config = plain_model(model).generation_config = decoding
        self.template = template
        self.system = system
        self.turns: list[Message] = []
        self.adapters_on = isinstance(model, PeftModel)

    def run(self) -> None:
        """Read lines until the end of the input."""
        with suppress(ImportError):
            import readline  # noqa: F401 - gives input() line editing and a history, where there is such a thing
        print(f"{self._who_answers()} answers. /help lists the commands.")
        while True:
            try:
                line = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if line == "/quit":
                return
            if line.startswith("/"):
                print(self._command(*line.split(maxsplit=1)))
            elif line:
                self.answer(line)

    def answer(self, prompt: str) -> None:
        """Write the answer to one prompt as it comes, and remember both."""
        asked = [*self.turns, Message("user", prompt)]
        system = [] if self.system is None else [Message("system", self.system)]
        try:
            prompt_ids = self.template.encode_prompt([*system, *asked])
        except ValueError as error:
            print(f"The chat template cannot render this: {error}")
            return
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and len(prompt_ids) + self.decoding.max_new_tokens > limit:
            print(f"({len(prompt_ids)} tokens so far, of {limit} that the model can see; /reset starts over.)")
        text = self._stream(prompt_ids)
        if text:
            self.turns = [*asked, Message("assistant", text)]

    def _stream(self, prompt_ids: list[int]) -> str:
        """Generate and print; an interrupt ends the answer where it is."""
        tokenizer = self.template.tokenizer
        streamer = _Recorder(tokenizer, self.decoding.eos_token_id or ())
        input_ids = torch.tensor([prompt_ids], device=next(self.model.parameters()).device)
        base_only = isinstance(self.model, PeftModel) and not self.adapters_on
        try:
            with adapters_off(self.model) if base_only else nullcontext():  # type: ignore[arg-type]
                self.model.generate(  # type: ignore[operator]
                    input_ids=input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    generation_config=self.decoding,
                    streamer=streamer,
                )
        except KeyboardInterrupt:
            streamer.end()  # type: ignore[no-untyped-call]
        return streamer.text

    def _command(self, name: str, argument: str = "") -> str:
        if name == "/adapter":
            return self._switch(argument)
        if name in ("/reset", "/system"):
            self.turns = []
            if name == "/system":
                self.system = argument or None
            return f"Starting over, {'without a' if self.system is None else 'with this'} system prompt."
        return _HELP if name == "/help" else f"Unknown command {name}.\n{_HELP}"

    def _switch(self, name: str) -> str:
        if not isinstance(self.model, PeftModel):
            return "There is no adapter: the base answers."
        known = list(self.model.peft_config)
        if name == "off":
            self.adapters_on = False
        elif name == "on":
            self.adapters_on = True
        elif name in known:
            self.model.set_adapter(name)
            self.adapters_on = True
        elif name:
            return f"There is no adapter {name!r}; there are {', '.join(known)}, on and off."
        return f"{self._who_answers()} answers; adapters: {', '.join(known)}."

    def _who_answers(self) -> str:
        return f"Adapter {self.model.active_adapter}" if self.adapters_on else "The base"


class _Recorder(TextStreamer):
    """Prints an answer as it is generated, without the token that ends it, and keeps its text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[int]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stop = frozenset(stop)
        self.text = ""

    def put(self, value: Tensor) -> None:
        if value.numel() > 1 or self.next_tokens_are_prompt or int(value) not in self.stop:
            super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        super().on_finalized_text(printable(text), stream_end=stream_end)


def _check_options(
    adapter: AdapterPaths, base: str | None, prompt: str | None, file: str | None, output: str | None
) -> None:
    if not adapter and base is None:
        raise ValueError("Nothing to answer with: write --adapter FOLDER, or --base NAME for the base alone.")
    if prompt is not None and file is not None:
        raise ValueError("--prompt and --file are both given; write one of them, or neither to chat.")
    if not isinstance(adapter, str | None) and len(adapter) > 1 and not (prompt is None and file is None):
        raise ValueError("Several adapters are for a chat, which switches between them; compare asks several at once.")
    if output is not None and file is None:
        raise ValueError("--output takes the answers to a --file of questions; none is given.")


def _read_file(path: Path, system: str | None) -> list[Question]:
    if path.suffix == ".txt" and path.is_file():
        lines = path.read_text(encoding="utf-8").split("\n")
        questions = [
            Question(str(number), (Message("user", line),), Origin(str(path), number))
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
    else:
        questions = read_questions(path)
    if system is None:
        return questions
    return [
        question
        if question.messages[0].role == "system"
        else replace(question, messages=(Message("system", system), *question.messages))
        for question in questions
    ]


def _write_answers(questions: list[Question], answers: list[Answer], output: str | None) -> None:
    lines = []
    for question, answer in zip(questions, answers, strict=True):
        messages = [{"role": message.role, "content": message.content} for message in question.messages]
        row = {"id": question.id, "messages": messages, "reference": question.reference, "answer": answer.text}
        lines.append(json.dumps({**row, "stopped": answer.stopped}, ensure_ascii=False) + "\n")
    if output is None:
        sys.stdout.writelines(lines)
        return
    write_whole(Path(output), "".join(lines))
    print(f"{len(lines)} answers written to {output}.", file=sys.stderr)
