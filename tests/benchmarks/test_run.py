"""The benchmark command as it is used: on copies of its folder, with suites made for the test."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MARKERS = "# A project\n\n<!-- benchmarks:{name} -->\n<!-- /benchmarks:{name} -->\n\nThe rest.\n"

# Each case appends its name to a file when it is measured, so that a test sees what was done twice.
TOY = '''"""Sleeping beside raising."""

import time
from functools import partial
from pathlib import Path

import harness
import torch
from results import Case
from tables import Table, Target

HERE = Path(__file__).parent
SOURCES = ()
TARGETS = (Target("case 0", "works", "ms", "at most", 1e6, "ms", lambda machine: True),)


def unfit():
    return (HERE / "unfit").read_text() if (HERE / "unfit").exists() else None


def cases(quick):
    settings = {"quick": quick, "ways": ["works", "wrong"]}
    return [Case(f"case {n}", {"n": n, **settings}, partial(_run, n)) for n in range(2 if quick else 4)]


def _run(n, skip):
    with (HERE / "measured").open("a") as file:
        file.write(f"{n}\\n")
    if n == 2 and (HERE / "hang").exists():
        time.sleep(60)
    if n == 3:
        raise OSError("the whole case is broken")

    def raises():
        raise RuntimeError("kernel | exploded\\nand more")

    candidates = {
        "works": lambda: lambda: [torch.ones(3)],
        "raises": lambda: raises,
        "wrong": lambda: lambda: [torch.ones(3) * 1.01],
        "runs out": lambda: lambda: [torch.empty(1 << 60)],
        "lost": partial(_lose, n),
    }
    skip = {"missing": "not installed (pip install missing)", **skip}
    candidates["missing"] = raises
    return harness.measure(candidates, truth=[torch.ones(3)], tolerance=1e-3, turns=2, skip=skip)


def _lose(n):
    if n == 0 and (HERE / "lose").exists():
        def gone():
            raise RuntimeError("no device")

        harness.synchronize = gone
        raise RuntimeError("illegal memory access")
    return lambda: None


def figures(result):
    return {one.name: {"ms": 1e3 * one.seconds} for one in result.measured if one.seconds is not None}


def summary(results):
    rows = [[one.name, one.failure or "ran"] for one in results[0].measured]
    return [Table("Toy", ["what", "how"], rows)]


def details(results, machine):
    return []


def plots(results, out):
    return []
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of benchmarks/ with one suite, `toy`."""
    benchmarks = tmp_path / "benchmarks"
    benchmarks.mkdir()
    for name in ("run.py", "harness.py", "results.py", "tables.py"):
        shutil.copy(ROOT / "benchmarks" / name, benchmarks)
    (benchmarks / "suite_toy.py").write_text(TOY, encoding="utf-8")
    (tmp_path / "README.md").write_text(MARKERS.format(name="toy"), encoding="utf-8")
    return benchmarks


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(folder / "run.py"), *arguments]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *arguments), capture_output=True, text=True, cwd=folder.parent, timeout=120)


def measured(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "measured").read_text().split()]


def by_name(path: Path, case: int = 0) -> dict[str, Any]:
    return {one["name"]: one for one in json.loads(path.read_text())["cases"][case]["measured"]}


def test_suites_are_listed_and_unknown_ones_refused() -> None:
    listed = run(ROOT / "benchmarks", "--list").stdout
    assert "kernels    The head with its policy loss" in listed
    refused = run(ROOT / "benchmarks", "kernel")
    assert refused.returncode == 2
    assert "unknown suite 'kernel'" in refused.stderr


def test_what_fails_stays_with_its_reason_and_the_rest_is_measured(folder: Path) -> None:
    done = run(folder, "--out", "out")
    assert done.returncode == 0, done.stderr
    found = by_name(folder.parent / "out" / "toy.json", case=1)
    assert found["works"]["runs"] == 2
    assert found["works"]["low"] <= found["works"]["seconds"] <= found["works"]["high"]
    assert found["raises"]["failure"] == "RuntimeError: kernel | exploded"
    assert found["wrong"]["failure"] == "computes something else"
    assert found["wrong"]["error"] == pytest.approx(0.01, rel=1e-5)
    assert found["runs out"]["seconds"] is None
    assert found["missing"]["failure"] == "not installed (pip install missing)"
    assert found["lost"]["runs"] == 2
    page = (folder.parent / "out" / "benchmarks.md").read_text()
    assert "| missing | not installed (pip install missing) |" in page
    assert "- case 3: OSError: the whole case is broken" in page
    assert "| case 0 | works | ms | at most" in page
    with (folder.parent / "out" / "toy.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["case"] for row in rows} == {"case 0", "case 1", "case 2"}


def test_a_lost_device_costs_a_restart_and_not_the_other_cases(folder: Path) -> None:
    (folder / "lose").touch()
    done = run(folder, "--quick", "--out", "out", "--fresh")
    assert done.returncode == 0, done.stderr
    assert "lost left the device unusable (RuntimeError: illegal memory access); starting again" in done.stdout
    found = by_name(folder.parent / "out" / "toy.json")
    assert found["lost"]["failure"] == "RuntimeError: illegal memory access"
    assert found["works"]["runs"] == 2
    assert measured(folder) == [0, 0, 1]


def test_a_killed_run_goes_on_where_it_stopped(folder: Path) -> None:
    (folder / "hang").touch()
    process = subprocess.Popen(command(folder), cwd=folder.parent, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (folder / "measured").exists() or 2 not in measured(folder):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder / "hang").unlink()
    (folder / "measured").unlink()
    again = run(folder)
    assert again.returncode == 0, again.stderr
    assert measured(folder) == [2, 3]
    assert "toy 1/4  case 0: finished before" in again.stdout
    cases = json.loads((folder.parent / "runs" / "benchmarks" / "toy.json").read_text())["cases"]
    assert [case["name"] for case in cases] == ["case 0", "case 1", "case 2", "case 3"]
    (folder / "measured").unlink()
    run(folder)
    assert measured(folder) == [3], "a case that failed is tried again, one that is finished is not"


def test_cases_may_be_chosen_and_the_others_keep_their_results(folder: Path) -> None:
    run(folder, "--case", "case 1", "--out", "out")
    run(folder, "--case", "case 0", "--case", "case 2", "--out", "out")
    assert measured(folder) == [1, 0, 2]
    cases = json.loads((folder.parent / "out" / "toy.json").read_text())["cases"]
    assert {case["name"] for case in cases} == {"case 0", "case 1", "case 2"}
    none = run(folder, "--case", "nosuch", "--out", "out")
    assert none.returncode == 1
    assert none.stderr == "toy: no case has 'nosuch' in its name\n"


def test_ways_may_be_left_out_and_are_measured_by_the_next_run(folder: Path) -> None:
    run(folder, "--case", "case 1", "--way", "work", "--out", "out")
    found = by_name(folder.parent / "out" / "toy.json")
    assert found["works"]["runs"] == 2
    assert found["wrong"]["failure"] == "left out by --way"
    run(folder, "--case", "case 1", "--out", "out")
    assert measured(folder) == [1, 1]
    assert by_name(folder.parent / "out" / "toy.json")["wrong"]["failure"] == "computes something else"


@pytest.mark.parametrize(("failure", "again"), [("step took longer than 9 s", True), ("out of memory", False)])
def test_a_candidate_that_failed_for_want_of_luck_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str, again: bool
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from results import Measured, Result, Store

    Store(tmp_path, "toy", {}).put("key", Result("case", {}, [Measured("one", 1.0), Measured("two", failure=failure)]))
    assert (Store(tmp_path, "toy", {}).get("key") is None) == again


def test_fresh_and_changed_sources_measure_again(folder: Path) -> None:
    run(folder, "--quick", "--out", "out")
    run(folder, "--quick", "--out", "out", "--fresh")
    assert measured(folder) == [0, 1] * 2
    (folder / "suite_toy.py").write_text(TOY + "# changed\n", encoding="utf-8")
    run(folder, "--quick", "--out", "out")
    assert measured(folder) == [0, 1] * 3


def test_what_does_not_fit_the_machine_says_why(folder: Path) -> None:
    (folder / "unfit").write_text("it needs 8 GPUs")
    done = run(folder, "--out", "out")
    assert done.returncode == 0
    assert "toy: skipped, it needs 8 GPUs\n" in done.stdout


def test_accepted_results_go_into_the_readme(folder: Path) -> None:
    none = run(folder, "toy", "--accept", "--out", "out")
    assert none.returncode == 1
    assert none.stderr == "out holds no results of toy: python benchmarks/run.py toy --out out\n"
    run(folder, "--quick", "--out", "out")
    accepted = run(folder, "--accept", "--out", "out")
    assert accepted.returncode == 0, accepted.stderr
    [table] = (folder / "results").glob("toy-*.md")
    readme = (folder.parent / "README.md").read_text()
    assert f"<!-- benchmarks:toy -->\n{table.read_text()}<!-- /benchmarks:toy -->\n\nThe rest." in readme
    table.write_text("another table\n")
    run(folder, "--readme")
    assert (
        "<!-- benchmarks:toy -->\nanother table\n<!-- /benchmarks:toy -->" in (folder.parent / "README.md").read_text()
    )
    (folder.parent / "README.md").write_text("no markers")
    refused = run(folder, "--readme")
    assert refused.returncode == 1
    assert "<!-- benchmarks:toy -->" in refused.stderr


def test_the_readme_shows_the_accepted_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import run as command_line
    from results import load_suite, read_results
    from tables import excerpt, machine_slug, with_blocks

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_blocks(readme, command_line.readme_blocks()) == readme, "run: python benchmarks/run.py --readme"
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        machine, results = read_results(path)
        name = path.stem.removesuffix(f"-{machine_slug(machine)}")
        assert path.with_suffix(".md").read_text(encoding="utf-8") == excerpt(load_suite(name), results, machine)
