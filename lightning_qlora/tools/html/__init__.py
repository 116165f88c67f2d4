"""Pages that hold everything they show and load nothing: what all tools' pages have in common."""

from lightning_qlora.tools.html.axes import round_ticks
from lightning_qlora.tools.html.document import render_document
from lightning_qlora.tools.html.text import visible

__all__ = ["render_document", "round_ticks", "visible"]
