"""What .ci/gpu runs and in which order, with a python3 that only writes down what it was asked."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/sh
[ "$1" = - ] || [ "$1" = -c ] || echo "MRPO_CUDA=$MRPO_CUDA $*" >> "$CALLS"
case "$*" in *layout*) exit "$SMOKE" ;; *) exit 0 ;; esac
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with .ci/gpu and what it looks for, and bin/ with the commands that it runs."""
    for name in (".ci", "bin", "csrc", "kernels", "mrpo", "tests", "benchmarks"):
        (tmp_path / name).mkdir()
    for name in ("setup.py", "benchmarks/tune_rows.py"):
        (tmp_path / name).touch()
    shutil.copy(ROOT / ".ci" / "gpu", tmp_path / ".ci")
    for name, text in {"python3": PYTHON, "compute-sanitizer": "#!/bin/sh\n"}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def calls(folder: Path, *arguments: str, smoke: int = 0, code: int = 0) -> list[str]:
    """What it ran with these arguments, which must end with this code."""
    (folder / "calls").write_text("")
    environment = {**os.environ, "CALLS": str(folder / "calls"), "SMOKE": str(smoke), "MRPO_CUDA": ""}
    environment["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run([str(folder / ".ci" / "gpu"), *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return (folder / "calls").read_text().splitlines()


def test_what_matters_most_comes_first_and_what_is_finished_is_not_repeated(folder: Path) -> None:
    first = calls(folder, str(folder / "out"))
    assert "layout" in first[0]
    suites = [line.split()[2] for line in first if "run.py" in line]
    all_of_them = ["kernels", "update", "rollout", "step"]
    assert suites == ["kernels", "update", "rollout", "rollout", "step", *all_of_them]
    assert first.index(next(line for line in first if "--only cuda" in line)) == 2
    again = calls(folder, str(folder / "out"))
    assert all("run.py" in line for line in again), "suites find by themselves what is finished"
    assert len(again) == len(suites)


def test_parts_may_be_named(folder: Path) -> None:
    smoke, kernels, shapes = calls(folder, str(folder / "out"), "cuda-shapes", "kernels")
    assert "layout" in smoke
    assert "run.py kernels --case ceilings" in kernels
    assert "--only cuda" in shapes
    [update] = calls(folder, str(folder / "out"), "update")
    assert "run.py update --case 64 samples" in update
    assert calls(folder, str(folder / "out"), "updates", code=2) == []


def test_kernels_that_fail_are_left_out_of_the_build_and_all_else_runs(folder: Path) -> None:
    smoke, build, *rest = calls(folder, str(folder / "out"), smoke=1, code=1)
    assert "layout" in smoke
    assert build == "MRPO_CUDA=0 setup.py build_ext --inplace"
    assert sum("run.py" in line for line in rest) == 9
    assert "layout" in calls(folder, str(folder / "out"))[0], "a failure is no pass"
