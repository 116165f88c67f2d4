"""A step of the quickstart on a CPU beside one of plain transformers and PEFT, as a ratio.

    python examples/benchmark/cpu_speed.py                                  # the quickstart's model, rows and options
    python examples/benchmark/cpu_speed.py --rounds 2 --steps 2 --model.init_args.model_name=FOLDER

Both train on the same batches from the same base: the one with ``fit`` and the callbacks that the command line adds and
that do something in a step, the other as anybody would write it: rows padded to the longest of a batch, the model's own
loss, clipped gradients, the same optimizer; at a constant rate. They take turns of ``--steps`` steps, so that both meet
the same moods of the machine; the first of each turn is not counted, and a ratio is that of the medians of all others.
Losses of the first step say that both compute the same, and those of the last too with
``--model.init_args.dtype=float32``; a CPU that multiplies bfloat16 computes in that. Arguments that are not its own are
those of ``fit``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import bitsandbytes
import lightning as L
import peft
import torch
import transformers
from fits import Clock
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_qlora import PerformanceMonitor, RunGuard, SFTModule
from lightning_qlora.cli import QLoRACLI
from lightning_qlora.model import attach_adapters

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"


def batches_of(cli: QLoRACLI, count: int) -> list[Any]:
    """Return the first batches that the configuration's rows make, over and over if there are fewer."""
    cli.datamodule.trainer = cli.trainer
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    return list(itertools.islice(itertools.cycle(cli.datamodule.train_dataloader()), count))


class Own:
    """Trains with ``fit``, a few steps at a time."""

    def __init__(self, module: SFTModule, clip: float | None) -> None:
        self.module, self.clip = module, clip
        module.configure_model()  # now, so that a seed gives both the same adapters
        self.losses: list[float] = []

    def train(self, batches: list[Any]) -> list[float]:
        """Train on batches; return the seconds of each step."""
        clock = Clock(on_gpu=False)
        trainer = L.Trainer(
            accelerator="cpu", max_steps=len(batches), gradient_clip_val=self.clip, logger=False,
            callbacks=[clock, RunGuard(), PerformanceMonitor()], enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(self.module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
        self.losses += [loss.item() for loss in clock.losses]
        return clock.seconds()


class Plain:
    """Trains as a loop around transformers' model and PEFT's adapters would."""

    def __init__(self, module: SFTModule, clip: float | None) -> None:
        base = module.load_base(torch.device("cpu"))
        self.model = attach_adapters(base, module.lora).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.make_optimizer, self.lr, self.clip = module.optimizer, module.lr, clip
        self.losses: list[float] = []

    def train(self, batches: list[Any]) -> list[float]:
        """Train on batches; return the seconds of each step."""
        optimizer = self.make_optimizer(self.trained)  # a new one, as each fit has
        for group in optimizer.param_groups:
            group["lr"] = self.lr or group["lr"]
        marks = [time.perf_counter()]
        for batch in map(padded, batches):
            self.step(batch, optimizer)
            marks.append(time.perf_counter())
        return [end - begin for begin, end in itertools.pairwise(marks)]

    def step(self, batch: dict[str, Tensor], optimizer: Optimizer) -> None:
        """Take a step."""
        loss = self.model(**batch, use_cache=False).loss
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.trained, self.clip)
        optimizer.step()
        optimizer.zero_grad()
        self.losses.append(loss.item())


def padded(batch: Any) -> dict[str, Tensor]:
    """Return the documents of a flat batch as rows of one length, padded behind, with their labels."""
    lengths = list(batch["document_lengths"])
    rows = {}
    for name, filler in (("input_ids", 0), ("labels", -100)):
        flat = batch[name][0, : sum(lengths)].split(lengths)
        rows[name] = nn.utils.rnn.pad_sequence(flat, batch_first=True, padding_value=filler)
    real = [torch.ones(length, dtype=torch.long) for length in lengths]
    return {**rows, "attention_mask": nn.utils.rnn.pad_sequence(real, batch_first=True)}


def compare(cli: QLoRACLI, rounds: int, steps: int) -> dict[str, Any]:
    """Let both train in turn; return what each took."""
    batches = batches_of(cli, rounds * steps)
    clip, cli.model.lr_scheduler = cli.trainer.gradient_clip_val, None
    cli.model.trainer = cli.trainer  # without one a base goes to the GPU where there is one
    torch.manual_seed(0)
    own = Own(cli.model, clip)
    torch.manual_seed(0)
    plain = Plain(cli.model, clip)
    seconds: dict[str, list[float]] = {"own": [], "plain": []}
    turns = []
    for first in range(0, rounds * steps, steps):
        of_turn = batches[first : first + steps]
        took = {"own": own.train(of_turn)[1:], "plain": plain.train(of_turn)[1:]}
        turns.append(round(statistics.median(took["plain"]) / statistics.median(took["own"]), 3))
        for name, measured in took.items():
            seconds[name] += measured
    tokens = statistics.mean(sum(batch["document_lengths"]) for batch in batches)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "dtype": str(plain.model.dtype).removeprefix("torch."),
        "tokens_per_step": round(tokens, 1),
        **{f"{name}_step_ms": round(1000 * median, 1) for name, median in medians.items()},
        "speed_ratio": round(medians["plain"] / medians["own"], 3),
        "speed_ratio_of_each_turn": turns,
        "first_losses": [round(each.losses[0], 5) for each in (own, plain)],
        "last_losses": [round(each.losses[-1], 5) for each in (own, plain)],
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=QUICKSTART)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--steps", type=int, default=11, help="of a turn")
    known, extra = parser.parse_known_args(arguments)
    known.extra = extra  # those of fit
    return known


def main() -> None:
    """Measure and print one JSON line."""
    options = parse(sys.argv[1:])
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        for said in (".*does not have many workers", "LightningCLI's args parameter", ".*no `val_dataloader`"):
            warnings.filterwarnings("ignore", message=said)
        cli = QLoRACLI(
            [f"--config={options.config}", "--trainer.accelerator=cpu", "--trainer.callbacks=[]", *options.extra],
            run=False,
        )
        result = compare(cli, options.rounds, options.steps)
    versions = {library.__name__: library.__version__ for library in (torch, transformers, peft, bitsandbytes)}
    asked = {"rounds": options.rounds, "steps": options.steps}
    print(json.dumps({**asked, **result, "threads": torch.get_num_threads(), **versions}), flush=True)


if __name__ == "__main__":
    main()
