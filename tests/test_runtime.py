"""The processes of a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from launching import free_port, launch, launch_environment

WORKER = """
import os
from pathlib import Path
import torch
from mrpo.runtime import Runtime

runtime = Runtime.start(seed=0)
total = runtime.sum(torch.tensor([1.0, runtime.rank]))
runtime.barrier()
named = [path.name for path in Path("/dev/shm").iterdir() if f"_{os.environ['MASTER_PORT']}_" in path.name]
if runtime.is_main:
    print("sum", total.tolist(), "shared memory with a name", named)
runtime.finish()
"""


def test_shared_memory_has_no_name_that_a_crash_could_leave_behind(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    done = launch(script, [], num_processes=2)
    assert "sum [2.0, 1.0] shared memory with a name []" in done.stdout, done.stdout + done.stderr


def test_processes_that_cannot_meet_are_told_what_to_set() -> None:
    join = [sys.executable, "-c", "from mrpo.runtime import Runtime; Runtime.start(seed=0)"]
    environment = launch_environment() | {"GLOO_SOCKET_IFNAME": "nonesuch0", "MASTER_PORT": str(free_port())}
    done = subprocess.run(join, env=environment, capture_output=True, text=True, timeout=120)
    message = done.stderr.splitlines()[-1]
    assert "UserError: the processes of the run cannot reach each other" in message
    named = ("nonesuch0", "GLOO_SOCKET_IFNAME", "MASTER_PORT")
    assert all(name in message for name in named), message
