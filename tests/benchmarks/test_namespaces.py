"""The default job on hosts of its own, each in a network namespace: what is trained is what one host trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import launch_environment, read_metrics, train

ROOT = Path(__file__).parents[2]
JOB = (
    *("optim.steps=2", "optim.batch_size=16", "rollout.max_tokens=16", "data.train_size=16"),
    *("eval.at_start=false", "eval.at_end=false", "checkpoint.every=0", "checkpoint.export=false"),
    *("log.plots=false", "log.tensorboard=false", "log.samples=0"),
)
NOT_PERMITTED = 77


@pytest.fixture(scope="module")
def one_host(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("one") / "run"
    train(f"output_dir={folder}", *JOB, num_processes=2)
    return read_metrics(folder)


@pytest.mark.parametrize("stage", [0, 3])
def test_two_hosts_train_as_one(one_host: list[dict[str, Any]], tmp_path: Path, stage: int) -> None:
    before = _namespaces()
    script, folder = ROOT / "benchmarks" / "namespaces.sh", tmp_path / "run"
    command = ["bash", str(script), "2", "1", f"output_dir={folder}", f"deepspeed.zero_stage={stage}", *JOB]
    environment = launch_environment() | {"PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    if done.returncode == NOT_PERMITTED:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "'10.77.0.1': [0], '10.77.0.2': [1]" in done.stdout + done.stderr
    found = read_metrics(folder)
    assert len(found) == len(one_host) == 2
    for metrics, expected in zip(found, one_host, strict=True):
        numbers = {name: value for name, value in expected.items() if isinstance(value, int | float)}
        assert "reward" in numbers
        for name, value in numbers.items():
            assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert _namespaces() == before, "a namespace was left behind"


def _namespaces() -> set[str]:
    """Named namespaces of this project; others may make theirs meanwhile."""
    folder = Path("/var/run/netns")
    return {name for name in os.listdir(folder) if name.startswith("mrpo-")} if folder.is_dir() else set()
