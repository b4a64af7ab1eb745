"""`python benchmarks/run.py [SUITE …] [--quick] [--list] [--out DIR]`: ours beside the peers on this machine."""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

SUITES = {"kernels": "the head with its policy loss, and the loss on logits alone"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/run.py", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"default: all ({', '.join(SUITES)})")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    parser.add_argument("--list", action="store_true", help="name the suites and what they measure")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), metavar="DIR", help="default: %(default)s")
    options = parser.parse_args()
    if unknown := [name for name in options.suites if name not in SUITES]:
        parser.error(f"unknown suite {unknown[0]!r}; there are: {', '.join(SUITES)}")
    if options.list:
        for name, what in SUITES.items():
            print(f"{name:<10} {what}")
        return
    # Before OpenMP starts: a waiting thread that spins takes the core of a working one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in options.suites or SUITES:
        table = importlib.import_module(f"suite_{name}").run(options.out, quick=options.quick)
        (options.out / f"{name}.md").write_text(table, encoding="utf-8")
        print(table)
        print(f"wrote {options.out}/{name}.json, .csv, .md and .png")


if __name__ == "__main__":
    main()
