"""The same work by other trainers: TRL, TRL with Liger's kernels, and Unsloth, each as its users set it up.

    python examples/benchmark/peers.py make /tmp/base --shape 8b       # a random checkpoint, written once
    python examples/benchmark/peers.py run trl full2k /tmp/base        # trl, trl-liger, unsloth
    python examples/benchmark/peers.py run unsloth chat2k_pack /tmp/base --plan none
    python examples/benchmark/peers.py run trl dpo /tmp/base
    torchrun --nproc-per-node=2 examples/benchmark/peers.py run trl full2k /tmp/base --strategy fsdp

Rows, their order, the supervised tokens and the trained parameters are those of bench.py; a peer gets the ids, and
tokenises nothing. Each run prints one JSON line. What is timed is a whole optimizer step, between two synchronisations.

Under torchrun each rank has as many rows as one GPU would, and reads and quantises the whole base on its own device.
``ddp`` is Trainer's default; ``fsdp`` is FSDP2 with 4-bit weights stored as bfloat16, transformer layers wrapped, and
FSDP's own activation checkpointing. Rank 0 prints: tokens of all ranks over its own time, and the peak of each.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from contextlib import redirect_stdout  # noqa: E402
from importlib.metadata import version  # noqa: E402
from typing import Any  # noqa: E402

from cases import CASES, GIB, SHAPES, Case, cap_memory, case_of, random_pairs, random_rows, summary  # noqa: E402

RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def make(options: argparse.Namespace) -> dict[str, Any]:
    """Write a checkpoint with random weights, and a tokenizer that peers ask for and never need."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[options.shape]), dtype=torch.bfloat16)
    model.generation_config.pad_token_id = model.config.pad_token_id = 2
    model.save_pretrained(options.checkpoint, max_shard_size="4GB")
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer) if options.tokenizer else _bytes_tokenizer()
    tokenizer.save_pretrained(options.checkpoint)
    return {}


def _bytes_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    alphabet = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def load(options: argparse.Namespace, max_length: int) -> tuple[Any, Any]:
    """Return the peer's 4-bit model, and the adapters that its trainer will attach, if it does."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    on_gpu = options.device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if options.peer == "unsloth":
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            options.checkpoint, max_seq_length=max_length, load_in_4bit=True, dtype=dtype, local_files_only=True
        )
        model = FastLanguageModel.get_peft_model(
            model, r=options.rank, lora_alpha=2 * options.rank, lora_dropout=0.0, target_modules=PROJECTIONS,
            bias="none", use_gradient_checkpointing="unsloth" if options.plan == "full" else False,
        )  # fmt: skip
        return model, None
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        **({"bnb_4bit_quant_storage": dtype} if options.strategy == "fsdp" else {}),
    )
    model = AutoModelForCausalLM.from_pretrained(
        options.checkpoint, quantization_config=quantization, dtype=dtype, attn_implementation="sdpa",
        device_map={"": LOCAL_RANK if on_gpu else "cpu"},
    )  # fmt: skip
    adapters = LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, lora_dropout=0.0, target_modules=PROJECTIONS, bias="none",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return model, adapters


def make_trainer(options: argparse.Namespace, case: Case, folder: str) -> tuple[Any, Any]:
    """Return the peer's trainer on the case's rows, and what it is asked to count and time."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    model, adapters = load(options, case.max_length)
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    steps, vocab = options.steps + options.warmup, SHAPES[options.shape]["vocab_size"]
    count = steps * case.rows * WORLD_SIZE
    common: dict[str, Any] = {
        "output_dir": folder, "per_device_train_batch_size": case.rows, "learning_rate": 2e-4, "max_steps": steps,
        "gradient_accumulation_steps": 1, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "max_length": case.max_length,
        "gradient_checkpointing": options.plan == "full", "bf16": options.device == "cuda",
        "optim": "adamw_torch_fused" if options.device == "cuda" else "adamw_torch",
        "ddp_find_unused_parameters": False,
        "use_cpu": options.device == "cpu", "shuffle_dataset": False, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    if options.strategy == "fsdp":
        wrapped = {"activation_checkpointing": common.pop("gradient_checkpointing")}
        common |= {"fsdp": True, "fsdp_config": wrapped, "gradient_checkpointing": False}
    if case.kind == "pairs":
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        rows = [dict(zip(names, pair, strict=True)) for pair in random_pairs(case, count, vocab)]
        del common["shuffle_dataset"]

        class OnIds(DPOTrainer):
            def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
                return dataset

        arguments, kind = DPOConfig(**common), OnIds
    else:
        rows = [
            {"input_ids": ids, "completion_mask": [0] * cut + [1] * (len(ids) - cut)}
            for ids, cut in random_rows(case, count * (8 if case.packed else 1), vocab)
        ]
        arguments, kind = (
            SFTConfig(
                **common, packing=case.packed, completion_only_loss=True, use_liger_kernel=options.peer == "trl-liger"
            ),
            SFTTrainer,
        )
    counter = _counter(options.device == "cuda", options.strategy == "fsdp")
    trainer = kind(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        callbacks=[counter], peft_config=adapters,
    )  # fmt: skip
    inner = trainer.compute_loss

    def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        counter.count(inputs)
        return inner(model, inputs, *args, **kwargs)

    trainer.compute_loss = counted
    return trainer, counter


def check_is_sharded(model: Any) -> None:
    """Refuse to measure as FSDP what is whole on each rank: neither TRL nor accelerate says so.

    Raises:
        RuntimeError: With the first parameter that is whole.
    """
    from torch.distributed.tensor import DTensor

    whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if whole:
        raise RuntimeError(f"{len(whole)} parameters are whole on each rank, {whole[0]} first.")


def _counter(on_gpu: bool, sharded: bool) -> Any:
    """Return a callback that times steps, and counts their real and supervised tokens."""
    import torch
    from transformers import TrainerCallback

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    class Counter(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.tokens: list[int] = []
            self.supervised: list[int] = []
            self.first_begun = self.first_step = 0.0
            self.start_peak: float | None = None

        def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
            if sharded:
                check_is_sharded(model)
            if on_gpu:
                self.start_peak = peak_gib()
                torch.cuda.reset_peak_memory_stats()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = now()
            self.first_begun = self.first_begun or self.begun
            self.tokens.append(0)
            self.supervised.append(0)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ended = now()
            self.seconds.append(ended - self.begun)
            self.first_step = self.first_step or ended

        def count(self, inputs: Any) -> None:
            mask, labels = inputs.get("attention_mask"), inputs.get("labels")
            self.tokens[-1] += int(inputs["input_ids"].numel() if mask is None else mask.sum())
            supervised = inputs["completion_mask"].sum() if labels is None else (labels != -100).sum()
            self.supervised[-1] += int(supervised)

    return Counter()


def peak_gib() -> float:
    """Return the most that torch has held of this rank's GPU since it was last asked to forget."""
    import torch

    return round(torch.cuda.max_memory_allocated() / GIB, 2)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train a peer on a case and return what it took, on all ranks together."""
    if options.peer == "unsloth":
        import unsloth  # noqa: F401  # which must come before what it patches
    import torch

    on_gpu = options.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(LOCAL_RANK)
    cap_memory(options.cap_gib, LOCAL_RANK)
    with tempfile.TemporaryDirectory() as folder:
        trainer, counter = make_trainer(options, case_of(options), folder)
        built = time.perf_counter()
        trainer.train()
    counts = [sum(each[options.warmup :]) for each in (counter.tokens, counter.supervised)]
    ranks: list[Any] = [[*counts, peak_gib() if on_gpu else None, counter.start_peak]]
    if WORLD_SIZE > 1:
        ranks *= WORLD_SIZE
        torch.distributed.all_gather_object(ranks, ranks[RANK])
    tokens, supervised, peaks, start_peaks = zip(*ranks, strict=True)
    return {
        "devices": WORLD_SIZE,
        **summary(counter.seconds[options.warmup :], sum(tokens), sum(supervised)),
        "peak_gib": peaks if torch.distributed.is_torchelastic_launched() else peaks[0],
        "start_peak_gib": start_peaks,
        "losses": [round(each["loss"], 4) for each in trainer.state.log_history if "loss" in each][:3],
        "build_s": round(built - STARTED, 2),
        "start_s": round(counter.first_begun - STARTED, 2),
        "first_step_s": round(counter.first_step - built, 2),
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "device_name": torch.cuda.get_device_name() if on_gpu else "cpu",
        **{name: version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")},
        **({"unsloth": version("unsloth")} if options.peer == "unsloth" else {}),
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    makes = commands.add_parser("make", help="write a random checkpoint")
    makes.add_argument("--tokenizer", help="a folder with another tokenizer than the one of bytes")
    runs = commands.add_parser("run", help="train one peer on one case")
    runs.add_argument("peer", choices=["trl", "trl-liger", "unsloth"])
    runs.add_argument("case", choices=sorted(CASES))
    runs.add_argument("--plan", default="full", choices=["full", "none"], help="activation checkpointing")
    runs.add_argument("--rank", type=int, default=16)
    runs.add_argument("--max_length", type=int)
    runs.add_argument("--rows", type=int)
    runs.add_argument("--steps", type=int, default=10)
    runs.add_argument("--warmup", type=int, default=4)
    runs.add_argument("--strategy", default="ddp", choices=["ddp", "fsdp"], help="of several devices, with torchrun")
    runs.add_argument("--cap_gib", type=float, help="GiB that torch may take of each GPU, from the start")
    for command in (makes, runs):
        command.add_argument("checkpoint")
        command.add_argument("--shape", default="8b", choices=sorted(SHAPES))
        command.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    options = parser.parse_args(arguments)
    if options.what == "run" and WORLD_SIZE == 1 and options.strategy == "fsdp":
        parser.error("--strategy fsdp shares a model among devices. Write torchrun --nproc-per-node=2 before peers.py.")
    if options.what == "run" and options.device == "cpu" and options.strategy == "fsdp":
        parser.error("--strategy fsdp: accelerate has it for GPUs only. Write --strategy ddp on CPUs.")
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    with redirect_stdout(sys.stderr):
        result = {"make": make, "run": run}[options.what](options)
    if RANK == 0:
        print(json.dumps({**vars(options), **result}), flush=True)


if __name__ == "__main__":
    main()
