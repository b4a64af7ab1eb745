"""Runs the ways of the rollout suite through its cases, and judges what they answer.

On a CPU the ways of a case take turns. On a GPU, where an engine keeps its memory until its process ends, one way runs
after the other, through all the cases that need it: an engine takes minutes to start. What a way has finished is kept.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import harness
import torch
from model_folders import make_folder
from results import Measured, is_transient, slug
from rollout_checks import ERROR, GREEDY_ERROR, STALE, SYNCED
from rollout_setting import COLD, REFERENCE, TRL, WITH_VLLM, Setting
from way_process import QUIET, FailedError, Pool, Script, WayProcess

SCRIPT = Script(
    "rollout_worker.py",
    environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **QUIET},
)
# On a CPU, where compiling takes longer than the suite, and other processes need cores and memory too.
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1"}
# What `rollout_checks` may find.
LOGPROBS = {"float32": 1e-4, "bfloat16": 0.1}
GREEDY = {"float32": 1e-3, "bfloat16": 0.5}
# Turns of the slowest way.
_REFERENCE_TURNS = 3
# Pictures of a case, and of one of its rounds.
_OF_CASE, _OF_ROUND = 1 << 16, 1 << 9


@dataclass(frozen=True)
class Job:
    """One case: what is measured of which ways. `number` sets its pictures apart from those of the other cases."""

    name: str
    kind: str
    setting: Setting
    ways: tuple[str, ...]
    turns: int
    sweep: str = ""
    number: int = 0

    def settings(self) -> dict[str, Any]:
        own = {"kind": self.kind, **asdict(self.setting), "ways": list(self.ways)}
        return {**own, "turns": self.turns, "sweep": self.sweep, "number": self.number}

    def pictures(self, number: int) -> int:
        """The first picture of a round; -1 is that of the checks."""
        return self.number * _OF_CASE + (number + 1) * _OF_ROUND


@dataclass
class Measurement:
    """One way in one case: what its rounds gave, how far off it was, or why there is no more."""

    name: str
    rounds: list[dict[str, float]] = field(default_factory=list)
    checks: dict[str, float] = field(default_factory=dict)
    failure: str | None = None

    def as_measured(self) -> Measured:
        error = self.checks.get(ERROR)
        if self.failure or not self.rounds:
            return Measured(self.name, error=error, failure=self.failure or "not measured", values={**self.checks})
        seconds = [one["seconds"] for one in self.rounds]
        names = [name for name in self.rounds[0] if name not in ("seconds", "peak")]
        values = {name: statistics.median(one[name] for one in self.rounds) for name in names} | self.checks
        median, peak = statistics.median(seconds), int(max(one["peak"] for one in self.rounds))
        return Measured(self.name, median, min(seconds), max(seconds), len(seconds), peak, error, values=values)


class Driver:
    """What lives through all cases. `kept`: where results are kept on a GPU; None on a CPU.

    Args:
        stamp: what results depend on beside the case: machine and sources.
    """

    def __init__(self, folder: Path, models: Path, kept: Path | None, stamp: Sequence[Any]) -> None:
        self._folder, self._models, self._kept, self._stamp = folder, models, kept, list(stamp)
        script = SCRIPT if kept else replace(SCRIPT, environment={**SCRIPT.environment, **CPU_ENVIRONMENT})
        self._pool = Pool(script, folder / "ways", together=kept is None)
        self._found: dict[tuple[str, str], Measurement] = {}
        self._broken: dict[str, str] = {}
        self._timeout = 200.0 if kept is None else 550.0
        self._dtype = torch.bfloat16 if kept else torch.float32

    def run(self, job: Job, jobs: Sequence[Job], skip: Mapping[str, str]) -> list[Measured]:
        """Measures a case. On a GPU what its ways do in later `jobs` is measured on the way."""
        self._pool.keep(lambda name, _: name in job.ways)
        if self._kept is None:
            self._measure(job, job.ways, skip)
        else:
            for name in job.ways:
                for one in jobs[jobs.index(job) :]:
                    if name in one.ways:
                        self._measure(one, [name], skip)
            self._pool.close()
            if not any(is_transient(self._found[job.name, name].failure) for name in job.ways):
                # A case that is finished is kept elsewhere.
                shutil.rmtree(self._kept / self._key(job), ignore_errors=True)
        return [self._found[job.name, name].as_measured() for name in job.ways]

    def close(self) -> None:
        self._pool.close()

    def _measure(self, job: Job, names: Sequence[str], skip: Mapping[str, str]) -> None:
        """Prepares, checks and times these ways, in turns, unless they were measured before."""
        names = [name for name in names if (job.name, name) not in self._found]
        ways = [Measurement(name, failure=skip.get(name) or missing(name) or self._broken.get(name)) for name in names]
        self._found |= {(job.name, way.name): way for way in ways}
        ways = [way for way in ways if way.failure is None and not self._read(job, way)]
        for act in (self._prepare, self._check):
            for way in ways:
                self._attempt(job, way, act)
        for turn in range(-1, job.turns):  # the first to warm up
            for way in ways:
                if way.name != REFERENCE or turn < _REFERENCE_TURNS:
                    self._attempt(job, way, partial(self._turn, turn))
        for way in ways:
            self._write(job, way)

    def _attempt(self, job: Job, way: Measurement, act: Callable[[Job, Measurement], None]) -> None:
        if way.failure is None:
            try:
                act(job, way)
            except FailedError as error:
                way.failure = str(error)
                is_wrong, samples = way.failure.startswith(_WRONG), job.kind == "rollout"
                if act == self._prepare or (act == self._check and samples and not is_wrong):
                    self._broken[way.name] = way.failure
                if not (is_wrong and samples):  # a failed sync leaves whatever weights
                    self._pool.drop(way.name, 1)

    def _ask(self, way: Measurement, do: str, **arguments: Any) -> dict[str, Any]:
        [answer] = self._process(way).ask(do, timeout=self._timeout, **arguments)
        return answer

    def _process(self, way: Measurement) -> WayProcess:
        return self._pool.get(way.name, 1)

    def _prepare(self, job: Job, way: Measurement) -> None:
        folder = self._models / job.setting.model.replace(" ", "-")
        make_folder(job.setting.model, folder, harness.device(), self._dtype)
        harness.free_memory()
        cache = (self._kept or self._folder) / "vllm-cache"
        if way.name == COLD:
            shutil.rmtree(cache, ignore_errors=True)
        setting = asdict(replace(job.setting, model=str(folder)))
        more = {"cache": str(cache.resolve())} if job.kind == "start" else {}
        answer = self._ask(way, "prepare", setting=setting, **more)
        way.checks |= {"start s": answer["start s"]} if "start s" in answer else {}
        if job.kind == "start":
            way.rounds.append({"seconds": answer["start s"], "peak": answer["peak"]})

    def _check(self, job: Job, way: Measurement) -> None:
        """A plain forward pass of the trainer's weights must give the same; see `judge`."""
        do = "check_sync" if job.kind == "sync" else "check"
        judge(way, self._ask(way, do, first=job.pictures(-1)), str(self._dtype).removeprefix("torch."))

    def _turn(self, turn: int, job: Job, way: Measurement) -> None:
        do = {"rollout": "round", "sync": "sync", "sleep": "nap"}.get(job.kind)
        if do is None:
            return
        found = self._ask(way, do, first=job.pictures(turn + 1))
        if job.kind == "rollout":
            check_count(found, job.setting)
        elif job.kind == "sleep":
            judge(way, {"logprobs": found.pop("logprobs")}, str(self._dtype).removeprefix("torch."))
        if turn >= 0:
            way.rounds.append(found)

    def _key(self, job: Job) -> str:
        parts = json.dumps([job.name, job.settings(), *self._stamp], sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    def _read(self, job: Job, way: Measurement) -> bool:
        path = self._path(job, way)
        if path is None or not path.exists():
            return False
        content = json.loads(path.read_text(encoding="utf-8"))
        way.rounds, way.checks = content["rounds"], content["checks"]
        return True

    def _write(self, job: Job, way: Measurement) -> None:
        path = self._path(job, way)
        if path is not None and way.failure is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"rounds": way.rounds, "checks": way.checks}), encoding="utf-8")

    def _path(self, job: Job, way: Measurement) -> Path | None:
        return None if self._kept is None else self._kept / self._key(job) / f"{slug(way.name)}.json"


_WRONG = "computes something else"


def judge(way: Measurement, found: Mapping[str, float | None], dtype: str) -> None:
    """Takes over what the checks of a way gave, and raises FailedError if it is not what the weights would sample."""
    names = {"logprobs": ERROR, "restored": ERROR, "greedy": GREEDY_ERROR, "synced": SYNCED, "stale": STALE}
    limit = {name: GREEDY[dtype] if name == "greedy" else LOGPROBS[dtype] for name in names}
    for name, value in found.items():
        if value is None:
            raise FailedError(f"{_WRONG}: it tells no log-probabilities")
        way.checks[names[name]] = max(value, way.checks.get(names[name], 0.0))
        # NaN is in no order.
        if name == "stale":
            if not value > limit[name]:
                raise FailedError(f"{_WRONG}: moved weights differ by {value:.2g} from those before")
        elif not value <= limit[name]:
            raise FailedError(f"{_WRONG}: {names[name]} is {value:.2g}, above {limit[name]:g}")


def check_count(found: Mapping[str, float], setting: Setting) -> None:
    """Raises FailedError unless a round had all its tokens."""
    tokens = setting.samples * setting.length
    if round(found["tokens"]) != tokens:
        raise FailedError(f"{_WRONG}: {found['tokens']:.0f} completion tokens instead of {tokens}")


def missing(name: str) -> str | None:
    """Why a way cannot run here."""
    if name in WITH_VLLM and find_spec("vllm") is None:
        return "not installed (pip install mrpo[vllm])"
    return "not installed (pip install trl)" if name == TRL and find_spec("trl") is None else None
