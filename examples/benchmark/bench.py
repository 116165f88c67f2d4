"""Speed and memory of fit itself on one GPU, beside a check that it computes what it should.

    python examples/benchmark/bench.py run full2k --plan none         # one measurement
    python examples/benchmark/bench.py run dpo                        # pairs
    python examples/benchmark/bench.py gate full2k --plan selective   # loss and gradients against float32
    python examples/benchmark/bench.py context --cap_gib 24           # the longest document that trains
    python examples/benchmark/bench.py run full2k --device cpu --shape tiny --steps 3 --warmup 1

Every measurement prints one JSON line. README.md beside this file says what the cases are and what the lines hold.
everything.py runs them all, beside the peers and the floor.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402
import copy  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
from contextlib import nullcontext, redirect_stdout  # noqa: E402
from typing import Any  # noqa: E402

import bitsandbytes  # noqa: E402
import lightning as L  # noqa: E402
import numpy as np  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from cases import CASES, GIB, SHAPES, SHRUNK, Case, random_pairs, random_rows  # noqa: E402
from peft import LoraConfig  # noqa: E402
from random_base import random_base  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import LlamaForCausalLM, PreTrainedModel  # noqa: E402
from typing_extensions import override  # noqa: E402

from lightning_qlora import PerformanceMonitor, PreferenceModule, SFTModule  # noqa: E402
from lightning_qlora.data.collators import AnswerKind, Document, PackedCollator  # noqa: E402
from lightning_qlora.data.packing import pack_documents  # noqa: E402
from lightning_qlora.data.preference_batching import PreferenceBatching  # noqa: E402
from lightning_qlora.kernels.compilation import compile_decoder  # noqa: E402
from lightning_qlora.kernels.lora import is_fused  # noqa: E402
from lightning_qlora.memory import MemoryModel, build_optimizer, optimizer_memory, skeleton_of  # noqa: E402
from lightning_qlora.model import attach_adapters, checkpointed_layers, set_activation_checkpointing  # noqa: E402

IMPORTED = time.perf_counter()

# Data


def make_case(options: argparse.Namespace) -> Case:
    """Return the case that the options name, in miniature for a tiny shape."""
    case = CASES[options.case]
    shrink = SHRUNK if options.shape == "tiny" else 1
    return case._replace(max_length=(options.max_length or case.max_length) // shrink, rows=options.rows or case.rows)


def make_documents(case: Case, count: int, vocab: int) -> list[Document]:
    """Return so many rows as documents."""
    return [
        Document(np.array(ids, dtype=np.int32), np.array([[cut, len(ids)]], dtype=np.int32), number)
        for number, (ids, cut) in enumerate(random_rows(case, count, vocab))
    ]


def make_answers(case: Case, count: int, vocab: int) -> list[Document]:
    """Return the two answers of so many pairs, side by side, each behind its prompt."""
    documents: list[Document] = []
    for prompt, *answers in random_pairs(case, count, vocab):
        for answer, kind in zip(answers, (AnswerKind.CHOSEN, AnswerKind.REJECTED), strict=True):
            ids = np.array(prompt + answer, dtype=np.int32)
            spans = np.array([[len(prompt), len(ids)]], dtype=np.int32)
            documents.append(Document(ids, spans, len(documents), kind))
    return documents


class Batches(L.LightningDataModule):
    """The case's batches, each one flat row of isolated documents."""

    def __init__(self, case: Case, steps: int, vocab: int) -> None:
        super().__init__()
        self.tokens_per_batch = case.max_length * case.rows
        collate: Any = PackedCollator()
        if case.kind == "pairs":
            documents, each = make_answers(case, steps * case.rows, vocab), 2 * case.rows
            collate = PreferenceBatching(True, self.tokens_per_batch, case.rows, share_prompts=True).collate
        else:
            documents, each = make_documents(case, steps * case.rows * (8 if case.packed else 1), vocab), case.rows
        numbers: Any = [range(i * each, (i + 1) * each) for i in range(steps)]
        if case.packed:
            numbers = list(pack_documents([len(row.input_ids) for row in documents], self.tokens_per_batch))[:steps]
        groups = [[documents[i] for i in group] for group in numbers]
        self.batches = [collate(group) for group in groups]
        # A prompt counts with each of its answers, however often it is computed.
        self.num_tokens = [sum(len(document.input_ids) for document in group) for group in groups]
        assert len(self.batches) == steps

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.batches, batch_size=None, num_workers=0)  # type: ignore[arg-type]


# The model


class Measured:
    """A module on a random base, whose memory may be capped once the base is there, before auto looks what is free."""

    shape = "8b"
    cap_gib: float | None = None

    def load_base(self, device: torch.device | None) -> PreTrainedModel:
        """Make the base where it trains."""
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return random_base(self.shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)

    def on_model_built(self) -> None:
        """Count memory from here on."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            if self.cap_gib is not None:
                total = torch.cuda.get_device_properties(0).total_memory
                torch.cuda.set_per_process_memory_fraction(self.cap_gib * GIB / total)


class Module(Measured, SFTModule):
    """SFTModule whose adapters begin where their gradients are all there."""

    @override
    def on_model_built(self) -> None:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in self.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(0.01 * torch.randn(parameter.shape, generator=generator, device="cpu"))
        super().on_model_built()


class Preferences(Measured, PreferenceModule):
    """PreferenceModule, whose reference is the base without adapters."""


def make_module(options: argparse.Namespace) -> Module | Preferences:
    lora = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    kind: Any = Preferences if options.case == "dpo" else Module
    module: Module | Preferences = kind(
        "random", lora=lora, lr=2e-4, lr_scheduler=None, activation_checkpointing=options.plan,
        fused_lora={"true": True, "false": False, "auto": "auto"}[options.fused_lora],
        untrained_tokens="ignore", compile_layers=options.compile_layers,
    )  # fmt: skip
    module.shape, module.cap_gib = options.shape, options.cap_gib
    return module


def make_trainer(options: argparse.Namespace, steps: int, callbacks: list[L.Callback]) -> L.Trainer:
    return L.Trainer(
        accelerator="gpu" if options.device == "cuda" else "cpu", devices=1, max_steps=steps, max_epochs=1,
        precision="bf16-mixed" if options.device == "cuda" else "32-true", logger=False, callbacks=callbacks,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


# One measurement


class Clock(L.Callback):
    """Times steps by events that nobody waits for, and notes when the first step is over."""

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.marks: list[Any] = []
        self.losses: list[Tensor] = []
        self.first_step = self.built = 0.0
        self.plan = ""
        self.fused = False

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.built = time.perf_counter()
        self.plan, self.fused = str(pl_module.layer_plan), is_fused(pl_module)

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        self.marks.append(self.mark())

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        terms = len(batch["chosen"]) if "chosen" in batch else batch["targets"].numel()
        self.losses.append(outputs["loss"].detach() / terms)
        if index == 0:
            if self.on_gpu:
                torch.cuda.synchronize()
            self.first_step = time.perf_counter()

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.marks.append(self.mark())
        if self.on_gpu:
            torch.cuda.synchronize()

    def mark(self) -> Any:
        """Return this moment on the device, or on the host where there is none."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> list[float]:
        """Return how long each step took."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [one.elapsed_time(two) / 1000 if self.on_gpu else two - one for one, two in pairs]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Fit a case and return what it took."""
    on_gpu = options.device == "cuda"
    steps = options.steps + options.warmup
    data = Batches(make_case(options), steps, SHAPES[options.shape]["vocab_size"])
    module = make_module(options)
    clock = Clock(on_gpu)
    begun = time.perf_counter()
    make_trainer(options, steps, [clock, PerformanceMonitor()]).fit(module, data)
    seconds = clock.seconds()[options.warmup :]
    tokens = sum(data.num_tokens[options.warmup :])
    supervised = sum(batch["targets"].numel() for batch in data.batches[options.warmup :])
    ordered = sorted(seconds)
    memory = {}
    if on_gpu:
        memory = {
            "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
        }
    return {
        "plan_used": clock.plan,
        "fused": clock.fused,
        "tok_s": round(tokens / sum(seconds)),
        "sup_tok_s": round(supervised / sum(seconds)),
        "tokens_per_step": round(tokens / len(seconds)),
        "step_ms": {f"p{p}": round(1000 * ordered[round(p / 100 * (len(ordered) - 1))], 2) for p in (5, 50, 95)},
        "mean_step_ms": round(1000 * statistics.mean(seconds), 2),
        **memory,
        "losses": [round(loss.item(), 4) for loss in clock.losses[:3]],
        "import_s": round(IMPORTED - STARTED, 2),
        "build_s": round(clock.built - begun, 2),
        "first_step_s": round(clock.first_step - clock.built, 2),
        "trainable": sum(p.numel() for p in module.parameters() if p.requires_grad),
    }


# The check


def gate(options: argparse.Namespace) -> dict[str, Any]:
    """Compare step 1 with float32 on the dequantised weights, each document by itself, with PEFT's own code."""
    device = torch.device(options.device)
    batch: Any = Batches(make_case(options), 1, SHAPES[options.shape]["vocab_size"]).batches[0]
    batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    module: Any = make_module(options)
    module.configure_model()
    if options.compile_layers:  # fit does so once it has chosen a plan
        base = module.model.get_base_model()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        compile_decoder(base, checkpointed_layers(base), module.layer_plan or "full", dtype=dtype)
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    with autocast:
        loss = module.token_loss(batch)
    loss.loss_sum.backward()
    found = {name: p.grad.double().cpu() for name, p in module.model.named_parameters() if p.grad is not None}
    expected_loss, expected = reference(module, batch)
    assert found.keys() == expected.keys()
    ours, theirs = (torch.cat([gradients[name].flatten() for name in expected]) for gradients in (found, expected))
    difference = abs(loss.loss_sum.item() / loss.num_tokens - expected_loss)
    cosine = torch.nn.functional.cosine_similarity(ours, theirs, 0).item()
    worst = min(torch.nn.functional.cosine_similarity(found[n].flatten(), g.flatten(), 0).item()
                for n, g in expected.items())  # fmt: skip
    return {
        "loss": round(expected_loss, 5),
        "loss_difference": difference,
        "gradient_cosine": cosine,
        "worst_tensor_cosine": worst,
        "fused": is_fused(module),
        "passed": difference <= 1e-3 and cosine >= 0.999,  # NaN never passes
    }


def reference(module: Any, batch: Any) -> tuple[float, dict[str, Tensor]]:
    """Return the mean loss and the adapters' gradients of plain transformers and PEFT in float32."""
    adapted = module.model
    live = adapted.get_base_model()
    device = next(live.parameters()).device
    config = copy.deepcopy(live.config)
    del config.quantization_config
    config._attn_implementation = "sdpa"
    with device:
        plain = LlamaForCausalLM._from_config(config, dtype=torch.float32)
    modules = dict(live.named_modules())
    for name, linear in plain.named_modules():
        if isinstance(linear, nn.Linear) and name != "lm_head":
            weight = modules[name].base_layer.weight
            linear.weight.data = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    others = {n: p for n, p in live.named_parameters() if "proj" not in n}
    for name, parameter in plain.named_parameters():
        if name in others:
            parameter.data = others[name].data.float()
    model = attach_adapters(plain.requires_grad_(False), adapted.peft_config["default"])
    values = dict(adapted.named_parameters())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = values[name].data.clone()
    set_activation_checkpointing(plain, "full")
    start, total = 0, 0.0
    for length in batch["document_lengths"]:
        ids, labels = (batch[name][:, start : start + length] for name in ("input_ids", "labels"))
        logits = model(input_ids=ids, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
        loss.backward()
        total, start = total + loss.item(), start + length
    gradients = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return total / batch["targets"].numel(), gradients


# The longest context


def longest_context(options: argparse.Namespace) -> dict[str, Any]:
    """Estimate the longest document that fits, train on it, and shorten it by 3 % until it does."""
    on_gpu = options.device == "cuda"
    module: Any = make_module(argparse.Namespace(**{**vars(options), "plan": "offload"}))
    module.configure_model()
    memory = MemoryModel(
        skeleton_of(module.model),
        optimizer_memory(build_optimizer(module.optimizer, module.model), on_gpu=on_gpu),
        autocast=torch.bfloat16 if on_gpu else None,
        device="cuda" if on_gpu else "cpu",
    )
    budget = int(0.95 * (options.cap_gib or 8) * GIB) if on_gpu else memory.estimate(2048, plan="offload").peak
    low, high = 64, 2_000_000
    while high - low > 64:
        middle = (low + high) // 2
        low, high = (middle, high) if memory.estimate(middle, plan="offload").peak <= budget else (low, middle)
    estimated = length = low // 64 * 64
    while True:
        data = Batches(Case("full", length, 1), 2, SHAPES[options.shape]["vocab_size"])
        try:
            make_trainer(options, 2, []).fit(module, data)
            break
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            length = int(0.97 * length) // 64 * 64
    peak = torch.cuda.max_memory_allocated() / GIB if on_gpu else None
    return {"estimated": estimated, "context": length, "peak_gib": peak and round(peak, 2), "plan_used": "offload"}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "gate", "context"])
    parser.add_argument("case", nargs="?", choices=sorted(CASES), default="full2k")
    parser.add_argument("--plan", default="full", choices=["none", "selective", "full", "offload", "auto"])
    parser.add_argument("--fused_lora", default="auto", choices=["auto", "true", "false"])
    parser.add_argument("--compile_layers", action="store_true")
    parser.add_argument("--cap_gib", type=float, help="share of the GPU's memory that the process may take")
    parser.add_argument("--max_length", type=int, help="of a row, instead of the case's")
    parser.add_argument("--rows", type=int, help="in a batch, instead of the case's")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shape", default="8b", choices=sorted(SHAPES))
    return parser.parse_args(arguments)


def main() -> None:
    options = parse(sys.argv[1:])
    with redirect_stdout(sys.stderr):
        result = {"run": measure, "gate": gate, "context": longest_context}[options.what](options)
    versions = {library.__name__: library.__version__ for library in (torch, transformers, peft, bitsandbytes)}
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    print(json.dumps({**vars(options), **result, "device_name": device, **versions}), flush=True)
    sys.exit(0 if result.get("passed", True) else 1)


if __name__ == "__main__":
    main()
