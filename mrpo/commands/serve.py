"""`mrpo serve`: a vLLM server that `rollout.engine=vllm_server` samples from and pushes its weights to."""

from __future__ import annotations

import argparse
import os
import shlex
import sys

from mrpo.commands.parser import Commands, add_config_arguments, help_on_settings

_DESCRIPTION = """\
Starts a vLLM server for training with rollout.engine=vllm_server; give it the configuration of the run. Whoever reaches
its port can change its model: keep it on a private network. `--print` shows the command instead, for environments that
cannot run mrpo's commands; the package itself must be importable there."""


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "serve",
        help="start a vLLM server that a training run samples from",
        description=_DESCRIPTION,
        epilog=help_on_settings,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    parser.add_argument("--max-images", type=int, default=1, metavar="N", help="most images in a prompt (default: 1)")
    parser.add_argument("--print", action="store_true", help="print the command and start nothing")
    add_config_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from mrpo.rollout.vllm_engine import require_vllm
    from mrpo.rollout.vllm_server import server_command
    from mrpo.settings import load_config

    config = load_config(args.config, args.overrides)
    _, *words = server_command(config, args.max_images)
    words += ["--host", args.host, "--port", str(args.port)]
    if args.print:
        print(f"VLLM_SERVER_DEV_MODE=1 python {shlex.join(words)}")
        return 0
    require_vllm()
    if not torch.cuda.is_available():
        words.append("--no-enable-chunked-prefill")  # as in VLLMEngine
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
    os.execvpe(sys.executable, [sys.executable, *words], environment)
