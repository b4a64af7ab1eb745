"""Rollouts with our engines beside TRL's and the paper's way, weight sync, sleep and start of an engine.

CPU: 2 minutes, --quick: 1; H200: 25 and 10. Same model folder, same prompts, pictures that were not seen before in
every round, and completions of one length, as the folder's end token is never sampled. Timed is the time from encoded
prompts to token ids. Each way runs in a process of its own, which holds the trainer's weights too; `rollout_driver`
says in which order, and what is kept (runs/rollout, or MRPO_ROLLOUT_DIR).

Before anything is timed, a plain Hugging Face forward pass must agree: with the log-probabilities that a way tells of
its samples, and that each token of a greedy completion has the largest logit. A weight sync must change what the engine
samples as the trainer's weights were changed.
"""

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import harness
import rollout_plots
import torch
from results import Case, Measured, Result, digest_of, load_suite
from rollout_driver import Driver, Job
from rollout_setting import CACHED, COLD, HF, OURS, REFERENCE, SLEEP_1, TRL, Setting
from rollout_tables import BIG, MAIN_CPU, MAIN_GPU, MANY, SLEEP, SMALL, START, SYNC, figures
from rollout_tables import TARGETS as TARGETS
from rollout_tables import details as details
from rollout_tables import summary as summary

SOURCES = (
    "mrpo",
    *(f"benchmarks/rollout_{part}.py" for part in ("checks", "driver", "setting", "trl", "ways", "worker")),
    *(f"benchmarks/{part}.py" for part in ("harness", "model_folders", "plain_generate", "random_models")),
    *(f"benchmarks/way_{part}.py" for part in ("mailbox", "process")),
)

NEEDED_GIB = 100


def unfit() -> str | None:
    if torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < NEEDED_GIB * 2**30:
        return f"8 billion parameters twice and an engine need a GPU of {NEEDED_GIB} GiB"
    return None


def cases(quick: bool) -> list[Case]:
    if not torch.cuda.is_available():
        return as_cases(list(_cpu_jobs(quick)))
    # A way runs through all cases of a list before the next one starts: what matters most is a list of its own.
    first, rest = list(_gpu_jobs()), [] if quick else list(_more_gpu_jobs())
    return as_cases(first) + as_cases(rest, first=len(first))


def as_cases(jobs: Sequence[Job], *, first: int = 0) -> list[Case]:
    numbered = [replace(job, number=number) for number, job in enumerate(jobs, start=first)]
    return [Case(job.name, job.settings(), partial(_run, job, numbered)) for job in numbered]


_MAIN = Setting(BIG, 8, 8, 784, 200, max_samples=256, max_image_tokens=1024, max_length=400, measured_prompts=1)


def _gpu_jobs() -> Iterator[Job]:
    # Ours has all the targets, and comes first in each: one engine, which no other way delays.
    yield Job(MAIN_GPU, "rollout", _MAIN, (OURS, TRL, HF, REFERENCE), turns=3)
    yield Job(SYNC, "sync", _MAIN, (OURS, TRL), turns=10)
    yield Job(SLEEP, "sleep", _MAIN, (OURS, SLEEP_1), turns=3)


def _more_gpu_jobs() -> Iterator[Job]:
    yield Job(MANY, "rollout", replace(_MAIN, prompts=32), (OURS, TRL), turns=3)
    yield from _sweeps(_MAIN, groups=(1, 4, 8, 16), image_tokens=(196, 784, 1024), lengths=(100, 200, 400))
    yield Job(START, "start", _MAIN, (COLD, CACHED), turns=0)


def _cpu_jobs(quick: bool) -> Iterator[Job]:
    main = Setting(SMALL, 8, 8, 144, 48, max_samples=64, max_image_tokens=256, max_length=96, measured_prompts=2)
    yield Job(MAIN_CPU, "rollout", main, (OURS, TRL, HF, REFERENCE), turns=2 if quick else 5)
    if not quick:
        yield from _sweeps(main, groups=(1, 4, 8, 16), image_tokens=(16, 144, 256), lengths=(16, 48, 96))
    yield Job(SYNC, "sync", main, (OURS, TRL), turns=5 if quick else 20)
    if not quick:
        yield Job(START, "start", main, (COLD, CACHED), turns=0)


def _sweeps(
    setting: Setting, *, groups: Sequence[int], image_tokens: Sequence[int], lengths: Sequence[int]
) -> Iterator[Job]:
    """Always the same number of samples, with the engines alone."""
    changes = [
        *((f"G = {n}", "group", replace(setting, group=n, prompts=setting.samples // n)) for n in groups),
        *((f"{n} image tokens", "image_tokens", replace(setting, image_tokens=n)) for n in image_tokens),
        *((f"{n} tokens a completion", "length", replace(setting, length=n)) for n in lengths),
    ]
    for name, sweep, changed in changes:
        yield Job(name, "rollout", changed, (OURS, TRL), turns=3, sweep=sweep)


def _run(job: Job, jobs: Sequence[Job], skip: Mapping[str, str]) -> list[Measured]:
    return driver().run(job, jobs, skip)


@lru_cache(maxsize=1)
def driver() -> Driver:
    holder = tempfile.TemporaryDirectory(prefix="mrpo-rollout-")
    atexit.register(holder.cleanup)
    folder, kept, models = Path(holder.name), None, Path(holder.name) / "models"
    if torch.cuda.is_available():
        # A folder of 8 billion parameters takes 18 GB and a minute, and outlives a command that was broken off.
        models = Path(tempfile.gettempdir()) / "mrpo-models"
        kept = Path(os.environ.get("MRPO_ROLLOUT_DIR", "runs/rollout"))
    made = Driver(folder, models, kept, [harness.machine(), digest_of(load_suite("rollout"))])
    atexit.register(made.close)
    return made


def plots(results: Sequence[Result], out: Path) -> list[Path]:
    return rollout_plots.draw(results, figures, out)
