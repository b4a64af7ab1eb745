"""A whole optimizer step beside TRL's trainer and the paper's way (CPU: 6 minutes, H200: 60, --quick: 1.5 and 15).

Same model, prompts, pictures, G and completion length, same rewards, same AdamW, and the same judge: an HTTP server in
a process of its own, whose latencies are log-normal and the same in every step of every way. Each way runs in processes
of its own. On a CPU they take turns step by step; on a GPU, where two do not fit, they run one after the other, and
what is finished is kept (runs/step, or MRPO_STEP_DIR), so that a case that was broken off goes on.

Before anything is timed the ways compute gradients of the same completions, which must agree; in every step each must
give the same number of tokens and ask the judge exactly once a completion. No weight moves (the learning rate is
1e-30), so that every step has the same work.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import harness
import step_plots
import torch
from results import Case, Measured, Result, digest_of, is_transient, load_suite, slug, write_whole
from step_checks import check_counts, draw_completions, gradient_error, mean, median_interval, merge
from step_driver import JudgeProcess
from step_setting import AHEAD, GRPO, MRPO, OURS, REFERENCE, REFERENCE_MICRO_BATCH, TRL, Setting
from step_tables import BIG, MAIN_CPU, MAIN_FULL, MAIN_LORA, PAIR, SMALL, STAGES, figures
from step_tables import TARGETS as TARGETS
from step_tables import details as details
from step_tables import summary as summary
from way_process import QUIET, FailedError, Pool, Script

if TYPE_CHECKING:
    from mrpo.records import Example

SOURCES = (
    "kernels",
    "csrc",
    "benchmarks/harness.py",
    "benchmarks/model_folders.py",
    "benchmarks/peers.py",
    "benchmarks/plain_generate.py",
    "benchmarks/random_models.py",
    "benchmarks/update_ways.py",
    "benchmarks/way_mailbox.py",
    "benchmarks/way_process.py",
    "mrpo",
    *(f"benchmarks/step_{part}.py" for part in ("checks", "driver", "judge", "ours", "reference", "setting")),
    *(f"benchmarks/step_{part}.py" for part in ("trl", "way", "worker")),
)

# Seconds: median and 99th percentile of the judge. On a CPU both are scaled down as the step is.
JUDGE_GPU, JUDGE_CPU = (2.0, 10.0), (0.25, 1.25)
# Of gradients, against full logits in the same precision.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}
NEEDED_GIB = 130
SCRIPT = Script("step_worker.py", launched=(OURS, AHEAD), environment=QUIET)
# Of these the first one that works says what gradients are right.
_TRUTH = (REFERENCE, TRL, OURS)
# Turns of the slowest way.
_REFERENCE_TURNS = 3


def unfit() -> str | None:
    if find_spec("deepspeed") is None:
        return "the trainer needs deepspeed, which is not installed"
    if torch.cuda.is_available():
        if torch.cuda.get_device_properties(0).total_memory < NEEDED_GIB * 2**30:
            return f"8 billion parameters, an engine and activations need a GPU of {NEEDED_GIB} GiB"
        if find_spec("vllm") is None:
            return "the engine of a step on a GPU is vllm, which is not installed"
    return None


def cases(quick: bool) -> list[Case]:
    return list(_gpu_cases(quick) if torch.cuda.is_available() else _cpu_cases(quick))


def _gpu_cases(quick: bool) -> Iterator[Case]:
    main = Setting(BIG, prompts=8, group=8, image_tokens=784, length=200, lora=True, rounds=4)
    # One after the other, what matters most first; but not ours, as the first one says what gradients are right.
    everyone = (TRL, OURS, REFERENCE, AHEAD)
    yield step_case(MAIN_LORA, main, everyone, turns=3)
    if quick:
        return
    yield step_case(MAIN_FULL, replace(main, lora=False), everyone, turns=3)
    yield pair_case(replace(main, prompts=4), pairs=10)
    yield from _sweeps(replace(main, prompts=4), groups=(4, 16), image_tokens=(196,), lengths=(100, 400), processes=())


def _cpu_cases(quick: bool) -> Iterator[Case]:
    main = Setting(SMALL, prompts=8, group=8, image_tokens=144, length=48, rounds=4 if quick else 8)
    ways = (REFERENCE, OURS, TRL) if quick else (REFERENCE, OURS, AHEAD, TRL)
    yield step_case(MAIN_CPU, main, ways, turns=2 if quick else 5)
    small = replace(main, prompts=4)
    yield pair_case(small, pairs=6 if quick else 40)
    if not quick:
        yield from _sweeps(small, groups=(4, 8, 16), image_tokens=(16, 64, 256), lengths=(16, 48, 96), processes=(1, 2))


def _sweeps(
    setting: Setting,
    *,
    groups: Sequence[int],
    image_tokens: Sequence[int],
    lengths: Sequence[int],
    processes: Sequence[int],
) -> Iterator[Case]:
    """Ours and TRL alone: the paper's way grows with the samples, whatever else changes."""
    changes: list[tuple[str, str, dict[str, Any]]] = [
        *((f"G = {count}", "group", {"group": count}) for count in groups),
        *((f"{count} image tokens", "image_tokens", {"image_tokens": count}) for count in image_tokens),
        *((f"{count} tokens a completion", "length", {"length": count}) for count in lengths),
        *((f"{count} processes", "processes", {"processes": count}) for count in processes),
    ]
    for name, sweep, change in changes:
        yield step_case(name, replace(setting, **change), (TRL, OURS), turns=3, sweep=sweep)


def step_case(name: str, setting: Setting, ways: Sequence[str], *, turns: int, sweep: str = "") -> Case:
    settings = {"kind": "step", **asdict(setting), "ways": list(ways), "turns": turns, "sweep": sweep}
    return Case(name, {**settings, "latency": list(_judge_seconds())}, partial(_run, setting, tuple(ways), turns))


def pair_case(setting: Setting, pairs: int) -> Case:
    settings = {"kind": "pair", **asdict(setting), "ways": [GRPO, MRPO], "turns": pairs, "sweep": ""}
    return Case(PAIR, settings, partial(_run_pair, setting, pairs))


def _judge_seconds() -> tuple[float, float]:
    return JUDGE_GPU if torch.cuda.is_available() else JUDGE_CPU


@dataclass
class Bench:
    """What lives through all cases: the judge, the ways that run, the model folders."""

    folder: Path
    judge: JudgeProcess
    pool: Pool
    keep_folder: Path | None

    def model(self, name: str) -> str:
        from model_folders import make_folder

        # On a GPU it takes 18 GB and a minute, and outlives a command that was broken off.
        home = Path(tempfile.gettempdir()) / "mrpo-models" if self.keep_folder else self.folder / "models"
        folder = home / name.replace(" ", "-")
        make_folder(name, folder, harness.device(), _dtype())
        harness.free_memory()
        return str(folder)

    def begin(self, ways: Sequence[str]) -> None:
        """Ends what a case does not need: on a GPU everything, as an engine keeps its memory until its process ends."""
        self.pool.keep(lambda name, _: self.keep_folder is None and name in ways)

    def kept(self, key: str) -> Path | None:
        """Where a result of this key is kept on a GPU, whose cases are long."""
        return None if self.keep_folder is None else self.keep_folder / key


@lru_cache(maxsize=1)
def bench() -> Bench:
    holder = tempfile.TemporaryDirectory(prefix="mrpo-step-")
    atexit.register(holder.cleanup)
    on_gpu = torch.cuda.is_available()
    keep = Path(os.environ.get("MRPO_STEP_DIR", "runs/step")) if on_gpu else None
    folder = Path(holder.name)
    made = Bench(folder, JudgeProcess(*_judge_seconds()), Pool(SCRIPT, folder, together=not on_gpu), keep)
    atexit.register(made.pool.close)
    return made


@dataclass
class Measurement:
    """One way in one case: what its steps gave, or why it has no more of them."""

    name: str
    steps: list[dict[str, float]] = field(default_factory=list)
    error: float | None = None
    failure: str | None = None

    def as_measured(self) -> Measured:
        if self.failure or not self.steps:
            return Measured(self.name, error=self.error, failure=self.failure or "not measured")
        seconds = [step["seconds"] for step in self.steps]
        names = dict.fromkeys(name for step in self.steps for name in step if name not in ("seconds", "peak"))
        values = {name: statistics.median(step.get(name, 0.0) for step in self.steps) for name in names}
        median, peak = statistics.median(seconds), int(max(step["peak"] for step in self.steps))
        return Measured(
            self.name, median, min(seconds), max(seconds), len(seconds), peak, self.error, values={**values}
        )


def _run(setting: Setting, ways: Sequence[str], turns: int, skip: Mapping[str, str]) -> list[Measured]:
    made = bench()
    made.begin(ways)
    setting = replace(setting, model=made.model(setting.model), judge=made.judge.url)
    skip = {**({} if find_spec("trl") else {TRL: "not installed (pip install trl)"}), **skip}
    found = {name: Measurement(name, failure=skip.get(name)) for name in ways}
    together = [list(ways)] if made.keep_folder is None else [[name] for name in ways]
    case = _Case(made, setting, turns)
    for names in together:
        case.measure([found[name] for name in names])
    if not any(is_transient(way.failure) for way in found.values()):
        case.forget()
    return [found[name].as_measured() for name in sorted(ways, key=_order)]


class _Case:
    """One setting on a bench."""

    def __init__(self, made: Bench, setting: Setting, turns: int) -> None:
        self._made, self._setting, self._turns = made, setting, turns
        self._timeout = 120.0 if made.keep_folder is None else 550.0
        fixed = replace(setting, model=Path(setting.model).name, judge="")
        parts = [asdict(fixed), turns, harness.machine(), digest_of(load_suite("step"))]
        self._key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def measure(self, ways: Sequence[Measurement]) -> None:
        """Prepares, compares and times these ways, in turns; what was measured before is read."""
        ways = [way for way in ways if way.failure is None]
        for way in ways:
            self._read(way)
        ways = [way for way in ways if len(way.steps) < self._wanted(way)]
        for act in (self._process, self._prepare):  # all start at once
            for way in ways:
                self._attempt(way, act)
        if self._setting.processes == 1:
            for way in sorted(ways, key=lambda way: _TRUTH.index(way.name) if way.name in _TRUTH else len(_TRUTH)):
                self._attempt(way, self._compare)
        for way in ways:
            self._attempt(way, self._step)  # to warm up
            way.steps[:] = way.steps[:-1]
        for turn in range(self._turns):
            for way in ways:
                if len(way.steps) <= turn < self._wanted(way):
                    self._attempt(way, self._step)
                    self._write(way)

    def _wanted(self, way: Measurement) -> int:
        """How many steps of it are timed."""
        return min(self._turns, _REFERENCE_TURNS) if way.name == REFERENCE else self._turns

    def _attempt(self, way: Measurement, act: Any) -> None:
        if way.failure is None:
            try:
                act(way)
            except FailedError as error:
                way.failure = str(error)
                self._made.pool.drop(way.name, self._setting.processes)

    def _process(self, way: Measurement) -> Any:
        return self._made.pool.get(way.name, self._setting.processes)

    def _prepare(self, way: Measurement) -> None:
        self._process(way).prepare(self._setting, self._timeout)

    def _compare(self, way: Measurement) -> None:
        """Gradients of completions that were drawn beforehand, against those of the first way that computed them."""
        folder = self._made.kept(self._key) or self._made.folder / self._key
        folder.mkdir(parents=True, exist_ok=True)
        own, truth = folder / f"{slug(way.name)}.pt", folder / "truth.pt"
        sampled = folder / "sampled.pt"
        torch.save(draw_completions(self._examples(), self._setting), sampled)
        self._process(way).ask("gradients", timeout=self._timeout, sampled=str(sampled), path=str(own))
        if not truth.exists():
            own.rename(truth)
            way.error = 0.0
            return
        way.error = gradient_error(torch.load(own), torch.load(truth))
        own.unlink()
        if not way.error <= TOLERANCE[str(_dtype()).removeprefix("torch.")]:
            raise FailedError(f"computes something else: gradients differ by {way.error:.2g}")

    def _examples(self) -> list[Example]:
        from model_folders import examples

        return examples(Path(self._setting.model), self._setting.prompts, self._setting.image_tokens)

    def _requests(self, way: Measurement) -> int:
        """How often a step of this way asks the judge, unless a completion has no steps."""
        setting = self._setting
        partly = setting.rounds * REFERENCE_MICRO_BATCH if way.name == REFERENCE else 0
        return min(partly, setting.samples) or setting.samples

    def _step(self, way: Measurement) -> None:
        taken = []
        for _ in range(3 if way.name == AHEAD else 1):
            self._made.judge.begin(self._requests(way))
            answers = self._process(way).ask("step", timeout=self._timeout, algorithm=GRPO, index=None)
            taken.append(merge(answers) | {"requests": float(self._made.judge.stats()["asked"])})
            check_counts(taken[-1], self._setting)
        self._made.judge.wait()
        # One step ahead, two steps are under way, and one in two waits. The verdicts of the first of three came while
        # the others had their turn: a gift, which does not count.
        way.steps.append(mean(taken[-2:]))

    def _read(self, way: Measurement) -> None:
        """Takes over the steps that were timed before the case was broken off."""
        path = self._made.kept(self._key)
        if path is not None and (path := path / f"{slug(way.name)}.json").exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            way.steps, way.error = content["steps"], content["error"]

    def _write(self, way: Measurement) -> None:
        path = self._made.kept(self._key)
        if path is not None and way.failure is None:
            path.mkdir(parents=True, exist_ok=True)
            content = {"steps": way.steps, "error": way.error}
            write_whole(path / f"{slug(way.name)}.json", json.dumps(content))

    def forget(self) -> None:
        """Drops what was kept of a case that is finished: its result is kept elsewhere."""
        if (path := self._made.kept(self._key)) is not None:
            shutil.rmtree(path, ignore_errors=True)


def _run_pair(setting: Setting, pairs: int, skip: Mapping[str, str]) -> list[Measured]:
    """Both algorithms in one process, on the very same completions, in turns whose order changes."""
    made = bench()
    made.begin([OURS])
    setting = replace(setting, model=made.model(setting.model), judge="")
    process = made.pool.get(OURS, 1)
    process.prepare(setting, 550.0)
    found = {GRPO: Measurement(GRPO), MRPO: Measurement(MRPO)}
    for pair in range(-1, pairs):
        for name in (GRPO, MRPO) if pair % 2 else (MRPO, GRPO):
            step = merge(process.ask("step", timeout=550.0, algorithm=name, index=max(0, pair)))
            if pair >= 0:
                found[name].steps.append(step)
    ratios = [m["seconds"] / g["seconds"] for g, m in zip(found[GRPO].steps, found[MRPO].steps, strict=True)]
    low, high = median_interval(ratios)
    measured = {name: one.as_measured() for name, one in found.items()}
    shares = {f"of {GRPO}": statistics.median(ratios), "low": low, "high": high}
    return [measured[GRPO], replace(measured[MRPO], values={**measured[MRPO].values, **shares})]


def plots(results: Sequence[Result], out: Path) -> list[Path]:
    return step_plots.draw(results, figures, STAGES, out)


def _order(name: str) -> int:
    return (OURS, AHEAD, TRL, REFERENCE).index(name)


def _dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32
