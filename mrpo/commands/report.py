"""`mrpo report`: runs and evaluations as a page that opens from disk."""

from __future__ import annotations

import argparse
from pathlib import Path

from mrpo.commands.parser import Commands

_EPILOG = """\
OUT/index.html opens in any browser, without network: summary, training curves, failure
cascades and accuracies beside the paper's numbers, step times, and every trace with its image
and judged steps. OUT/figures holds the figures as PNG and SVG, OUT/tables the tables as CSV,
Markdown and LaTeX.

examples:
  mrpo report runs/default --out report
  mrpo report runs/mrpo runs/grpo evaluation --out report"""


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "report",
        help="show runs and evaluations as a page with figures, tables and traces",
        description="Writes a static page about training runs and evaluations.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "sources", nargs="+", type=Path, metavar="RUN_OR_EVAL", help="folder of a training run or of an evaluation"
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR",
        help="folder to write, apart from the sources; an earlier report there is replaced",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from mrpo.report.page import write_report
    from mrpo.telemetry import show_progress

    print(f"wrote {write_report(args.sources, args.out, show_progress)}")
    return 0
