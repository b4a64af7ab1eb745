"""Runs through the real DeepSpeed launcher, and what they leave behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mrpo

TRAIN = Path(mrpo.__file__).parent / "train.py"


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def launch_command(script: Path, arguments: Sequence[str], num_processes: int = 1) -> list[str]:
    """The command line of `deepspeed script arguments…` on its own port."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(num_processes)]
    return [*launcher, "--master_port", str(free_port()), str(script), *arguments]


def launch_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}


def launch(script: Path, arguments: Sequence[str], num_processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs `script` under the launcher to its end."""
    command = launch_command(script, arguments, num_processes)
    return subprocess.run(command, env=launch_environment(), capture_output=True, text=True, timeout=280)


def train(*arguments: str, num_processes: int = 1) -> subprocess.CompletedProcess[str]:
    """A training run through the launcher; fails the test if it fails."""
    done = launch(TRAIN, arguments, num_processes)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The metrics of a run without what depends on the clock."""
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "judge/")) and k != "tokens_per_s"}
        for line in lines
    ]


def processes_naming(part: str) -> list[str]:
    """Command lines of running processes that name this."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return [line for line in lines if part in line]
