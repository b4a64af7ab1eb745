"""The runs of the study, each a job whose result is one file: what is there is not run again."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study.plan import Arm

if TYPE_CHECKING:
    from mrpo.config import Config
    from mrpo.data.phantom.render import Look
    from mrpo.data.phantom.scene import Split
    from mrpo.records import Example

RESULT, SAMPLES, PARTS, POLICY = "result.json", "samples.json", "parts.json", "policy"


@dataclass(frozen=True)
class QuestionSet:
    """Held-out phantom questions of a data seed: one greedy completion each, and `sampled` more."""

    name: str
    split: Split
    look: Look
    size: int
    sampled: int
    seed: int = 0


@dataclass(frozen=True)
class Job(ABC):
    """Something to be done once, whose results go to `folder`. Everything that they depend on stands in its fields."""

    name: str
    folder: Path
    start: str  # the policy to start from: a folder, or "phantom"

    @abstractmethod
    def work(self) -> None:
        """Does it in this process."""

    def specification(self) -> dict[str, Any]:
        """The fields as JSON, wherever the folder of the study lies, with those of the job that made its start."""
        origin = Path(self.start).parent / RESULT
        made = _read(origin)["job"] if Path(self.start).is_absolute() and origin.is_file() else self.start
        return json.loads(json.dumps({**asdict(self), "folder": self.folder.name, "start": made}))

    def seconds(self) -> float | None:
        """How long it took; None if it is not finished, or was of another specification."""
        path = self.folder / RESULT
        found = _read(path) if path.is_file() else None
        return found["seconds"] if found and found["job"] == self.specification() else None


@dataclass(frozen=True)
class RunJob(Job):
    """A training run (`overrides` None: none, the start policy itself), then its evaluation on `sets`."""

    overrides: tuple[str, ...] | None
    sets: tuple[QuestionSet, ...]
    flipped: float = 0.0
    missing: float = 0.0
    keep_policy: bool = False

    def work(self) -> None:
        from study.measuring import measure, write_samples
        from study.training import configure, train_policy

        config = configure([f"model.path={self.start}", f"output_dir={self.folder}", *(self.overrides or ())])
        policy = Path(self.start)
        if self.overrides is not None:
            policy = train_policy(config, flipped=self.flipped, missing=self.missing)
        sets = {s.name: (_questions(s), s.sampled) for s in self.sets}
        write_samples(self.folder / SAMPLES, measure(config, policy, sets))
        if self.overrides is not None and not self.keep_policy:
            shutil.rmtree(policy)
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)


@dataclass(frozen=True)
class CreditJob(Job):
    """How the advantages of `arms` agree with the true effects of steps, under the start policy; no training."""

    arms: tuple[Arm, ...]
    prompts: int
    continuations: int

    def work(self) -> None:
        from study.credit import study_credit, write_parts
        from study.measuring import load
        from study.training import configure

        from mrpo.data.phantom import PhantomDataset

        def config_of(arm: Arm) -> Config:
            return configure([f"model.path={self.start}", *arm.overrides])

        # Training questions of another seed: effects belong to training, and no run sees these.
        examples = PhantomDataset("train", size=self.prompts, seed=1, look="hard")[:]
        parts = study_credit(load(config_of(self.arms[0])), examples, self.arms, config_of, self.continuations)
        write_parts(self.folder / PARTS, [arm.name for arm in self.arms], parts)


@cache
def _questions(of: QuestionSet) -> list[Example]:
    """Drawn once in a process, by kind: chains of one kind are about equally long, as a batch's should be."""
    from mrpo.data.phantom import PhantomDataset

    drawn = PhantomDataset(of.split, size=of.size, seed=of.seed, look=of.look)[:]
    return sorted(drawn, key=lambda example: example.metadata["question"]["kind"])


def _read(result: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def run_jobs(jobs: Sequence[Job], *, workers: int, log: Path, report: Callable[[Job, float], None]) -> None:
    """Runs what is not finished, `workers` at a time in processes of one thread each, and reports each as it ends.

    A job begins when the one that makes the policy it starts from, which stands before it, has ended; else in order.

    Raises:
        RuntimeError: a job failed; those that finished are kept.
    """
    waiting: list[Job] = []
    for job in jobs:  # behind those that make what they start from
        if job.seconds() is None or Path(job.start).parent in {other.folder for other in waiting}:
            waiting.append(job)
    if not waiting:
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        _environment(OMP_NUM_THREADS="1", TQDM_DISABLE="1"),
        ProcessPoolExecutor(
            min(workers, len(waiting)), mp_context=get_context("spawn"), initializer=_prepare, initargs=(log,)
        ) as pool,
    ):
        under_way: dict[Future[float], Job] = {}
        try:
            while waiting or under_way:
                unfinished = {job.folder for job in (*waiting, *under_way.values())}
                ready = [job for job in waiting if Path(job.start).parent not in unfinished]
                waiting = [job for job in waiting if job not in ready]
                under_way |= {pool.submit(execute, job): job for job in ready}
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    report(under_way.pop(future), future.result())
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, Exception):
                raise RuntimeError(f"a run of the study failed, see {log}: {error}") from error
            # Stopped from outside: a training run takes SIGTERM for the wish to save, and its process would live on.
            for worker in active_children():
                worker.kill()
            raise


def execute(job: Job) -> float:
    """Does the job in this process, from its start; the seconds it took."""
    began = time.monotonic()
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    job.work()
    seconds = time.monotonic() - began
    partial = job.folder / f".{RESULT}"
    partial.write_text(json.dumps({"job": job.specification(), "seconds": seconds}), encoding="utf-8")
    partial.rename(job.folder / RESULT)
    return seconds


def _prepare(log: Path) -> None:
    """What a worker says goes to `log`; each is a process group of its own, behind a port of its own."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.stdout.flush()
    os.dup2(out, 1)
    os.dup2(out, 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set for the block: processes that start in it see them before they load any library."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
