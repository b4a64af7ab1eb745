"""`mrpo warm-start`: remakes the policy that ships with the package."""

from __future__ import annotations

import argparse
from pathlib import Path

from mrpo.commands.parser import Commands, add_master_port
from mrpo.commands.train import train_command


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "warm-start",
        help="train the tiny policy that ships with the package, from nothing",
        description="Builds a random tiny Qwen3-VL and teaches it phantom scans by SFT, at last on flawed rationales.",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write; default: over the shipped one")
    add_master_port(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from mrpo.warm_start import make_warm_start

    print(f"wrote {make_warm_start(args.out, train_command(1, args.master_port, []))}")
    return 0
