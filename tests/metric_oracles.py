"""Summaries and intervals written out plainly, beside which the fast ones of mrpo.quantities and mrpo.estimates are
tested; themselves tested by hand-computed cases in test_metrics.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mrpo.metrics import (
    NUM_BINS,
    STAGES,
    Stage,
    failure_accumulation_rate,
    failure_bin,
    failure_stage,
    first_failure_point,
)


@dataclass(frozen=True)
class FailureSummary:
    """Failures of a set of completions. A share or mean over nothing is None.

    stage_of_failures: share of each stage among the completions with an invalid step; stage_of_all: among all.
    far_by_bin_correct, far_by_bin_incorrect: mean FAR per FFP bin of completions with a right or a wrong answer.
    incorrect_by_bin: share of wrong answers per FFP bin. valid_steps: mean share of valid steps, of those with steps.
    """

    num_completions: int
    num_failures: int
    stage_of_failures: dict[Stage, float | None]
    stage_of_all: dict[Stage, float | None]
    far: float | None
    far_by_bin_correct: tuple[float | None, ...]
    far_by_bin_incorrect: tuple[float | None, ...]
    incorrect_by_bin: tuple[float | None, ...]
    valid_steps: float | None


def summarize(validities: Sequence[Sequence[bool]], correct: Sequence[bool]) -> FailureSummary:
    """Summarises completions by the validity of their steps and whether their answers are right.

    Raises:
        ValueError: the two sequences differ in length.
    """
    points = [first_failure_point(validity) for validity in validities]
    rates = [failure_accumulation_rate(validity) for validity in validities]
    failures = [
        (failure_bin(point), rate, is_correct)
        for point, rate, is_correct in zip(points, rates, correct, strict=True)
        if point is not None
    ]
    stages = [failure_stage(point) for point in points if point is not None]

    def far_by_bin(wanted: bool) -> tuple[float | None, ...]:
        return tuple(
            _mean([rate for i, rate, right in failures if i == index and right == wanted]) for index in range(NUM_BINS)
        )

    return FailureSummary(
        num_completions=len(validities),
        num_failures=len(failures),
        stage_of_failures={stage: _ratio(stages.count(stage), len(failures)) for stage in STAGES},
        stage_of_all={stage: _ratio(stages.count(stage), len(validities)) for stage in STAGES},
        far=_mean(rates),
        far_by_bin_correct=far_by_bin(True),
        far_by_bin_incorrect=far_by_bin(False),
        incorrect_by_bin=tuple(
            _mean([float(not right) for i, _, right in failures if i == index]) for index in range(NUM_BINS)
        ),
        valid_steps=_mean([sum(validity) / len(validity) for validity in validities if validity]),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return _ratio(sum(present), len(present))


def _ratio(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def bootstrap_interval(
    values: ArrayLike,
    *,
    seed: int,
    level: float = 0.95,
    statistic: Callable[[NDArray[np.float64]], float] = np.mean,
    resamples: int = 2000,
) -> tuple[float, float]:
    """Percentile bootstrap interval of `statistic`, resampling the first axis: the questions.

    Args:
        values: (Q,) one value per question, or (Q, ...) several of each, which are drawn together.
        seed: of the resampling.
        level: coverage in (0, 1).
        statistic: maps values of Q drawn questions to a number; NaNs it returns are left out.

    Raises:
        ValueError: there are no questions, or `level` is not in (0, 1).
    """
    questions = np.asarray(values, dtype=np.float64)
    if questions.ndim == 0 or len(questions) == 0:
        raise ValueError("a bootstrap interval needs at least one question")
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1")
    generator = np.random.default_rng(seed)
    draws = (generator.integers(len(questions), size=len(questions)) for _ in range(resamples))
    statistics = [statistic(questions[draw]) for draw in draws]
    low, high = np.nanquantile(statistics, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
