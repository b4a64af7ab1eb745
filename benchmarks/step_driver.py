"""The judge of the step suite in a process of its own, which ends whatever happens."""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import time
import urllib.request
from typing import Any

from results import HERE


class JudgeProcess:
    """The judge's server, in a process of its own."""

    def __init__(self, median: float, tail: float) -> None:
        command = [sys.executable, str(HERE / "step_judge.py"), str(median), str(tail)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        atexit.register(self.close)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()

    def begin(self, count: int) -> None:
        """A round of so many requests begins."""
        self._get(f"/round/{count}")

    def stats(self) -> dict[str, int]:
        """Requests of this round: how many came, are under way now, and were so at most."""
        return self._get("/stats")

    def wait(self) -> None:
        """Returns when nothing is under way: verdicts for one way must not arrive in another's time."""
        while self.stats()["active"]:
            time.sleep(0.01)

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return json.load(response)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
