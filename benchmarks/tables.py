"""Tables in Markdown, targets beside the figures that have one, and the README's blocks made from files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from results import Result, Suite

Machine = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Cells of text; the first `names` columns are to the left, figures to the right."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    names: int = 1

    def markdown(self) -> str:
        align = ["---" if column < self.names else "---:" for column in range(len(self.header))]
        lines = ["| " + " | ".join(cells) + " |" for cells in (self.header, *self.rows)]
        lines.insert(1, "|" + "|".join(align) + "|")
        text = "\n".join(lines) + "\n"
        return f"**{self.title}**\n\n{text}" + (f"\n{self.note}\n" if self.note else "")


def h200(machine: Machine) -> bool:
    return "H200" in (machine["gpu"] or "")


def two_cores(machine: Machine) -> bool:
    return machine["gpu"] is None and machine["threads"] == 2


@dataclass(frozen=True)
class Target:
    """A figure that one candidate of one case should reach, on the machine it was set for.

    figure: a key of what the suite's `figures` gives. unit: what stands behind the number ("x", "GiB"), or "%" for a
    share of 1.
    """

    case: str
    candidate: str
    figure: str
    bound: Literal["at most", "at least"]
    limit: float
    unit: str
    applies: Callable[[Machine], bool] = h200

    def show(self, value: float) -> str:
        return f"{100 * value:.0f} %" if self.unit == "%" else f"{value:.2f} {self.unit}".strip()

    def met(self, value: float) -> bool:
        return value <= self.limit if self.bound == "at most" else value >= self.limit


def target_cell(targets: Sequence[Target], machine: Machine, case: str, name: str, found: Mapping[str, float]) -> str:
    """The targets of one measurement on this machine, and whether they were met."""
    said = []
    for target in targets:
        if (target.case, target.candidate) == (case, name) and target.applies(machine) and target.figure in found:
            value = found[target.figure]
            wanted = f"{target.bound} {target.show(target.limit)}"
            said.append(f"{target.figure} {wanted}: {target.show(value)}, {_verdict(target.met(value))}")
    return "; ".join(said)


def targets_table(suite: Suite, results: Sequence[Result], machine: Machine) -> Table | None:
    """Every target of this machine whose case is there, with the figure and whether it was met."""
    rows = []
    for target in suite.TARGETS:
        result = next((result for result in results if result.name == target.case), None)
        if result is None or not target.applies(machine):
            continue
        value = suite.figures(result).get(target.candidate, {}).get(target.figure)
        shown, verdict = ("", "not measured") if value is None else (target.show(value), _verdict(target.met(value)))
        wanted = f"{target.bound} {target.show(target.limit)}"
        rows.append([target.case, target.candidate, target.figure, wanted, shown, verdict])
    header = ["case", "implementation", "figure", "target", "measured", ""]
    return Table("Targets of this machine", header, rows, names=3) if rows else None


def _verdict(met: bool) -> str:
    return "met" if met else "**not met**"


def document(name: str, about: str, suite: Suite, results: Sequence[Result], machine: Machine) -> str:
    """OUT/NAME.md: every table of a suite."""
    targets = targets_table(suite, results, machine)
    tables = [*suite.summary(results), *([targets] if targets else []), *suite.details(results, machine)]
    failed = [f"- {result.name}: {result.failure}" for result in results if result.failure]
    parts = [f"## {name}: {about}", describe(machine), *(table.markdown().rstrip() for table in tables)]
    if failed:
        parts.append("Cases that could not be measured:\n\n" + "\n".join(failed))
    return "\n\n".join(parts) + "\n"


def excerpt(suite: Suite, results: Sequence[Result], machine: Machine) -> str:
    """What the README shows of one machine."""
    tables = [table.markdown().rstrip() for table in suite.summary(results)]
    return "\n\n".join([describe(machine), *tables]) + "\n"


def describe(machine: Machine) -> str:
    """One paragraph: hardware, versions, commit."""
    threads = machine["threads"]
    hardware = machine["gpu"] or f"{machine['cpu']}, {threads} thread{'s' * (threads != 1)}"
    packages = ("torch", "triton", "transformers", "vllm", "trl", "liger-kernel", "cut-cross-entropy")
    versions = ", ".join(f"{package} {machine[package]}" for package in packages if machine.get(package))
    missing = ", ".join(package for package in ("trl", "liger-kernel", "cut-cross-entropy") if not machine.get(package))
    text = f"{hardware}; {versions}"
    text += f"; not installed: {missing}" if missing else ""
    return text + (f"; commit {machine['commit']}." if machine.get("commit") else ".")


def machine_slug(machine: Machine) -> str:
    """A file name for a machine: nvidia-h200, cpu."""
    return re.sub(r"[^a-z0-9]+", "-", (machine["gpu"] or "cpu").lower()).strip("-")


def with_blocks(readme: str, blocks: Mapping[str, str]) -> str:
    """`readme` with each block between its two markers <!-- benchmarks:NAME --> and <!-- /benchmarks:NAME -->.

    Raises:
        ValueError: markers of a block are missing.
    """
    for name, text in blocks.items():
        begin, end = f"<!-- benchmarks:{name} -->", f"<!-- /benchmarks:{name} -->"
        before, _, rest = readme.partition(f"{begin}\n")
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"README.md has no lines {begin} and {end} for benchmarks/results/{name}-*.md")
        readme = f"{before}{begin}\n{text}{end}{after}"
    return readme


def failure_cell(failure: str | None, limit: int = 60) -> str:
    """A reason that fits a table."""
    text = (failure or "").replace("|", "/").replace("\n", " ")
    return text if len(text) <= limit else text[: limit - 1] + "…"
