"""`mrpo train`: training under the DeepSpeed launcher."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import mrpo
from mrpo.commands.parser import (
    Commands,
    add_config_arguments,
    add_master_port,
    add_num_gpus,
    config_arguments,
    help_on_settings,
)


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train a policy under the DeepSpeed launcher",
        description="Starts mrpo/train.py under the DeepSpeed launcher.",
        epilog=help_on_settings,
    )
    add_num_gpus(parser, "processes, on a CPU too; default: one per GPU, or one on a CPU machine")
    add_master_port(parser)
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue the run in output_dir")
    existing.add_argument("--overwrite", action="store_true", help="replace the run in output_dir")
    add_config_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Becomes the launcher: this call returns only where `os.execv` is replaced."""
    flags = [f"--{name}" for name in ("resume", "overwrite") if getattr(args, name)]
    arguments = [*flags, *config_arguments(args.config, args.overrides)]
    command = train_command(args.num_gpus, args.master_port, arguments)
    os.execv(command[0], command)
    return 0


def train_command(num_processes: int | None, master_port: int | None, arguments: Sequence[str]) -> list[str]:
    """The launcher's command line; without a number of processes it starts one per GPU, or one on a CPU machine."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    if num_processes is not None:
        command += ["--num_gpus", str(num_processes)]
    if master_port is not None:
        command += ["--master_port", str(master_port)]
    return [*command, str(Path(mrpo.__file__).parent / "train.py"), *arguments]
