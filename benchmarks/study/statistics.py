"""Estimates over cells and questions, and paired differences between arms.

A cell is a warm start and a seed: its runs share start policy, prompts and their order, whatever the method, and share
nothing with another cell's but the held-out questions. What an arm does is uncertain in two ways, from cell to cell and
from question to question, so both are resampled at once, with equal draws for every arm: differences are paired. Of C
cells C - 1 are drawn (Rao & Wu, 1988), because few cells drawn C at a time vary too little. The p-value is that of the
exact sign-flip test on the differences of the cells: it asks for other warm starts and seeds, and cannot fall below
2 / 2^C.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from study.measuring import Sample

from mrpo.estimates import Estimate, Floats, sum_by_question, summarize_draws
from mrpo.metrics import NUM_BINS, STAGES
from mrpo.quantities import far, fully_valid, incorrect_in_bin, is_in_stage, is_in_stage_of_failures, rate_in_bin

LEVEL, RESAMPLES = 0.95, 2000
Quantity = Callable[[Sample], float | None]


@dataclass(frozen=True)
class Metric:
    """A figure: its key, what it is called, and what it asks of a completion (None: undefined there)."""

    key: str
    name: str
    quantity: Quantity
    percent: bool = True
    higher_is_better: bool = True


def _greedy(quantity: Quantity) -> Quantity:
    return lambda sample: quantity(sample) if sample.greedy else None


def _sampled(quantity: Quantity) -> Quantity:
    return lambda sample: None if sample.greedy else quantity(sample)


def _correct(sample: Sample) -> float:
    return float(sample.correct)


def _valid_steps(sample: Sample) -> float | None:
    return sum(sample.validity) / len(sample.validity) if sample.validity else 0.0


def _faulty(letter: str) -> Quantity:
    return lambda sample: float(letter in sample.faults)


METRICS: tuple[Metric, ...] = (
    Metric("accuracy", "accuracy", _greedy(_correct)),
    Metric("accuracy_sampled", "accuracy, sampled", _sampled(_correct)),
    Metric("valid_steps", "valid steps", _greedy(_valid_steps)),
    Metric("fully_valid", "fully valid chains", _greedy(fully_valid)),
    *(Metric(f"{s}_of_all", f"{s} failures", _greedy(is_in_stage(s)), higher_is_better=False) for s in STAGES),
    Metric("early_sampled", "early failures, sampled", _sampled(is_in_stage("early")), higher_is_better=False),
    *(
        Metric(f"{s}_of_failures", f"{s} share of failures", _greedy(is_in_stage_of_failures(s)), True, s == "late")
        for s in STAGES
    ),
    Metric("far", "failure accumulation rate", far, higher_is_better=False),
    Metric("far_bin1", "FAR, FFP 0.0-0.2", lambda s: far(s) if _bin_of(s) == 0 else None, higher_is_better=False),
    Metric("omits", "chains that skip a finding", _greedy(_faulty("s")), higher_is_better=False),
    Metric("num_steps", "steps", _greedy(lambda s: float(len(s.steps))), False),
    Metric("reward", "reward", _greedy(lambda s: s.reward), False),
)
BINS: dict[str, tuple[Metric, ...]] = {
    "far, correct": tuple(Metric(f"far_correct_{i}", "", rate_in_bin(i, correct=True)) for i in range(NUM_BINS)),
    "far, incorrect": tuple(Metric(f"far_incorrect_{i}", "", rate_in_bin(i, correct=False)) for i in range(NUM_BINS)),
    "incorrect": tuple(Metric(f"incorrect_{i}", "", incorrect_in_bin(i)) for i in range(NUM_BINS)),
}


def _bin_of(sample: Sample) -> int | None:
    from mrpo.metrics import first_failure_bin

    return first_failure_bin(sample.validity)


@dataclass(frozen=True)
class Table:
    """Sums and counts of every metric by cell and question, (C, Q, M) each."""

    cells: tuple[str, ...]
    metrics: tuple[Metric, ...]
    sums: Floats
    counts: Floats

    def values(self) -> Floats:
        """(M,) means over all completions of all cells."""
        return ratio(self.sums.sum((0, 1)), self.counts.sum((0, 1)))

    def by_cell(self) -> Floats:
        """(C, M)"""
        return ratio(self.sums.sum(1), self.counts.sum(1))


def tabulate(runs: Mapping[str, Sequence[Sample]], metrics: Sequence[Metric]) -> Table:
    """`runs` by cell; every cell must answer the same questions."""
    questions = sorted({sample.question_id for samples in runs.values() for sample in samples})
    parts = [[sum_by_question(samples, questions, m.quantity) for m in metrics] for samples in runs.values()]
    sums, counts = (np.array([[pair[i] for pair in cell] for cell in parts]).transpose(0, 2, 1) for i in (0, 1))
    return Table(tuple(runs), tuple(metrics), sums, counts)


def draws(table: Table, *, seed: int = 0, resamples: int = RESAMPLES) -> Floats:
    """(resamples, M) means over resampled cells and questions; tables of one shape get equal draws."""
    generator = np.random.default_rng(seed)
    cells, questions, _ = table.sums.shape
    of_cells = weights(generator, cells, max(1, cells - 1), resamples)
    of_questions = weights(generator, questions, questions, resamples)
    sums, counts = (
        np.einsum("rc,rcm->rm", of_cells, np.tensordot(of_questions, part, (1, 1)))
        for part in (table.sums, table.counts)
    )
    return ratio(sums, counts)


def weights(generator: np.random.Generator, size: int, drawn: int, resamples: int) -> Floats:
    """(resamples, size) how often each of `size` is drawn when `drawn` are."""
    picks = (generator.integers(size, size=drawn) for _ in range(resamples))
    return np.stack([np.bincount(pick, minlength=size) for pick in picks]).astype(np.float64)


def estimates(table: Table) -> dict[str, Estimate]:
    """Each metric with its interval."""
    drawn, values = draws(table), table.values()
    return {m.key: summarize_draws(values[i], drawn[:, i], LEVEL) for i, m in enumerate(table.metrics)}


@dataclass(frozen=True)
class Difference:
    """Second minus first: estimate, sign-flip p-value, and in how many of the cells the second is higher."""

    estimate: Estimate
    p: float
    higher: int
    cells: int


def differences(first: Table, second: Table) -> dict[str, Difference]:
    """Of every metric, over the cells that both have."""
    shared = [cell for cell in first.cells if cell in second.cells]
    first, second = _only(first, shared), _only(second, shared)
    drawn, values = draws(second) - draws(first), second.values() - first.values()
    of_cells = second.by_cell() - first.by_cell()
    return {
        m.key: Difference(
            summarize_draws(values[i], drawn[:, i], LEVEL),
            sign_flip_p(of_cells[:, i]),
            int((of_cells[:, i] > 0).sum()),
            len(shared),
        )
        for i, m in enumerate(first.metrics)
    }


def sign_flip_p(differences_of_cells: Floats) -> float:
    """Two-sided exact p-value of a mean difference of zero: each cell's sign is a fair coin. NaNs are left out."""
    values = differences_of_cells[~np.isnan(differences_of_cells)]
    if not len(values):
        return 1.0
    flipped = np.array(list(product((1.0, -1.0), repeat=len(values)))) @ values
    return float((np.abs(flipped) >= abs(values.sum()) - 1e-12).mean())


def _only(table: Table, cells: Sequence[str]) -> Table:
    places = [table.cells.index(cell) for cell in cells]
    return Table(tuple(cells), table.metrics, table.sums[places], table.counts[places])


def ratio(sums: Floats, counts: Floats) -> Floats:
    """NaN where nothing was counted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(counts > 0, sums / counts, np.nan)
