"""What the subcommand ``compare`` is made of: asking, findings, limits, failures to learn from, outputs."""

from lightning_qlora.tools.comparison.asking import Decoding, ask_adapters, ask_merged
from lightning_qlora.tools.comparison.failures import preference_pairs, training_rows
from lightning_qlora.tools.comparison.findings import Comparison, Limit, Participant, compare_participants
from lightning_qlora.tools.comparison.limits import Limits, describe_missed, judge_limits
from lightning_qlora.tools.comparison.page import render_page
from lightning_qlora.tools.comparison.record import Previous, read_previous, to_record
from lightning_qlora.tools.comparison.terminal import draw_comparison

__all__ = [
    "Comparison",
    "Decoding",
    "Limit",
    "Limits",
    "Participant",
    "Previous",
    "ask_adapters",
    "ask_merged",
    "compare_participants",
    "describe_missed",
    "draw_comparison",
    "judge_limits",
    "preference_pairs",
    "read_previous",
    "render_page",
    "to_record",
    "training_rows",
]
