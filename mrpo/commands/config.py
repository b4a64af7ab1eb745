"""`mrpo config`: the whole configuration that a file and key=value items give."""

from __future__ import annotations

import argparse

from mrpo.commands.parser import Commands, add_config_arguments, help_on_settings


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "config",
        help="print the whole configuration that a file and settings give",
        description="Prints the whole configuration as YAML. Settings win over the file, later ones over earlier ones.",
        epilog=help_on_settings,
    )
    add_config_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from mrpo.settings import load_config, to_yaml

    print(to_yaml(load_config(args.config, args.overrides)), end="")
    return 0
