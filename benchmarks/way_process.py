"""Starts ways in processes of their own, commands them, and ends them whatever happens.

A way is what a suite compares: one process or, through the DeepSpeed launcher, several, of a script that takes its
commands from a `way_mailbox`.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from results import HERE, ROOT

_POLL = 0.002
# For processes that hold an engine: nothing is fetched, reported or told.
QUIET = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


class FailedError(Exception):
    """A way could not do what it was told; the message is a reason that fits a table."""


@dataclass(frozen=True)
class Script:
    """The file in this folder that runs a way, those ways which need the launcher even alone, and more environment."""

    name: str
    launched: Collection[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


class WayProcess:
    """A way in one process or, through the DeepSpeed launcher, in several."""

    def __init__(self, script: Script, name: str, processes: int, folder: Path) -> None:
        self.name, self._processes, self._folder = name, processes, folder
        self._number = 0
        folder.mkdir(parents=True)
        self._log = (folder / "log.txt").open("w", encoding="utf-8")
        worker = [str(HERE / script.name), name, str(folder), str(os.getpid())]
        port = str(_free_port())
        launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(processes), "--master_port", port]
        command = [sys.executable, *(launcher if processes > 1 or name in script.launched else ()), *worker]
        cores = len(os.sched_getaffinity(0))
        environment = {
            **os.environ,
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": str(max(1, cores // processes)),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]),
            **script.environment,
        }
        # One group, so that the launcher and all that it started can be ended together.
        self._process = subprocess.Popen(
            command, env=environment, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )
        atexit.register(self.close)

    def ask(self, do: str, *, timeout: float, **arguments: Any) -> list[dict[str, Any]]:
        """The answers of all its processes.

        Raises:
            FailedError: one of them failed, died, or took longer than `timeout` seconds.
        """
        path = self._folder / f"{self._number}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"do": do, **arguments}), encoding="utf-8")
        partial.rename(path)
        expected = [self._folder / f"{self._number}.{rank}.json" for rank in range(self._processes)]
        self._number += 1
        deadline = time.monotonic() + timeout
        while not all(answer.exists() for answer in expected):
            if self._process.poll() is not None:
                raise FailedError(f"the process ended: {self._last_words()}")
            if time.monotonic() > deadline:
                self.close()
                raise FailedError(f"{do} took longer than {timeout:.0f} s")
            time.sleep(_POLL)
        answers = [json.loads(answer.read_text(encoding="utf-8")) for answer in expected]
        for answer in answers:
            if "failure" in answer:
                raise FailedError(answer["failure"].splitlines()[0])
        return answers

    def prepare(self, setting: Any, timeout: float) -> list[dict[str, Any]]:
        """Builds what a setting, a dataclass, needs."""
        return self.ask("prepare", timeout=timeout, setting=asdict(setting))

    def _last_words(self) -> str:
        lines = [line for line in (self._folder / "log.txt").read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line]
        return (errors or lines or ["without a word"])[-1].strip()

    def close(self) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()
        atexit.unregister(self.close)


class Pool:
    """The ways that run at the moment. On a GPU one at a time: two do not fit its memory."""

    def __init__(self, script: Script, folder: Path, *, together: bool) -> None:
        self._script, self._folder, self._together = script, folder, together
        self._running: dict[tuple[str, int], WayProcess] = {}
        self._started = 0

    def get(self, name: str, processes: int) -> WayProcess:
        key = (name, processes)
        if key not in self._running:
            if not self._together:
                self.close()
            self._started += 1
            self._running[key] = WayProcess(self._script, name, processes, self._folder / f"way-{self._started}")
        return self._running[key]

    def drop(self, name: str, processes: int) -> None:
        """Ends one that failed."""
        if (key := (name, processes)) in self._running:
            self._running.pop(key).close()

    def keep(self, wanted: Callable[[str, int], bool]) -> None:
        """Ends those that are not wanted: they would take memory, and their threads the others' time."""
        for name, processes in [key for key in self._running if not wanted(*key)]:
            self.drop(name, processes)

    def close(self) -> None:
        self.keep(lambda *_: False)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
