"""Callbacks for Lightning's Trainer, one to a file."""

from lightning_qlora.callbacks.adapter_checkpoint import AdapterCheckpoint
from lightning_qlora.callbacks.answer_comparison import AnswerComparison
from lightning_qlora.callbacks.performance_monitor import PerformanceMonitor
from lightning_qlora.callbacks.prediction_writer import PredictionWriter
from lightning_qlora.callbacks.run_guard import RunGuard
from lightning_qlora.callbacks.run_summary import RunSummary

__all__ = ["AdapterCheckpoint", "AnswerComparison", "PerformanceMonitor", "PredictionWriter", "RunGuard", "RunSummary"]
