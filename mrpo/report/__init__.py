"""What is left to read after a run: figures, the before/after table, completions with their judged steps."""

from mrpo.report.curves import draw_curves
from mrpo.report.failures import draw_failures
from mrpo.report.sample import render_sample
from mrpo.report.table import BeforeAfter, before_after_table
from mrpo.report.timeline import draw_timeline

__all__ = ["BeforeAfter", "before_after_table", "draw_curves", "draw_failures", "draw_timeline", "render_sample"]
