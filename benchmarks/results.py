"""What a suite is, what its cases gave, and where that is kept: one JSON file a suite, replaced whole after every case.

The key of a case is a digest of everything that its figures depend on: settings, machine, versions and sources. A run
that was broken off finds the cases it finished under their keys and goes on with the others.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

from tables import Table, Target

HERE = Path(__file__).parent
ROOT = HERE.parent


@dataclass(frozen=True)
class Measured:
    """What one candidate did in one case; None where it was not measured.

    seconds, low, high: median, fastest and slowest of `runs` turns. peak_bytes: the most it held above its inputs and
    what it leaves behind (gradients). error: relative norm against the truth, the worst of what the step returned.
    failure: why it was not timed. values: whatever else a suite measures.
    """

    name: str
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    runs: int = 0
    peak_bytes: int | None = None
    error: float | None = None
    failure: str | None = None
    values: dict[str, Any] = field(default_factory=dict)


LEFT_OUT = "left out by --way"
# What failures say that another try may be spared: a way not asked for, a command cut short, memory that another
# process held, a package.
_TRANSIENT = (
    LEFT_OUT,
    "took longer than",
    "the process ended",
    "Free memory on device",
    "ModuleNotFoundError",
    "ImportError",
)


def is_transient(failure: str | None) -> bool:
    """Whether another try may succeed."""
    return failure is not None and any(text in failure for text in _TRANSIENT)


@dataclass(frozen=True)
class Case:
    """One comparison of a suite: a name of its own, the settings it depends on (JSON), and what measures it.

    `run` takes the candidates that must not run in it, with the reason. settings["ways"] names those of `--way`.
    """

    name: str
    settings: dict[str, Any]
    run: Callable[[Mapping[str, str]], list[Measured]]


def slug(name: str) -> str:
    """`name` as a part of a file's name."""
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def left_out(case: Case, texts: Sequence[str] | None) -> dict[str, str]:
    """The ways of a case whose names hold none of `texts` (None: none), with the reason."""
    if texts is None:
        return {}
    return {way: LEFT_OUT for way in case.settings.get("ways", ()) if not any(text in way for text in texts)}


@dataclass(frozen=True)
class Result:
    """A case that is finished, or the reason why it could not be measured at all."""

    name: str
    settings: dict[str, Any]
    measured: list[Measured] = field(default_factory=list)
    seconds: float = 0.0
    failure: str | None = None

    def __getitem__(self, name: str) -> Measured:
        """What one candidate did; one that was not there has measured nothing."""
        return next((one for one in self.measured if one.name == name), Measured(name, failure="not measured"))


class Suite(Protocol):
    """A module `suite_NAME.py`. The first line of its docstring says what it compares."""

    SOURCES: tuple[str, ...]  # files and folders of the repository that its figures depend on, beside itself
    TARGETS: tuple[Target, ...]

    def unfit(self) -> str | None:
        """Why it cannot run on this machine; None if it can."""

    def cases(self, quick: bool) -> list[Case]: ...

    def figures(self, result: Result) -> dict[str, dict[str, float]]:
        """By candidate, what follows from a measurement: TFLOP/s, share of a ceiling, ratios."""

    def summary(self, results: Sequence[Result]) -> list[Table]:
        """What the README shows."""

    def details(self, results: Sequence[Result], machine: Mapping[str, Any]) -> list[Table]:
        """The rest, with the targets of this machine beside the figures that have one."""

    def plots(self, results: Sequence[Result], out: Path) -> list[Path]: ...


def suite_names() -> list[str]:
    return sorted(path.stem.removeprefix("suite_") for path in HERE.glob("suite_*.py"))


def load_suite(name: str) -> Suite:
    return cast(Suite, importlib.import_module(f"suite_{name}"))


def about(name: str) -> str:
    """The first line of a suite's docstring, without loading what it needs."""
    first = (HERE / f"suite_{name}.py").read_text(encoding="utf-8").partition("\n")[0]
    return first.strip('" ').rstrip(".")


class Store:
    """The results of one suite in DIR/NAME.json. What is put is on the disk, whole, before `put` returns.

    A case that failed, or of which a candidate failed for want of luck, is measured again.
    """

    def __init__(self, out: Path, suite: str, machine: Mapping[str, Any], *, fresh: bool = False) -> None:
        self._path = out / f"{suite}.json"
        self._machine = dict(machine)
        kept = {} if fresh or not self._path.exists() else json.loads(self._path.read_text(encoding="utf-8"))
        self._records: dict[str, dict[str, Any]] = {r["key"]: r for r in kept.get("cases", ()) if _is_finished(r)}
        self._skips: dict[str, dict[str, str]] = kept.get("skips", {})

    def get(self, key: str) -> Result | None:
        """The finished case of this key."""
        return _result(self._records[key]) if key in self._records else None

    def skips(self, key: str) -> dict[str, str]:
        """Candidates that broke the device in this case, and how."""
        return self._skips.get(key, {})

    def put(self, key: str, result: Result) -> None:
        self._records[key] = {"key": key, **asdict(result)}
        self._write()

    def skip(self, key: str, candidate: str, reason: str) -> None:
        self._skips.setdefault(key, {})[candidate] = reason
        self._write()

    def keep(self, keys: Sequence[str]) -> None:
        """Drops what belongs to other keys, and brings the cases into this order."""
        self._records = {key: self._records[key] for key in keys if key in self._records}
        self._write()

    def _write(self) -> None:
        content = {"machine": self._machine, "commit": commit(), "cases": list(self._records.values())}
        if self._skips:
            content["skips"] = self._skips
        write_whole(self._path, json.dumps(content, indent=1) + "\n")


def read_results(path: Path) -> tuple[dict[str, Any], list[Result]]:
    """The machine, and the results, of a file that a `Store` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return {**content["machine"], "commit": content["commit"]}, [_result(record) for record in content["cases"]]


def _is_finished(record: Mapping[str, Any]) -> bool:
    return not record["failure"] and not any(is_transient(one["failure"]) for one in record["measured"])


def _result(record: Mapping[str, Any]) -> Result:
    measured = [Measured(**one) for one in record["measured"]]
    return Result(record["name"], record["settings"], measured, record["seconds"], record["failure"])


def write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_csv(path: Path, suite: Suite, results: Sequence[Result]) -> None:
    """One line a measurement, with its settings and the figures that follow from it."""
    rows = []
    for result in results:
        figures = suite.figures(result)
        for one in result.measured:
            own = asdict(one)
            more = {**own.pop("values"), **figures.get(one.name, {})}
            more = {key: value for key, value in more.items() if "\n" not in str(value)}  # a page is no cell
            rows.append({"case": result.name, **result.settings, **own, **more})
    columns = list(dict.fromkeys(column for row in rows for column in row))
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def key_of(name: str, case: Case, machine: Mapping[str, Any], digest: str) -> str:
    columns = [column.name for column in fields(Measured)]
    parts = json.dumps([name, case.name, case.settings, dict(machine), digest, columns], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def digest_of(suite: Suite) -> str:
    """Of the suite's own file and its sources."""
    found = hashlib.sha256()
    own = Path(str(cast(ModuleType, suite).__file__))
    for path in (own, *(ROOT / source for source in suite.SOURCES)):
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in _SOURCE_SUFFIXES)
        for file in files:
            found.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


_SOURCE_SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh"}


def commit() -> str | None:
    """The commit of the sources, with a mark if they differ from it; None outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
