"""The stages of the study as jobs, each from what the ones before it left in the folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from study.credit import Part, read_parts
from study.jobs import PARTS, POLICY, SAMPLES, CreditJob, Job, QuestionSet, RunJob
from study.learning import read_curve
from study.measuring import Sample, read_samples
from study.plan import ABLATIONS, BASE, CREDITED, METHODS, Arm, Cell, Plan

# SFT of the warm starts: what `mrpo warm-start` uses, on harder pictures.
_SFT = (
    "algorithm=sft",
    "optim.batch_size=64",
    "optim.micro_batch_size=64",
    "optim.schedule=cosine",
    "optim.beta2=0.95",
    "optim.weight_decay=0.01",
    "loss.normalization=token",
    "optim.warmup_steps=10",
)
PERCEPTION_RATE, ERROR_RATE, CORRUPTION = 5e-4, 3e-4, 0.6
# Seeds of tuning runs; those of cells count from 0.
_TUNING_SEED = 1000
# Of the final questions: no pilot, no tuning and no other run of this project has seen these.
_TEST_SEED = 2
METRICS_FILE = "metrics.jsonl"  # what a training run says of its steps


@dataclass(frozen=True)
class Experiment:
    """A plan and the folder of its runs."""

    plan: Plan
    folder: Path

    def perception_jobs(self) -> list[RunJob]:
        """Every warm start first learns the hard pictures from true rationales, from the shipped policy."""
        return [
            self._warm(w, "perceive", "phantom", self.plan.perceive, PERCEPTION_RATE, 0.0) for w in self._warm_starts
        ]

    def error_jobs(self) -> list[RunJob]:
        """Then, briefly, from those of a reader who misreads the scene."""
        return [
            self._warm(w, "err", str(self.folder / f"w{w}-perceive" / POLICY), self.plan.err, ERROR_RATE, CORRUPTION)
            for w in self._warm_starts
        ]

    def base_jobs(self) -> list[RunJob]:
        return [
            RunJob(f"{BASE} w{w}", self._base(w), self._start(w), None, self._test_sets()) for w in self._warm_starts
        ]

    def tuning_jobs(self) -> list[RunJob]:
        """Every method at every rate, once, on the first warm start with a seed of its own; validation questions."""
        if len(self.plan.rates) == 1:
            return []
        return [
            self._job(arm, Cell(0, _TUNING_SEED), rate, self._tuning_folder(arm, rate), self._validation())
            for arm in METHODS
            for rate in self.plan.rates
        ]

    def credit_jobs(self) -> list[CreditJob]:
        """On the first warm start, what the shaping of each arm has to do with the effects of steps."""
        arms = (*METHODS[1:], *(arm for arm in ABLATIONS if arm.name in CREDITED))
        folder = self.folder / "credit"
        return [CreditJob("credit", folder, self._start(0), arms, self.plan.credit_prompts, self.plan.continuations)]

    def method_jobs(self, rates: Mapping[str, float]) -> list[RunJob]:
        return [self._arm_job(arm, cell, rates) for cell in self.plan.cells for arm in METHODS]

    def ablation_jobs(self, rates: Mapping[str, float]) -> list[RunJob]:
        return [self._arm_job(arm, cell, rates) for arm in self.plan.ablations for cell in self.plan.ablation_cells]

    def tuned(self) -> dict[str, dict[float, float]]:
        """By method and rate, the accuracy over all completions of the tuning runs that are finished."""
        found: dict[str, dict[float, float]] = {}
        for arm in METHODS:
            for rate in self.plan.rates:
                samples = self._read(self._tuning_folder(arm, rate)).get("validation", [])
                if samples:
                    found.setdefault(arm.name, {})[rate] = sum(s.correct for s in samples) / len(samples)
        return found

    def rates(self) -> dict[str, float]:
        """The best rate of each method on validation questions; of equal ones the lower, and the only one untried."""
        if len(self.plan.rates) == 1:
            return dict.fromkeys((arm.name for arm in METHODS), self.plan.rates[0])
        return {method: max(sorted(scores), key=scores.__getitem__) for method, scores in self.tuned().items()}

    def samples(self, arm: str, question_set: str) -> dict[str, list[Sample]]:
        """By cell, the completions of an arm (`base`: those of the cell's warm start)."""
        folders = {c.name: self._base(c.warm_start) if arm == BASE else self._folder(arm, c) for c in self.plan.cells}
        read = {cell: self._read(folder).get(question_set, []) for cell, folder in folders.items()}
        return {cell: samples for cell, samples in read.items() if samples}

    def curves(self, arm: str, key: str) -> dict[str, list[float]]:
        """By cell, a metric of every training step; of the cells whose run is finished."""
        folders = {cell.name: self._folder(arm, cell) for cell in self.plan.cells}
        return {
            cell: read_curve(folder / METRICS_FILE, key)
            for cell, folder in folders.items()
            if (folder / SAMPLES).is_file()
        }

    def parts(self) -> tuple[list[str], list[Part]]:
        """The schemes of the credit job and what it found; nothing before it is finished."""
        path = self.folder / "credit" / PARTS
        return read_parts(path) if path.is_file() else ([], [])

    @property
    def _warm_starts(self) -> range:
        return range(self.plan.warm_starts)

    def _warm(self, number: int, stage: str, start: str, steps: int, rate: float, corruption: float) -> RunJob:
        overrides = (
            *_SFT,
            f"optim.steps={steps}",
            f"optim.lr={rate}",
            f"data.corruption={corruption}",
            # Seeds far from those of the cells: no warm start sees its questions in the order of a run.
            f"seed={10_000 + 2 * number + (stage == 'err')}",
        )
        folder = self.folder / f"w{number}-{stage}"
        return RunJob(f"{stage} w{number}", folder, start, overrides, self._validation(), keep_policy=True)

    def _start(self, number: int) -> str:
        return str(self.folder / f"w{number}-err" / POLICY)

    def _arm_job(self, arm: Arm, cell: Cell, rates: Mapping[str, float]) -> RunJob:
        return self._job(arm, cell, rates[arm.method], self._folder(arm.name, cell), self._test_sets())

    def _job(self, arm: Arm, cell: Cell, rate: float, folder: Path, sets: tuple[QuestionSet, ...]) -> RunJob:
        overrides = (
            *arm.overrides,
            f"optim.steps={self.plan.steps}",
            f"optim.lr={rate}",
            f"seed={cell.seed}",
        )
        name = f"{arm.name} {cell.name}"
        return RunJob(name, folder, self._start(cell.warm_start), overrides, sets, arm.flipped, arm.missing)

    def _folder(self, arm: str, cell: Cell) -> Path:
        return self.folder / "runs" / f"{_slug(arm)}-{cell.name}"

    def _base(self, number: int) -> Path:
        return self.folder / f"w{number}-{BASE}"

    def _tuning_folder(self, arm: Arm, rate: float) -> Path:
        return self.folder / "tuning" / f"{_slug(arm.name)}-{rate:g}"

    def _validation(self) -> tuple[QuestionSet, ...]:
        return (QuestionSet("validation", "validation", "hard", self.plan.tuning_questions, self.plan.sampled),)

    def _test_sets(self) -> tuple[QuestionSet, ...]:
        return (
            QuestionSet("test", self.plan.held_out, "hard", self.plan.questions, self.plan.sampled, _TEST_SEED),
            QuestionSet("shifted", self.plan.held_out, "shifted", self.plan.shifted_questions, 0, _TEST_SEED),
        )

    def _read(self, folder: Path) -> dict[str, list[Sample]]:
        path = folder / SAMPLES
        return read_samples(path) if path.is_file() else {}


def stages(experiment: Experiment) -> Iterator[tuple[str, Sequence[Job]]]:
    """The stages in order. Each is asked for when those before it are finished: rates are found on the way."""
    yield "perception", experiment.perception_jobs()
    yield "errors", experiment.error_jobs()
    yield "start policies", experiment.base_jobs()
    yield "credit", experiment.credit_jobs()
    yield "tuning", experiment.tuning_jobs()
    yield "methods", experiment.method_jobs(experiment.rates())
    yield "ablations", experiment.ablation_jobs(experiment.rates())


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c == "." else "-" for c in name.lower())
