"""The `mrpo` command: finds the subcommand, runs it, and turns what goes wrong into an exit status."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence

import mrpo
from mrpo.commands.parser import CommandParser
from mrpo.errors import UserError

# Modules of mrpo.commands, in the order of a project's work.
COMMANDS = ("doctor", "data", "config", "train", "serve", "infer", "eval", "report", "warm_start", "completion")

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE

_EPILOG = """\
examples:
  mrpo doctor --config configs/qwen3_vl_8b.yaml data.root=DATA/vqa-rad
  mrpo data prepare vqa_rad --root DATA/vqa-rad --out vqa_rad.jsonl
  mrpo train data.name=prepared data.file=vqa_rad.jsonl output_dir=runs/mine
  mrpo data prepare vqa_rad --root DATA/vqa-rad --split test --out test.jsonl
  mrpo infer --model runs/mine/policy --data test.jsonl --out mine.jsonl
  mrpo eval mine.jsonl --out evaluation
  mrpo report runs/mine evaluation --out site
  source <(mrpo completion bash)

exit status:
  0    done
  1    a check found problems (data check, doctor)
  2    bad input: the message on stderr says what is wrong and what would be right
  130  stopped by Ctrl-C

`mrpo COMMAND --help` explains a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; the return value is the exit status.

    Raises:
        SystemExit: `--help`, `--version` (status 0), or a command line that cannot be parsed (status 2).
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if args.command is None:
            parser.print_help()
            status = 0
        else:
            status = args.run(args)
        sys.stdout.flush()
    except UserError as error:
        print(f"mrpo: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader is gone, as in `mrpo config | head -1`; what is still buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return status


def build_parser() -> CommandParser:
    """The parser of `mrpo` with all its subcommands."""
    parser = CommandParser(
        prog="mrpo",
        description="Step-aware reinforcement learning for medical vision-language models.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"mrpo {mrpo.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name in COMMANDS:
        importlib.import_module(f"mrpo.commands.{name}").add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
