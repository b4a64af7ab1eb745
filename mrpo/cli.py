"""The `mrpo` command: show the configuration, start training, remake the shipped policy."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import mrpo
from mrpo.errors import UserError
from mrpo.help import config_help
from mrpo.settings import load_config, to_yaml


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the return value is the exit status (2: input that the user can mend)."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    options = [argument for argument in rest if argument.startswith("-")]
    if args.command == "config" and options:
        parser.error(f"unknown option {options[0]}; settings are given as section.key=value")
    if args.command == "warm-start" and rest:
        parser.error(f"unknown argument {rest[0]}")
    try:
        if args.command == "config":
            print(to_yaml(load_config(args.config, rest)), end="")
        elif args.command == "warm-start":
            from mrpo.warm_start import make_warm_start

            print(f"wrote {make_warm_start(args.out, train_command(1, args.master_port, []))}")
        else:
            command = train_command(args.num_gpus, args.master_port, rest)
            os.execv(command[0], command)
    except UserError as error:
        print(f"mrpo: error: {error}", file=sys.stderr)
        return 2
    return 0


def train_command(num_processes: int | None, master_port: int | None, arguments: Sequence[str]) -> list[str]:
    """The launcher's command line; without a number of processes it starts one per GPU, or one on a CPU machine."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    if num_processes is not None:
        command += ["--num_gpus", str(num_processes)]
    if master_port is not None:
        command += ["--master_port", str(master_port)]
    return [*command, str(Path(mrpo.__file__).parent / "train.py"), *arguments]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mrpo", description="Step-aware reinforcement learning for medical VLMs")
    parser.add_argument("--version", action="version", version=f"mrpo {mrpo.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    config = commands.add_parser(
        "config",
        help="print the whole configuration that a file and key=value items give, as YAML",
        usage="%(prog)s [-h] [--config FILE] [key=value ...]",
        description="Prints the whole configuration as YAML. key=value items win over the file, later over earlier.",
        epilog=config_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    config.add_argument("--config", type=Path, metavar="FILE", help="YAML file")

    train = commands.add_parser(
        "train",
        help="train under the DeepSpeed launcher",
        usage="%(prog)s [-h] [--num-gpus N] [--master-port PORT] [--config FILE] [--resume] [key=value ...]",
        description="Starts mrpo/train.py under the DeepSpeed launcher; all other arguments go to it unchanged.",
        epilog=config_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    train.add_argument(
        "--num-gpus", "--num_gpus", type=int, metavar="N", help="processes, on a CPU too; default: one per GPU"
    )
    train.add_argument(
        "--master-port", "--master_port", type=int, metavar="PORT", help="port of process 0; set it for a second run"
    )

    warm_start = commands.add_parser(
        "warm-start",
        help="train the tiny policy that ships with the package, from nothing",
        description="Builds a random tiny Qwen3-VL and teaches it phantom scans by SFT, at last on flawed rationales.",
    )
    warm_start.add_argument("--out", type=Path, metavar="DIR", help="folder to write; default: over the shipped one")
    warm_start.add_argument(
        "--master-port", type=int, metavar="PORT", help="port of process 0; set it for a second run"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
