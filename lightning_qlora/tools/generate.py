"""One prompt, a file of questions, or a chat in the terminal."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)

from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.evaluation import (
    Answer,
    Question,
    adapters_off,
    decoding_config,
    generate_answers,
    read_questions,
)
from lightning_qlora.evaluation.tables import printable
from lightning_qlora.identity import check_adapter
from lightning_qlora.model import Quantization, compute_dtype, load_adapter, load_base_model, read_adapter_base
from lightning_qlora.pretrained import load_tokenizer
from lightning_qlora.publishing import read_manifest
from lightning_qlora.schema import Message, Origin

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
    adapter: str | list[str] | None = None,
    *,
    base: str | None = None,
    revision: str | None = None,
    prompt: str | None = None,
    file: str | None = None,
    output: str | None = None,
    system: str | None = None,
    quantization: Literal["auto", "nf4", "int8", "none"] = "auto",
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
        adapter: A PEFT folder, as AdapterCheckpoint writes it; several, and the chat can switch between them (each is
            named by its folder). Without one the base answers.
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
    adapters = [adapter] if isinstance(adapter, str) else list(adapter or ())
    _check_options(adapters, base, prompt, file, output)
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, batch_size {batch_size}; write whole numbers above 0.")
    sampling = _sampling_options(temperature, top_p, top_k, repetition_penalty)
    questions = [] if file is None else _read_file(Path(file), system)
    model, template = _load(
        adapters, base, revision, quantization, template_kwargs, list(allow_mismatch or ()), trust_remote_code
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
        self.decoding = model.generation_config = _plain_model(model).generation_config = decoding
        self.template = template
        self.system = system
        self.turns: list[Message] = []
        self.adapters_on = isinstance(model, PeftModel)

    def run(self) -> None:
        """Read lines until the end of the input."""
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
    adapters: list[str], base: str | None, prompt: str | None, file: str | None, output: str | None
) -> None:
    if not adapters and base is None:
        raise ValueError("Nothing to answer with: write --adapter FOLDER, or --base NAME for the base alone.")
    if prompt is not None and file is not None:
        raise ValueError("--prompt and --file are both given; write one of them, or neither to chat.")
    if output is not None and file is None:
        raise ValueError("--output takes the answers to a --file of questions; none is given.")
    names = [_adapter_name(adapter) for adapter in adapters]
    if len(set(names)) < len(names):
        raise ValueError(f"Adapters are named by their folders, and {names} are not distinct. Rename or link one.")


def _sampling_options(temperature: float, top_p: float, top_k: int, repetition_penalty: float) -> dict[str, Any]:
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or repetition_penalty <= 0:
        raise ValueError(
            f"temperature={temperature}, top_p={top_p}, top_k={top_k}, repetition_penalty={repetition_penalty}: "
            "allowed are temperature and top_k from 0, top_p above 0 and up to 1, repetition_penalty above 0."
        )
    options: dict[str, Any] = {} if repetition_penalty == 1 else {"repetition_penalty": repetition_penalty}
    if temperature > 0:
        options |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    return options


def _load(
    adapters: list[str],
    base: str | None,
    revision: str | None,
    quantization: str,
    template_kwargs: dict[str, Any] | None,
    allow_mismatch: list[str],
    trust_remote_code: bool,
) -> tuple[PreTrainedModel | PeftModel, ChatTemplate]:
    """Load the base as the adapters were trained on it, the adapters, and the tokenizer that belongs to them."""
    trained_on = [_adapter_base(Path(adapter)) for adapter in adapters]
    if base is None:
        if len(set(trained_on)) > 1:
            names = ", ".join(name for name, _ in trained_on)
            raise ValueError(f"The adapters name different bases: {names}. Write --base, or one adapter at a time.")
        base, trained_revision = trained_on[0]
        revision = revision or trained_revision
    chosen = _trained_quantization(adapters) if quantization == "auto" else _QUANTIZATIONS[quantization]
    model: PreTrainedModel | PeftModel = load_base_model(
        base, revision=revision, quantization=chosen, trust_remote_code=trust_remote_code
    )
    tokenizer: PreTrainedTokenizerBase
    if adapters and (Path(adapters[0]) / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(adapters[0])  # as training used it, template and padding included
    else:
        tokenizer = load_tokenizer(base, revision=revision, trust_remote_code=trust_remote_code)
    for adapter in adapters:  # all against the bare base
        check_adapter(adapter, model, tokenizer, allow_mismatch)
    for adapter in adapters:
        if isinstance(model, PeftModel):
            _load_another(model, adapter)
        else:
            model = load_adapter(model, adapter, name=_adapter_name(adapter))
    model.eval()
    if adapters and (Path(adapters[0]) / "generation_config.json").is_file():
        stop = GenerationConfig.from_pretrained(adapters[0]).eos_token_id
        _plain_model(model).generation_config.eos_token_id = stop
    return model, ChatTemplate(tokenizer, template_kwargs=template_kwargs)


def _plain_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    plain: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[assignment]
    return plain


def _load_another(model: PeftModel, adapter: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        try:
            model.load_adapter(adapter, adapter_name=_adapter_name(adapter))
        except UserWarning as warning:
            raise ValueError(f"The adapter in {adapter!r} does not fit this base: {str(warning)[:400]}") from warning


def _adapter_name(folder: str) -> str:
    """Name an adapter by its folder; module names cannot hold dots."""
    return Path(folder).resolve().name.replace(".", "_")


_QUANTIZATIONS: dict[str, Quantization] = {"nf4": "nf4", "int8": "int8", "none": None}


def _adapter_base(folder: Path) -> tuple[str, str | None]:
    """Read which base, and which revision of it, an adapter was trained on."""
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{str(folder)!r} is no adapter folder: it holds no adapter_config.json. Write the folder that "
            "AdapterCheckpoint or PEFT's save_pretrained made."
        )
    return read_adapter_base(folder)


def _trained_quantization(adapters: list[str]) -> Quantization:
    """Read from the manifest how the base was stored in training; NF4, with a remark, where nothing says it."""
    manifest = read_manifest(adapters[0]) if adapters else None
    identity = {} if manifest is None else manifest.metadata.get("identity") or {}
    if "quantization" not in identity:
        if adapters:
            print("How the base was stored in training is not known: loading it in 4-bit NF4.", file=sys.stderr)
        return "nf4"
    options = identity["quantization"]
    if options is None:
        return None
    # The compute dtype is that of this machine, which need not be the one that trained.
    config: BitsAndBytesConfig = BitsAndBytesConfig.from_dict({**options, "bnb_4bit_compute_dtype": compute_dtype()})
    return config


def _read_file(path: Path, system: str | None) -> list[Question]:
    if path.suffix == ".txt" and path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
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
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.part")
    staging.write_text("".join(lines), encoding="utf-8")
    staging.replace(target)
    print(f"{len(lines)} answers written to {target}.", file=sys.stderr)
