"""`mrpo doctor`: what this machine can run, and the commands that install or change what is missing."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from typing import TYPE_CHECKING

from mrpo.commands.parser import Commands, add_config_arguments, add_num_gpus

if TYPE_CHECKING:
    from rich.text import Text

    from mrpo.doctor import Check, Diagnosis

_DESCRIPTION = """\
Checks the machine, the installed software, and whether a configuration can run here: its model, data, judge, memory
and disk space.

Each line has a state:
  ok        as it should be
  optional  not there, and this configuration does not use it
  warning   it runs, but not as one may expect
  missing   the configuration cannot run; the line below names what to do"""

_EPILOG = """\
examples:
  mrpo doctor
  mrpo doctor --config configs/qwen3_vl_8b.yaml --num-gpus 4 data.root=DATA/vqa-rad
  mrpo doctor --json judge.kind=openai judge.base_url=http://localhost:8000/v1 judge.model=NAME

exit status: 0 the configuration can run, 1 something is missing, 2 bad input.
`mrpo config --help` lists the settings."""

_STYLES = {"ok": "green", "optional": "dim", "warning": "yellow", "missing": "bold red"}


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="say what this machine can run, and what to install or change",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    add_num_gpus(parser, "processes that are to train; default: one per GPU, or one on a CPU machine")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    add_config_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from mrpo.settings import load_config

    config = load_config(args.config, args.overrides)
    # The packages that are examined greet and warn; standard output is for the findings alone.
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            from mrpo.doctor import can_run, diagnose, to_json

            diagnosis = diagnose(config, args.num_gpus)
    finally:
        logging.disable(logging.NOTSET)
    if args.json:
        print(json.dumps(to_json(diagnosis), indent=2))
    else:
        _print(diagnosis)
    return 0 if can_run(diagnosis) else 1


def _print(diagnosis: Diagnosis) -> None:
    from rich.text import Text

    from mrpo.telemetry.run_log import stdout_console

    console = stdout_console()
    console.soft_wrap = True
    width = max(len(check.name) for checks in diagnosis.values() for check in checks)
    for topic, checks in diagnosis.items():
        console.print(Text(topic, style="bold"))
        for check in checks:
            console.print(_finding(check, width))
        console.print()
    missing = [check.name for checks in diagnosis.values() for check in checks if check.state == "missing"]
    if missing:
        console.print(Text(f"This configuration cannot run here; missing: {', '.join(missing)}.", style="bold red"))
    else:
        console.print(Text("This configuration can run here.", style="bold green"))


def _finding(check: Check, width: int) -> Text:
    """A check as a line of state, name and fact, with its arithmetic and its remedy in lines below."""
    from rich.text import Text

    from mrpo.telemetry import clean_text

    first, *more = clean_text(check.fact).splitlines() or [""]
    text = Text.assemble("  ", (f"{check.state:<8}", _STYLES[check.state]), f"  {check.name:<{width}}  {first}")
    indent = "\n" + " " * (width + 14)
    for line in (*more, *check.details):
        text.append(indent + line, style="dim")
    if check.remedy:
        text.append(indent + "-> ")
        text.append(clean_text(check.remedy), style="cyan")
    return text
