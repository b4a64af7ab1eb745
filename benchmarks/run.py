"""Ours beside the peers on this machine: every suite that fits it, or those named.

Each finished case is kept in DIR/SUITE.json at once; the same command again goes on where a broken run stopped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from pathlib import Path

# Before OpenMP starts, as in mrpo/train.py: a waiting thread spins briefly, then sleeps.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from results import (
    HERE,
    ROOT,
    Result,
    Store,
    about,
    digest_of,
    key_of,
    left_out,
    load_suite,
    read_results,
    suite_names,
    write_csv,
    write_whole,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tables import document, excerpt, failure_cell, machine_slug, with_blocks

ACCEPTED = HERE / "results"
README = ROOT / "README.md"


def main() -> None:
    # What was started for a suite ends with this process, and not only when it ends in the ordinary way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options = _options()
    if options.list:
        for name in suite_names():
            print(f"{name:<10} {about(name)}")
    elif options.readme:
        update_readme()
    elif options.accept:
        accept(options.out, options.suites or _finished(options.out))
    else:
        console = Console(soft_wrap=True, highlight=False, markup=False)
        for name in options.suites or suite_names():
            if not options.render:
                run_suite(name, options.out, console, options)
            if (options.out / f"{name}.json").exists():
                render(name, options.out)
                console.print((options.out / f"{name}.md").read_text(encoding="utf-8"))
        console.print(f"wrote {', '.join(sorted(path.name for path in options.out.glob('[!.]*')))} in {options.out}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python benchmarks/run.py", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"default: all ({', '.join(suite_names())})")
    parser.add_argument(
        "--case",
        action="append",
        metavar="TEXT",
        help="only cases whose names hold this, once or several times (rollout on a GPU: what its ways do next, too)",
    )
    parser.add_argument(
        "--way",
        action="append",
        metavar="TEXT",
        help="rollout and step: only ways whose names hold this; the next run measures the others (of step the first "
        "one that is measured says what gradients are right)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    parser.add_argument("--fresh", action="store_true", help="measure again what a run before has finished")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/benchmarks, or runs/benchmarks-quick")
    instead = parser.add_argument_group("instead of measuring").add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="name the suites and what they compare")
    instead.add_argument("--render", action="store_true", help="write tables and plots again from DIR/SUITE.json")
    instead.add_argument(
        "--accept", action="store_true", help="take DIR's results into benchmarks/results and README.md"
    )
    instead.add_argument("--readme", action="store_true", help="write README.md's tables again from benchmarks/results")
    options = parser.parse_args()
    if unknown := [name for name in options.suites if name not in suite_names()]:
        parser.error(f"unknown suite {unknown[0]!r}; there are: {', '.join(suite_names())}")
    options.out = options.out or Path("runs/benchmarks-quick" if options.quick else "runs/benchmarks")
    return options


def run_suite(name: str, out: Path, console: Console, options: argparse.Namespace) -> None:
    """Measures the cases that are not finished; one that fails is reported and leaves the others alone.

    Args:
        options: quick, fresh, and case and way, of which names must hold one (None: all).
    """
    import harness  # and with it torch: the rest of this command needs none

    suite = load_suite(name)
    if reason := suite.unfit():
        console.print(f"{name}: skipped, {reason}")
        return
    machine, digest = harness.machine(), digest_of(suite)
    cases = {key_of(name, case, machine, digest): case for case in suite.cases(options.quick)}
    store = Store(out, name, machine, fresh=options.fresh)
    store.keep(list(cases))
    if options.case:
        cases = {key: case for key, case in cases.items() if any(text in case.name for text in options.case)}
        if not cases:
            sys.exit(f"{name}: no case has {' or '.join(map(repr, options.case))} in its name")
    columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, expand=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=len(cases))
        for number, (key, case) in enumerate(cases.items(), start=1):
            bar.update(task, description=f"{name}: {case.name}")
            place = f"{name} {number}/{len(cases)}  {case.name}"
            if store.get(key) is not None:
                console.print(f"{place}: finished before")
            else:
                began, skip = time.monotonic(), left_out(case, options.way) | store.skips(key)
                try:
                    result = Result(case.name, case.settings, case.run(skip))
                except harness.DeviceLostError as lost:
                    store.skip(key, lost.name, lost.reason)
                    console.print(f"{place}: {lost.name} left the device unusable ({lost.reason}); starting again")
                    _start_again()
                except Exception as error:
                    result = Result(case.name, case.settings, failure=f"{type(error).__name__}: {error}")
                seconds = time.monotonic() - began
                store.put(key, Result(case.name, case.settings, result.measured, seconds, result.failure))
                failures = {one.name: one.failure for one in result.measured if one.failure}
                said = [result.failure or "", *(f"{who}: {failure_cell(why)}" for who, why in failures.items())]
                console.print(f"{place}: {seconds:.1f} s" + "".join(f"; {text}" for text in said if text))
            bar.advance(task)
            harness.free_memory()


def _start_again() -> None:
    """This command in a new process: what is finished stays finished."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *(argument for argument in sys.argv if argument != "--fresh")])


def render(name: str, out: Path) -> None:
    """Writes OUT/NAME.csv, .md and the plots from OUT/NAME.json, and OUT/benchmarks.md with all suites there are."""
    suite = load_suite(name)
    machine, results = read_results(out / f"{name}.json")
    write_csv(out / f"{name}.csv", suite, results)
    suite.plots(results, out)
    write_whole(out / f"{name}.md", document(name, about(name), suite, results, machine))
    pages = [(out / f"{suite}.md").read_text(encoding="utf-8") for suite in _finished(out)]
    write_whole(out / "benchmarks.md", "\n".join(["# Benchmarks\n", *pages]))


def _finished(out: Path) -> list[str]:
    return [name for name in suite_names() if (out / f"{name}.md").exists()]


def accept(out: Path, names: list[str]) -> None:
    """Copies results to benchmarks/results/NAME-MACHINE.json, with the table made from them, and updates the README."""
    if missing := [name for name in names if not (out / f"{name}.json").exists()]:
        sys.exit(f"{out} holds no results of {missing[0]}: python benchmarks/run.py {missing[0]} --out {out}")
    for name in names:
        machine, results = read_results(out / f"{name}.json")
        target = ACCEPTED / f"{name}-{machine_slug(machine)}.json"
        ACCEPTED.mkdir(exist_ok=True)
        shutil.copyfile(out / f"{name}.json", target)
        write_whole(target.with_suffix(".md"), excerpt(load_suite(name), results, machine))
        print(f"accepted {target.relative_to(ROOT)}")
    update_readme()


def readme_blocks() -> dict[str, str]:
    """By suite, the accepted tables of every machine."""
    files = {name: sorted(ACCEPTED.glob(f"{name}-*.md")) for name in suite_names()}
    return {
        name: "\n".join(path.read_text(encoding="utf-8") for path in paths) for name, paths in files.items() if paths
    }


def update_readme() -> None:
    text = README.read_text(encoding="utf-8")
    try:
        write_whole(README, with_blocks(text, readme_blocks()))
    except ValueError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
