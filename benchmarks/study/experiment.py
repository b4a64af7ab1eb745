"""The stages of the study as jobs, each from what the ones before it left in the folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from study.credit import Part, read_parts
from study.jobs import PARTS, POLICY, SAMPLES, CreditJob, Job, QuestionSet, RunJob
from study.learning import read_curve
from study.measuring import Sample, read_samples
from study.plan import ABLATIONS, BASE, CREDITED, METHODS, SAMPLING, Arm, Plan

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
# Far from each other, and from those of the first study and of pilots: no warm start sees its questions in the order of
# a run, and no run repeats an earlier one.
_CELL_SEED, _TUNING_SEED, _WARM_SEED = 100, 1000, 20_000
# Of the final questions: no pilot, no tuning and no earlier study has seen these.
_TEST_SEED = 3
METRICS_FILE = "metrics.jsonl"  # what a training run says of its steps


@dataclass(frozen=True)
class Experiment:
    """A plan and the folder of its runs."""

    plan: Plan
    folder: Path

    def perception_jobs(self) -> list[RunJob]:
        """Every warm start first learns the hard pictures from true rationales, from the shipped policy."""
        return [self._warm(c, "perceive", "phantom", self.plan.perceive, PERCEPTION_RATE, 0.0) for c in self._cells]

    def error_jobs(self) -> list[RunJob]:
        """Then, briefly, from those of a reader who misreads the scene."""
        return [
            self._warm(c, "err", str(self._warm_folder(c, "perceive") / POLICY), self.plan.err, ERROR_RATE, CORRUPTION)
            for c in self._cells
        ]

    def base_jobs(self) -> list[RunJob]:
        return [
            RunJob(_job_name(BASE, c), self._folder(BASE, c), self._start(c), None, (self._test(), self._shifted()))
            for c in self._cells
        ]

    def tuning_jobs(self) -> list[RunJob]:
        """Every method at every rate, once, on the first warm start with a seed of its own; validation questions."""
        if len(self.plan.rates) == 1:
            return []
        return [
            self._job(arm, 0, _TUNING_SEED, rate, self._tuning_folder(arm, rate), self._validation())
            for arm in METHODS
            for rate in self.plan.rates
        ]

    def credit_jobs(self) -> list[CreditJob]:
        """On the first warm start, what the shaping of each arm has to do with the effects of steps."""
        arms = (*SAMPLING, *(arm for arm in ABLATIONS if arm.name in CREDITED))
        name, folder, plan = _job_name("credit", 0), self.folder / "credit", self.plan
        return [CreditJob(name, folder, self._start(0), arms, plan.credit_prompts, plan.continuations)]

    def method_jobs(self, rates: Mapping[str, float]) -> list[RunJob]:
        sets = (self._test(), self._shifted())
        return [self._arm_job(arm, cell, rates, sets) for cell in self._cells for arm in METHODS]

    def ablation_jobs(self, rates: Mapping[str, float]) -> list[RunJob]:
        cells = self._cells[: self.plan.ablation_cells]
        return [self._arm_job(arm, cell, rates, (self._test(),)) for arm in self.plan.ablations for cell in cells]

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
        read = {_cell_name(c): self._read(self._folder(arm, c)).get(question_set, []) for c in self._cells}
        return {cell: samples for cell, samples in read.items() if samples}

    def curves(self, arm: str, key: str) -> dict[str, list[float]]:
        """By cell, a metric of every training step; of the cells whose run is finished."""
        folders = {_cell_name(cell): self._folder(arm, cell) for cell in self._cells}
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
    def _cells(self) -> range:
        return range(self.plan.cells)

    def _warm(self, cell: int, stage: str, start: str, steps: int, rate: float, corruption: float) -> RunJob:
        overrides = (
            *_SFT,
            f"optim.steps={steps}",
            f"optim.lr={rate}",
            f"data.corruption={corruption}",
            f"seed={_WARM_SEED + 2 * cell + (stage == 'err')}",
        )
        folder = self._warm_folder(cell, stage)
        return RunJob(_job_name(stage, cell), folder, start, overrides, self._validation(), keep_policy=True)

    def _start(self, cell: int) -> str:
        return str(self._warm_folder(cell, "err") / POLICY)

    def _arm_job(self, arm: Arm, cell: int, rates: Mapping[str, float], sets: tuple[QuestionSet, ...]) -> RunJob:
        return self._job(arm, cell, _CELL_SEED + cell, rates[arm.method], self._folder(arm.name, cell), sets)

    def _job(self, arm: Arm, cell: int, seed: int, rate: float, folder: Path, sets: tuple[QuestionSet, ...]) -> RunJob:
        overrides = (
            *arm.overrides,
            f"optim.steps={self.plan.steps}",
            *([] if any(o.startswith("optim.lr=") for o in arm.overrides) else [f"optim.lr={rate}"]),
            f"seed={seed}",
        )
        name = _job_name(arm.name, cell)
        return RunJob(name, folder, self._start(cell), overrides, sets, arm.flipped, arm.missing)

    def _folder(self, arm: str, cell: int) -> Path:
        return self.folder / "runs" / f"{_slug(arm)}-{_cell_name(cell)}"

    def _warm_folder(self, cell: int, stage: str) -> Path:
        return self.folder / "warm-starts" / f"{_cell_name(cell)}-{stage}"

    def _tuning_folder(self, arm: Arm, rate: float) -> Path:
        return self.folder / "tuning" / f"{_slug(arm.name)}-{rate:g}"

    def _validation(self) -> tuple[QuestionSet, ...]:
        return (QuestionSet("validation", "validation", "hard", self.plan.tuning_questions, self.plan.sampled),)

    def _test(self) -> QuestionSet:
        return QuestionSet("test", self.plan.held_out, "hard", self.plan.questions, self.plan.sampled, _TEST_SEED)

    def _shifted(self) -> QuestionSet:
        return QuestionSet("shifted", self.plan.held_out, "shifted", self.plan.shifted_questions, 0, _TEST_SEED)

    def _read(self, folder: Path) -> dict[str, list[Sample]]:
        path = folder / SAMPLES
        return read_samples(path) if path.is_file() else {}


def stages(experiment: Experiment) -> Iterator[tuple[str, Sequence[Job]]]:
    """The stages in order. Each is asked for when those before it are finished: rates are found on the way."""
    # Few and large: at the end of a stage cores are idle.
    yield "warm starts", [*experiment.perception_jobs(), *experiment.error_jobs()]
    yield "start policies, credit and tuning", [
        *experiment.credit_jobs(), *experiment.tuning_jobs(), *experiment.base_jobs()
    ]  # fmt: skip
    rates = experiment.rates()
    yield "methods and ablations", [*experiment.method_jobs(rates), *experiment.ablation_jobs(rates)]


def _cell_name(cell: int) -> str:
    """Cells are counted from 1 where people read of them."""
    return f"c{cell + 1}"


def _job_name(what: str, cell: int) -> str:
    return f"{what} {_cell_name(cell)}"


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c == "." else "-" for c in name.lower())
