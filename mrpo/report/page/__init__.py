"""The report of runs and evaluations as a static page (`mrpo report`)."""

from mrpo.report.page.render import write_report

__all__ = ["write_report"]
