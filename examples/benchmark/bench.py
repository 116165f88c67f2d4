"""Speed and memory of fit itself on one GPU, beside a check that it computes what it should.

    python examples/benchmark/bench.py suite                          # everything, one process a measurement
    python examples/benchmark/bench.py run full2k --plan none         # one measurement
    python examples/benchmark/bench.py gate full2k --plan selective   # loss and gradients against float32
    python examples/benchmark/bench.py context --cap_gib 24           # the longest document that trains
    python examples/benchmark/bench.py suite --device cpu --shape tiny --steps 3 --warmup 1

Every measurement prints one JSON line. README.md beside this file says what the cases are and what the lines hold.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
import random  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from contextlib import nullcontext, redirect_stdout  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402

import bitsandbytes  # noqa: E402
import lightning as L  # noqa: E402
import numpy as np  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from bitsandbytes.nn import Linear4bit, Params4bit  # noqa: E402
from peft import LoraConfig  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel  # noqa: E402
from typing_extensions import override  # noqa: E402

from lightning_qlora import PerformanceMonitor, SFTModule  # noqa: E402
from lightning_qlora.data.collators import Document, PackedCollator  # noqa: E402
from lightning_qlora.data.packing import pack_documents  # noqa: E402
from lightning_qlora.kernels.compilation import compile_parts  # noqa: E402
from lightning_qlora.kernels.lora import is_fused  # noqa: E402
from lightning_qlora.memory import MemoryModel, build_optimizer, optimizer_memory, skeleton_of  # noqa: E402
from lightning_qlora.model import attach_adapters, checkpointed_layers, nf4, set_activation_checkpointing  # noqa: E402

IMPORTED = time.perf_counter()
GIB = 2**30


class Case(NamedTuple):
    """Rows of a batch, their lengths, and whether they are packed to the budget of so many full rows."""

    kind: str
    max_length: int
    rows: int
    packed: bool = False


CASES = {
    "full2k": Case("full", 2048, 4),
    "full8k": Case("full", 8192, 1),
    "chat2k": Case("chat", 2048, 4),
    "chat2k_16": Case("chat", 2048, 16),
    "chat2k_pack": Case("chat", 2048, 4, packed=True),
}

SHAPES: dict[str, dict[str, int]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
}  # fmt: skip
SHRUNK = 32  # a tiny shape has rows of so many times fewer tokens

SUITE = [
    "gate full2k --plan none", "gate chat2k_pack --plan selective", "gate full2k --plan offload",
    "gate full2k --plan full --compile_layers", "run full2k --plan full --compile_layers",
    "run full2k --plan none --compile_layers", "run chat2k_pack --plan full --compile_layers",
    "run full2k --plan none", "run full2k --plan none --fused_lora false",
    "run full2k --plan full", "run full2k --plan full --fused_lora false",
    "run full2k --plan selective", "run full2k --plan offload", "run full2k --plan auto",
    "run full8k --plan full", "run chat2k --plan full", "run chat2k_16 --plan auto",
    "run chat2k_pack --plan full", "run chat2k_pack --plan none",
    "run full2k --plan auto --cap_gib 24", "run full2k --plan auto --cap_gib 16", "run full2k --plan auto --cap_gib 8",
    "context --cap_gib 8", "context --cap_gib 24",
]  # fmt: skip


# Data: random rows of seed 0, in the order they are made


def make_rows(case: Case, count: int, vocab: int, shrink: int) -> list[Document]:
    source, documents = random.Random(0), []
    longest = case.max_length // shrink
    low, high = (1000, 49000) if vocab > 49000 else (3, vocab)
    for number in range(count):
        length = longest
        if case.kind == "chat":
            length = max(32 // shrink + 2, min(longest, int(source.lognormvariate(6.0, 0.8)) // shrink))
        ids = [source.randrange(low, high) for _ in range(length)]
        cut = max(1, int(length * source.uniform(0.2, 0.6)))
        documents.append(Document(np.array(ids, dtype=np.int32), np.array([[cut, length]], dtype=np.int32), number))
    return documents


class Batches(L.LightningDataModule):
    """The case's batches, each one flat row of isolated documents."""

    def __init__(self, case: Case, steps: int, vocab: int, shrink: int) -> None:
        super().__init__()
        self.max_length = case.max_length // shrink
        self.tokens_per_batch = self.max_length * case.rows
        rows = make_rows(case, steps * case.rows * (8 if case.packed else 1), vocab, shrink)
        groups: Any = [range(i * case.rows, (i + 1) * case.rows) for i in range(steps)]
        if case.packed:
            groups = list(pack_documents([len(row.input_ids) for row in rows], self.tokens_per_batch))[:steps]
        self.batches = [PackedCollator()([rows[i] for i in group]) for group in groups]
        assert len(self.batches) == steps

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.batches, batch_size=None, num_workers=0)  # type: ignore[arg-type]


# The model: random weights, made where they are used


def random_base(shape: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return a Llama of a shape with random NF4 weights, as loading one would."""
    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=131072, rope_theta=500000.0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False, dtype=dtype,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    for parent in list(model.model.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(parent, name, quantised(linear, device, dtype))
    model.config.quantization_config = nf4(dtype)
    stateful: Any = model
    stateful.is_quantized = stateful.is_loaded_in_4bit = True
    return model.requires_grad_(False)


def quantised(linear: nn.Linear, device: torch.device, dtype: torch.dtype) -> Linear4bit:
    layer = Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    weight = Params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    )
    layer.weight = weight.to(device)
    layer.support_avx512bf16_for_cpu = False
    return layer


class Module(SFTModule):
    """SFTModule on a random base; its adapters begin where their gradients are all there."""

    shape = "8b"

    @override
    def load_base(self, device: torch.device | None) -> PreTrainedModel:
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return random_base(self.shape, device, dtype)

    @override
    def on_model_built(self) -> None:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in self.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(0.01 * torch.randn(parameter.shape, generator=generator))


def make_module(options: argparse.Namespace) -> Module:
    lora = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    fused = {"true": True, "false": False, "auto": "auto"}[options.fused_lora]
    module = Module(
        "random", lora=lora, lr=2e-4, lr_scheduler=None, activation_checkpointing=options.plan, fused_lora=fused,
        untrained_tokens="ignore", compile_layers=options.compile_layers,
    )  # fmt: skip
    module.shape = options.shape
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
        self.losses.append(outputs["loss"].detach() / batch["targets"].numel())
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


class CappedModule(Module):
    """Sets the share of the GPU's memory when the base is there, before auto looks at what is free."""

    cap_gib: float | None = None

    @override
    def on_model_built(self) -> None:
        super().on_model_built()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            if self.cap_gib is not None:
                total = torch.cuda.get_device_properties(0).total_memory
                torch.cuda.set_per_process_memory_fraction(self.cap_gib * GIB / total)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Fit a case and return what it took."""
    on_gpu = options.device == "cuda"
    case, shrink = CASES[options.case], SHRUNK if options.shape == "tiny" else 1
    steps = options.steps + options.warmup
    data = Batches(case, steps, SHAPES[options.shape]["vocab_size"], shrink)
    module = make_module(options)
    module.__class__ = CappedModule
    module.cap_gib = options.cap_gib
    clock = Clock(on_gpu)
    begun = time.perf_counter()
    make_trainer(options, steps, [clock, PerformanceMonitor()]).fit(module, data)
    seconds = clock.seconds()[options.warmup :]
    counted = data.batches[options.warmup :]
    tokens = sum(sum(batch["document_lengths"]) for batch in counted)
    supervised = sum(batch["targets"].numel() for batch in counted)
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
        "tokens_per_step": round(tokens / len(counted)),
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
    shrink = SHRUNK if options.shape == "tiny" else 1
    device = torch.device(options.device)
    batch: Any = Batches(CASES[options.case], 1, SHAPES[options.shape]["vocab_size"], shrink).batches[0]
    batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    module = make_module(options)
    module.configure_model()
    if options.compile_layers:  # fit does so once it has chosen a plan
        compile_parts(checkpointed_layers(module.model.get_base_model()), module.layer_plan or "full")
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


def reference(module: Module, batch: Any) -> tuple[float, dict[str, Tensor]]:
    """Return the mean loss and the adapters' gradients of plain transformers and PEFT in float32."""
    adapted: Any = module.model
    live = adapted.get_base_model()
    device = next(live.parameters()).device
    config = LlamaConfig(**{**live.config.to_dict(), "quantization_config": None})
    if hasattr(config, "quantization_config"):
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
    module = make_module(argparse.Namespace(**{**vars(options), "plan": "offload"}))
    module.__class__ = CappedModule
    module.cap_gib = options.cap_gib
    module.configure_model()
    assert module.model is not None
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
        case = Case("full", length, 1)
        data = Batches(case, 2, SHAPES[options.shape]["vocab_size"], 1)
        try:
            make_trainer(options, 2, []).fit(module, data)
            break
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            length = int(0.97 * length) // 64 * 64
    peak = torch.cuda.max_memory_allocated() / GIB if on_gpu else None
    return {"estimated": estimated, "context": length, "peak_gib": peak and round(peak, 2), "plan_used": "offload"}


def suite(arguments: list[str]) -> int:
    """Run each measurement in a process of its own, and go on where one fails."""
    failed = 0
    for line in SUITE:
        command = [sys.executable, __file__, *line.split(), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            failed += 1
            tail = result.stderr.strip().splitlines()[-6:]
            print(json.dumps({"command": line, "failed": result.returncode, "stderr": tail}), flush=True)
        else:
            print(result.stdout.strip(), flush=True)
    return failed


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "gate", "context"])
    parser.add_argument("case", nargs="?", choices=sorted(CASES), default="full2k")
    parser.add_argument("--plan", default="full", choices=["none", "selective", "full", "offload", "auto"])
    parser.add_argument("--fused_lora", default="auto", choices=["auto", "true", "false"])
    parser.add_argument("--compile_layers", action="store_true")
    parser.add_argument("--cap_gib", type=float, help="share of the GPU's memory that the process may take")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shape", default="8b", choices=sorted(SHAPES))
    return parser.parse_args(arguments)


def main() -> None:
    if sys.argv[1:2] == ["suite"]:
        sys.exit(suite(sys.argv[2:]))
    options = parse(sys.argv[1:])
    with redirect_stdout(sys.stderr):
        result = {"run": measure, "gate": gate, "context": longest_context}[options.what](options)
    versions = {library.__name__: library.__version__ for library in (torch, transformers, peft, bitsandbytes)}
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    print(json.dumps({**vars(options), **result, "device_name": device, **versions}), flush=True)
    sys.exit(0 if result.get("passed", True) else 1)


if __name__ == "__main__":
    main()
