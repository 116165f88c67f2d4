from __future__ import annotations

import re

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tiny import tiny_tokenizer
from tiny_models import save_tiny_model
from tiny_training import TinyChats, tiny_sft_module, tiny_trainer

from lightning_qlora.accounting import step_flops
from lightning_qlora.callbacks import PerformanceMonitor, performance_monitor


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer("chatml")


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"), tokenizer=tokenizer)


class Clock:
    """Time that passes only when told to."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


class Passing(Callback):
    """Lets a training step take 1 s, the way to the next one 0.25 s, and what comes between hours."""

    def __init__(self, clock):
        self.clock = clock

    def on_before_backward(self, *args):
        self.clock.now += 1.0

    def on_validation_epoch_end(self, *args):
        self.clock.now += 10_000.0

    def on_save_checkpoint(self, *args):
        self.clock.now += 10_000.0

    def on_train_epoch_end(self, *args):
        self.clock.now += 10_000.0


class SlowChats(TinyChats):
    clock = None

    def on_before_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.training:
            self.clock.now += 0.25
        return batch


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(performance_monitor, "time", clock)
    return clock


def fit(folder, tokenizer, clock, tmp_path, monitor, **options):
    data = SlowChats(tokenizer)
    data.clock = clock
    logger = CSVLogger(tmp_path, name="logs")
    callbacks = [monitor, Passing(clock), ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=2)]
    options = {"log_every_n_steps": 1, "max_epochs": 3, "enable_checkpointing": True, **options}
    trainer = tiny_trainer(tmp_path, callbacks=callbacks, logger=logger, **options)
    trainer.fit(tiny_sft_module(folder), data)
    (path,) = tmp_path.rglob("metrics.csv")
    header, *rows = [line.split(",") for line in path.read_text().splitlines()]
    rows = [{k: float(v) for k, v in zip(header, row, strict=True) if v} for row in rows]
    return data, trainer, [row for row in rows if "tokens_per_second" in row]


def test_waiting_for_data_counts_and_validation_and_checkpoints_do_not(folder, tokenizer, clock, tmp_path, capsys):
    monitor = PerformanceMonitor(window=1)

    data, trainer, rows = fit(folder, tokenizer, clock, tmp_path, monitor)

    lengths = [sum(batch["document_lengths"]) for batch in data.batches]
    supervised = [len(batch["targets"]) for batch in data.batches]
    # Checkpoints come after the 2nd, 4th, 6th and 8th step, validation and a new epoch after the 3rd and 6th; the wait
    # before the steps that follow is not told apart from them, and left out.
    clean = {1, 5, 7}
    seconds = [1.25 if step in clean else 1.0 for step in range(9)]
    assert [row["tokens_per_second"] for row in rows] == pytest.approx(
        [lengths[step % 3] / s for step, s in enumerate(seconds)]
    )
    assert [row["supervised_tokens_per_second"] for row in rows] == pytest.approx(
        [supervised[step % 3] / s for step, s in enumerate(seconds)]
    )
    assert [row["step_seconds"] for row in rows] == pytest.approx(seconds)
    assert "tokens_per_second" in trainer.progress_bar_metrics
    assert 0.05 < rows[-1]["peak_memory_gib"] < 64
    assert "mfu" not in rows[-1]

    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Training: ")]
    later = slice(4, 9)  # without the warm-up
    rate = sum(lengths[s % 3] for s in range(9)[later]) / sum(seconds[later])
    assert f"{3 * sum(lengths):,} tokens ({3 * sum(supervised):,} supervised), {rate:,.0f} tokens/s" in line
    assert re.search(r"1 s a step \(p95 1.25 s\), peak memory \d+\.\d\d GiB\.$", line)


def test_smooths_over_a_window_and_times_optimizer_steps(folder, tokenizer, clock, tmp_path):
    data, _, rows = fit(
        folder, tokenizer, clock, tmp_path, PerformanceMonitor(window=3), max_epochs=1, accumulate_grad_batches=3
    )

    assert len(rows) == 1
    assert rows[0]["step_seconds"] == pytest.approx(3.5)
    lengths = [sum(batch["document_lengths"]) for batch in data.batches]
    assert rows[0]["tokens_per_second"] == pytest.approx(sum(lengths) / 3.5)


def test_utilisation_is_the_models_own_arithmetic(folder, tokenizer, clock, tmp_path, capsys):
    monitor = PerformanceMonitor(window=1, peak_tflops=1e-3)

    data, trainer, rows = fit(folder, tokenizer, clock, tmp_path, monitor, max_epochs=1)

    flops = step_flops(trainer.lightning_module.model)
    needed = [flops(batch["document_lengths"], len(batch["targets"])) for batch in data.batches]
    expected = [count / seconds / 1e9 for count, seconds in zip(needed, (1, 1.25, 1), strict=True)]
    assert [row["mfu"] for row in rows] == pytest.approx(expected, rel=1e-5)
    assert "MFU" in capsys.readouterr().out


def test_fillers_and_padding_are_no_tokens():
    batch = {"document_lengths": (5, 7, 4), "row_ids": (0, 1, -1), "targets": torch.zeros(3)}

    assert performance_monitor._count(batch) == ([5, 7], 3)
    assert performance_monitor._count({"input_ids": torch.zeros(2, 6)}) == ([6, 6], 0)
    with pytest.raises(TypeError, match="found list"):
        performance_monitor._count([1])


def test_a_run_without_a_step_prints_nothing(folder, tokenizer, tmp_path, capsys):
    trainer = tiny_trainer(tmp_path, callbacks=[PerformanceMonitor()], limit_train_batches=0)

    trainer.fit(tiny_sft_module(folder), TinyChats(tokenizer))

    assert "Training:" not in capsys.readouterr().out


def test_goes_through_barebones(folder, tokenizer, tmp_path, capsys):
    options = {"barebones": True, "logger": None, "enable_checkpointing": None, "enable_progress_bar": None}
    trainer = tiny_trainer(tmp_path, callbacks=[PerformanceMonitor()], enable_model_summary=None, **options)

    trainer.fit(_silent(tiny_sft_module(folder)), TinyChats(tokenizer).train_dataloader())

    assert "tokens/s" in capsys.readouterr().out


def _silent(module):
    module.log = lambda *args, **kwargs: None
    return module


@pytest.mark.parametrize("options", [{"window": 0}, {"peak_tflops": 0}, {"peak_tflops": -1.0}])
def test_refuses_options_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        PerformanceMonitor(**options)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # bitsandbytes says that inner dimensions as small as these are slow
def test_events_are_read_without_waiting(folder, tokenizer, tmp_path):
    monitor = PerformanceMonitor(window=2)
    trainer = tiny_trainer(tmp_path, callbacks=[monitor], accelerator="gpu", devices=1, max_epochs=5)

    trainer.fit(tiny_sft_module(folder), TinyChats(tokenizer))

    assert monitor._num_batches == 15
    assert monitor._totals[0] > 0
    assert trainer.callback_metrics["peak_reserved_gib"] >= trainer.callback_metrics["peak_memory_gib"] > 0
