"""The study's runs in processes: their order, and their end when the study is stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def command(program: str, folder: Path) -> list[str]:
    """What runs `program` as a script with the folder of the benchmarks and `folder`: workers import what they run."""
    script = folder / "program.py"
    script.write_text(program)
    return [sys.executable, str(script), str(Path(__file__).parents[2] / "benchmarks"), str(folder)]


_CHAINED = """
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from study.jobs import Job, run_jobs

@dataclass(frozen=True)
class Chained(Job):
    def work(self):
        if self.start != "phantom" and not Path(self.start).parent.joinpath("result.json").is_file():
            raise FileNotFoundError(self.start)

if __name__ == "__main__":
    folder = Path(sys.argv[2])
    starts = {"last": str(folder / "middle" / "policy"), "middle": str(folder / "first" / "policy"), "first": "phantom"}
    jobs = [Chained(name, folder / name, start) for name, start in starts.items()]
    run_jobs(jobs, workers=2, log=folder / "log", report=lambda job, seconds: print(job.name))
"""


def test_a_job_waits_for_the_one_that_makes_its_start(tmp_path: Path) -> None:
    done = subprocess.run(command(_CHAINED, tmp_path), capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["first", "middle", "last"], done.stderr


_STUBBORN = """
import os, signal, sys, time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from study.jobs import Job, run_jobs

@dataclass(frozen=True)
class Stubborn(Job):
    def work(self):
        signal.signal(signal.SIGTERM, lambda *_: None)  # as a training run, which saves and goes on to its end
        (self.folder / "pid").write_text(str(os.getpid()))
        time.sleep(300)

if __name__ == "__main__":
    folder = Path(sys.argv[2])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    jobs = [Stubborn(f"job c{i}", folder / str(i), "phantom") for i in range(2)]
    run_jobs(jobs, workers=2, log=folder / "log", report=print)
"""


def test_a_study_that_is_stopped_leaves_no_run_behind(tmp_path: Path) -> None:
    study = subprocess.Popen(command(_STUBBORN, tmp_path))
    try:
        pids = [tmp_path / str(i) / "pid" for i in range(2)]
        wait_for(lambda: all(pid.is_file() and pid.read_text() for pid in pids))
        study.send_signal(signal.SIGTERM)
        assert study.wait(60) == 143
        for pid in pids:
            wait_for(lambda pid=pid: not Path("/proc", pid.read_text()).exists())
    finally:
        study.kill()


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
