"""Train under a storm of kills, terminations and full disks, and end bit for bit where the calm run ends.

    python examples/storm/storm.py --incidents 30 --seed 0

A tiny 4-bit model learns from the support tickets, with dropout, shuffling, packing, accumulated gradients and
validation inside the epochs. First it trains undisturbed. Then it trains again, and a third of the incidents are
SIGKILL (half of them aimed into the middle of a save), a third SIGTERM or SIGUSR1 (once or twice), a third a disk that
fills up. After each one the same command starts anew with ``ckpt_path="last"``, and another random seed. At the end
both runs are compared: weights, optimizer, schedule, random generators, loop counters, position in the data, and every
batch that was ever trained, also those that were trained again.

Starting Python and importing the libraries takes longer than an attempt, so they are imported once here and each
attempt is a fork. The full disk is a small tmpfs where this user may mount one, else a limit on the size of files.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # forks follow

import lightning as L
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typing_extensions import override

from lightning_qlora import AdapterCheckpoint, RunGuard, SFTDataModule, SFTModule
from lightning_qlora.checkpoints.loop_state import count_batches
from lightning_qlora.checkpoints.publishing import LocalStore

TICKETS = Path(__file__).parents[1] / "support_tickets" / "train.jsonl"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BATCHES_PER_INCIDENT = 8  # of the calm run; an incident comes after at most so many
ACCUMULATE = 2
DISK_MIB = 24
PATIENCE_S = 120.0
KINDS = ("kill", "kill in a save", "SIGTERM", "SIGUSR1", "SIGTERM twice", "full disk")
WEIGHTS = (2, 2, 2, 1, 1, 4)


# What is trained


def build_task(folder: Path, num_rows: int) -> None:
    """Write a random base with its tokenizer, training rows and validation rows."""
    lines = TICKETS.read_text(encoding="utf-8").splitlines()
    texts = [message["content"] for line in lines for message in json.loads(line)["messages"]]
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer, learned.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    control = ["<|im_start|>", "<|im_end|>"]
    learned.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=control)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learned, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    end = tokenizer.eos_token_id
    LlamaForCausalLM(LlamaConfig(vocab_size=640, eos_token_id=end, **size, **heads)).save_pretrained(folder / "base")
    (folder / "train.jsonl").write_text("\n".join(lines[:num_rows]) + "\n", encoding="utf-8")
    (folder / "validation.jsonl").write_text("\n".join(lines[-4:]) + "\n", encoding="utf-8")


class Report(L.Callback):
    """Tells of every micro-batch that was trained: its number in the run, its rows, its loss and learning rate."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        told = [count_batches(trainer).total, [list(batch["row_ids"]), float(outputs["loss"]).hex(), lr.hex()]]
        os.write(self.pipe, (json.dumps(told) + "\n").encode())


def train(task: Path, root: Path, pipe: int, seed: int, num_steps: int) -> None:
    """What a user's script does; called again and again with the same arguments but for the seed."""
    L.seed_everything(seed, verbose=False)
    data = SFTDataModule(
        str(task / "train.jsonl"),
        str(task / "validation.jsonl"),
        tokenizer=str(task / "base"),
        max_length=256,
        tokens_per_batch=384,
        cache_dir=str(task / "cache"),
    )
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    module = SFTModule(
        str(task / "base"), lora=lora, lr=5e-3, untrained_tokens="ignore", activation_checkpointing="none"
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=num_steps,
        accumulate_grad_batches=ACCUMULATE,
        val_check_interval=0.4,
        gradient_clip_val=1.0,
        callbacks=[Report(pipe), RunGuard(), AdapterCheckpoint(root / "checkpoints", every_n_train_steps=2)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )
    trainer.fit(module, datamodule=data, ckpt_path="last")


# Attempts


@dataclass
class Attempt:
    """A forked process and what it has told so far."""

    pid: int
    pipe: int
    batches: list[list[Any]] = field(default_factory=list)
    error: str = ""
    code: int | None = None
    _rest: bytes = b""

    def listen(self, seconds: float) -> bool:
        """Read what has been told; return whether the process is still there."""
        if self.code is None and select.select([self.pipe], [], [], seconds)[0]:
            data = os.read(self.pipe, 1 << 16)
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                told = json.loads(line)
                if isinstance(told, str):
                    self.error = told
                else:
                    self.batches.append(told)
            if not data:
                os.close(self.pipe)
                self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code is None

    def wait_for(self, what: Callable[[], bool], patience_s: float = PATIENCE_S) -> bool:
        """Listen until something is the case or the process has ended; return whether it still runs."""
        deadline = time.monotonic() + patience_s
        while not what() and self.listen(0.001):
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise RuntimeError(f"An attempt took more than {patience_s:.0f} s.")
        return self.code is None


def start(action: Callable[[int], None], log: Path) -> Attempt:
    """Run an action in a fork, with its output in a file."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        _become(action, writer, log)
    os.close(writer)
    return Attempt(pid, reader)


def _become(action: Callable[[int], None], pipe: int, log: Path) -> NoReturn:
    code = 1
    with open(log, "ab", buffering=0) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    try:
        action(pipe)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException as error:
        traceback.print_exc()
        os.write(pipe, (json.dumps(f"{type(error).__name__}: {str(error).splitlines()[0][:60]}") + "\n").encode())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# The full disk


class Disk:
    """A folder whose disk can be filled up, and freed again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
        self.is_tmpfs = (
            shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
        )

    def fill(self, pid: int, free_bytes: int) -> None:
        """Leave so much room; without a disk of its own, let no file of the process grow beyond it."""
        if not self.is_tmpfs:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (free_bytes, free_bytes))
            return
        with open(self.folder / "filler", "wb") as filler:
            room = shutil.disk_usage(self.folder).free - free_bytes
            os.posix_fallocate(filler.fileno(), 0, max(room, 1))

    def free(self) -> None:
        """Make room again."""
        (self.folder / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        """Give the disk back."""
        if self.is_tmpfs:
            subprocess.run(["umount", str(self.folder)], check=True)


# The storm


class Storm:
    """Trains to the end through incidents, and checks after each that nothing good was lost.

    Args:
        folder: For the task and both runs.
        num_incidents: How many.
        seed: Decides what happens when.
        num_rows: Training rows of an epoch.
    """

    def __init__(self, folder: Path, num_incidents: int, seed: int, num_rows: int = 60) -> None:
        self.folder, self.draw, self.num_rows = folder, random.Random(seed), num_rows
        share = num_incidents / sum(WEIGHTS)
        kinds = zip(KINDS, WEIGHTS, strict=True)
        self.incidents = [kind for kind, weight in kinds for _ in range(max(1, round(weight * share)))]
        self.draw.shuffle(self.incidents)
        self.incidents = (self.incidents + ["kill"] * num_incidents)[:num_incidents]
        self.problems: list[str] = []
        self.calm: dict[int, Any] = {}
        self.num_steps = max(5, num_incidents * BATCHES_PER_INCIDENT // ACCUMULATE)
        self.num_trained = 0

    def run(self) -> bool:
        """Run everything; return whether the two runs ended equal."""
        started = time.monotonic()
        task = start(lambda _: build_task(self.folder, self.num_rows), self.folder / "task.log")
        task.wait_for(lambda: False)
        assert task.code == 0, task.error
        self._run_calm()
        calm_s = time.monotonic() - started
        disk = Disk(self.folder / "storm")
        try:
            print(
                f"calm run: {len(self.calm)} micro-batches, {self.num_steps} optimizer steps, {calm_s:.0f} s. "
                f"The disk is {f'a tmpfs of {DISK_MIB} MiB' if disk.is_tmpfs else 'a limit on the size of files'}."
            )
            for number, kind in enumerate(self.incidents, start=1):
                self._attempt(number, disk, kind)
            self._attempt(len(self.incidents) + 1, disk, None)
            self._compare(disk.folder)
        finally:
            disk.close()
        again = self.num_trained - len(self.calm)
        print(f"trained again after kills: {again} micro-batches; all: {time.monotonic() - started:.0f} s")
        for problem in self.problems:
            print(f"  not equal: {problem}")
        equal = "weights, optimizer, schedule, random states, counters, position, every batch, loss and learning rate"
        print(f"VERDICT: {'FAILED' if self.problems else f'bit-equal ({equal})'}")
        return not self.problems

    def _run_calm(self) -> None:
        root = self.folder / "calm"
        run = start(lambda pipe: train(self.folder, root, pipe, 0, self.num_steps), self.folder / "calm.log")
        run.wait_for(lambda: False)
        assert run.code == 0, f"{run.error}: see {self.folder / 'calm.log'}"
        self.calm = dict(run.batches)

    def _attempt(self, number: int, disk: Disk, kind: str | None) -> None:
        store = LocalStore(disk.folder / "checkpoints")
        before = store.newest_valid()
        seed = 0 if before is None else 1000 + number  # only the checkpoint may decide how it goes on
        log = self.folder / f"attempt-{number}.log"
        attempt = start(lambda pipe: train(self.folder, disk.folder, pipe, seed, self.num_steps), log)
        detail = self._strike(attempt, disk, kind) if kind is not None else ""
        attempt.wait_for(lambda: False)
        disk.free()
        after = store.newest_valid()  # raises if there are checkpoints and none is whole
        steps = [item.metadata["step"] if item is not None else 0 for item in (before, after)]
        what = "to the end" if kind is None else f"{kind}{detail}"
        error = f" ({attempt.error})" if attempt.error else ""
        trained = f"{len(attempt.batches):3d} micro-batches" if attempt.batches else "not yet training"
        print(f"#{number:<3} {what:<34} {trained:>16}  exit {attempt.code:>4}{error}; step {steps[0]} -> {steps[1]}")
        sys.stdout.flush()
        self._check(attempt, kind, number, steps)

    def _strike(self, attempt: Attempt, disk: Disk, kind: str) -> str:
        """Wait for a random moment and do it; return what else there is to say."""
        after = self.draw.randint(0, BATCHES_PER_INCIDENT)
        attempt.wait_for(lambda: len(attempt.batches) >= after)
        pause = time.monotonic() + self.draw.uniform(0.0, 0.2)
        if kind == "full disk":
            room = int(self.draw.uniform(0.0, 1.0) * self._checkpoint_bytes())
            disk.fill(attempt.pid, room)
            return f", {room // 1000} kB left"
        if kind == "kill in a save":
            staging = disk.folder / "checkpoints"
            attempt.wait_for(lambda: staging.is_dir() and any(p.name.startswith(".") for p in staging.iterdir()))
            pause = time.monotonic() + self.draw.uniform(0.0, 0.03)
        attempt.wait_for(lambda: time.monotonic() >= pause)
        number = {"SIGUSR1": signal.SIGUSR1}.get(kind, signal.SIGKILL if kind.startswith("kill") else signal.SIGTERM)
        for _ in range(2 if kind.endswith("twice") else 1):
            if attempt.listen(0.01):
                os.kill(attempt.pid, number)
        return ""

    def _checkpoint_bytes(self) -> int:
        newest = LocalStore(self.folder / "calm" / "checkpoints").newest_valid()
        assert newest is not None
        return newest.num_bytes

    def _check(self, attempt: Attempt, kind: str | None, number: int, steps: list[int]) -> None:
        signals = {"SIGUSR1": signal.SIGUSR1}.get(str(kind), signal.SIGTERM)
        allowed = {
            None: {0},
            "full disk": {1},
            "kill": {-signal.SIGKILL},
            "kill in a save": {-signal.SIGKILL},
        }.get(kind, {143} if attempt.batches else {143, -signals})  # RunGuard listens from the start of training
        if steps[1] == self.num_steps:
            allowed.add(0)  # the incident came too late: there was nothing left to train
        if attempt.code not in allowed:
            self.problems.append(f"attempt {number} ({kind}) ended with {attempt.code}: {attempt.error}")
        if steps[1] < steps[0]:
            self.problems.append(f"attempt {number} ({kind}) lost step {steps[0]}")
        self.num_trained += len(attempt.batches)
        for index, told in attempt.batches:
            if self.calm.get(index) != told:
                self.problems.append(
                    f"micro-batch {index} of attempt {number}: {told} instead of {self.calm.get(index)}"
                )

    def _compare(self, folder: Path) -> None:
        ends = []
        for root in (self.folder / "calm", folder):
            newest = LocalStore(root / "checkpoints").newest_valid()
            assert newest is not None
            ends.append(newest)
        files = [end.files["adapter_model.safetensors"] for end in ends]
        if files[0] != files[1]:
            self.problems.append("adapter_model.safetensors")
        states = [torch.load(f"{end.path}/trainer.ckpt", weights_only=True) for end in ends]
        for state in states:
            # Lightning counts validation batches on from the checkpoint; the callbacks name folders.
            del state["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            state["callbacks"] = {k: v for k, v in state["callbacks"].items() if k == "RunGuard"}
        self.problems += unequal(states[0], states[1], "")


def unequal(one: Any, other: Any, path: str) -> list[str]:
    """Name where two nested states are not bit for bit the same."""
    if type(one) is not type(other):
        return [f"{path}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [path]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{path}: keys {sorted(map(str, one.keys() ^ other.keys()))}"]
        return [problem for key in one for problem in unequal(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{path}: {len(one)} and {len(other)} items"]
        pairs = enumerate(zip(one, other, strict=True))
        return [problem for i, (a, b) in pairs for problem in unequal(a, b, f"{path}[{i}]")]
    return [] if one == other else [f"{path}: {one} and {other}"]


def main() -> int:
    """Run the storm in a temporary folder; return 0 if both runs ended equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--incidents", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", help="folder for all files, kept for a look; a temporary one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.keep or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return 0 if Storm(folder, options.incidents, options.seed).run() else 1


if __name__ == "__main__":
    sys.exit(main())
