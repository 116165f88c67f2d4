"""The parts of ``inspect``: gather findings, hold limits against them, and show them as text, JSON or a page."""

from lightning_qlora.tools.inspection.findings import Inspection
from lightning_qlora.tools.inspection.gathering import gather
from lightning_qlora.tools.inspection.page import render_page
from lightning_qlora.tools.inspection.run_plan import planning_settings
from lightning_qlora.tools.inspection.terminal import print_inspection
from lightning_qlora.tools.inspection.thresholds import Thresholds, judge

__all__ = ["Inspection", "Thresholds", "gather", "judge", "planning_settings", "print_inspection", "render_page"]
