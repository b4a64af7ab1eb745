"""The argument parser of every subcommand, and the arguments that several of them share."""

from __future__ import annotations

import argparse
import difflib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mrpo.arguments import add_config

# The parsers of subcommands: what `add_parser` of a module in this package is given.
Commands = Any


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that takes options and positional arguments in any order, as `mrpo eval a.jsonl --out DIR b=c`.

    Unknown options are refused by the subcommand itself, with the nearest known one; options cannot be abbreviated, so
    that a new option never changes what an old command line means. An `epilog` may be a function, called when help is
    printed.
    """

    def __init__(self, *args: Any, epilog: str | Callable[[], str] | None = None, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", _HelpFormatter)
        super().__init__(*args, **options)
        self._write_epilog = epilog
        self._parsing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        # argparse hands a subcommand's arguments to its parser by this method, and parse_known_intermixed_args, which
        # allows any order but no subcommands of its own, calls it in turn.
        if self._parsing:
            return super().parse_known_args(args, namespace)
        has_commands = any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in self._actions)
        self._parsing = True
        try:
            parse = super().parse_known_args if has_commands else self.parse_known_intermixed_args
            parsed, unknown = parse(args, namespace)
        finally:
            self._parsing = False
        if unknown:
            self._refuse(unknown[0])
        return parsed, unknown

    def format_help(self) -> str:
        self.epilog = self._write_epilog() if callable(self._write_epilog) else self._write_epilog
        return super().format_help()

    def _refuse(self, argument: str) -> NoReturn:
        if not argument.startswith("-"):
            self.error(f"unknown argument {argument!r}")
        near = difflib.get_close_matches(argument.partition("=")[0], list(self._option_string_actions), n=1)
        self.error(f"unknown option {argument}" + (f"; did you mean {near[0]}?" if near else ""))


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions and epilogs as written, room beside the options, and commands without a line above them."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"max_help_position": 30, "width": help_width(), **options})

    def _format_action(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._SubParsersAction):
            return "".join(super(_HelpFormatter, self)._format_action(entry) for entry in action._choices_actions)
        return super()._format_action(action)


def help_width() -> int:
    """Columns that help takes: the terminal's, at most 100."""
    return min(100, shutil.get_terminal_size().columns - 2)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """`--config FILE` and `key=value` items: what `load_config(args.config, args.overrides)` takes."""
    add_config(parser, "YAML file with settings; default: none")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings, as in optim.lr=1e-5; they win over the file"
    )


def add_num_gpus(parser: argparse.ArgumentParser, help_text: str) -> None:
    """`--num-gpus N`, and as DeepSpeed's launcher spells it, `--num_gpus N`."""
    _add_integer(parser, "num-gpus", "N", help_text)


def add_master_port(parser: argparse.ArgumentParser) -> None:
    """`--master-port PORT`, and as DeepSpeed's launcher spells it, `--master_port PORT`."""
    help_text = "port of process 0, to set for a second run on a machine; default: the launcher's"
    _add_integer(parser, "master-port", "PORT", help_text)


def _add_integer(parser: argparse.ArgumentParser, name: str, metavar: str, help_text: str) -> None:
    alias = name.replace("-", "_")
    parser.add_argument(f"--{name}", type=positive, metavar=metavar, help=help_text)
    parser.add_argument(
        f"--{alias}", type=positive, dest=alias, default=argparse.SUPPRESS, metavar=metavar, help=argparse.SUPPRESS
    )


def positive(text: str) -> int:
    """A whole number of at least 1, for `type=`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def help_on_settings() -> str:
    """All fields of the configuration, for an epilog."""
    from mrpo.help import config_help

    return config_help(help_width())


def config_arguments(config: Path | None, overrides: Sequence[str]) -> list[str]:
    """The command line that gives `config` and `overrides` again."""
    return [*(["--config", str(config)] if config is not None else []), *overrides]
