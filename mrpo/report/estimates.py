"""Shares and means over evaluated completions, with bootstrap intervals over questions.

Completions of one question are not independent, so questions are resampled and not completions. Every figure is a
ratio of two sums over questions (so much of it, in so many completions that have it), which also covers a mean that
few completions define, such as the failure accumulation rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mrpo.metrics import bootstrap_interval
from mrpo.records import EvaluatedSample

# Of one completion: its value, or None where the quantity is undefined for it and it does not count.
Quantity = Callable[[EvaluatedSample], float | None]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its interval; all None when undefined."""

    value: float | None
    low: float | None
    high: float | None


def question_ids(samples: Sequence[EvaluatedSample]) -> list[str]:
    """The distinct questions of `samples`, sorted, so that the order of samples changes no interval."""
    return sorted({sample.question_id for sample in samples})


def sum_by_question(
    samples: Sequence[EvaluatedSample], questions: Sequence[str], quantity: Quantity
) -> tuple[Floats, Floats]:
    """Per question, the sum of the defined values and their number: two (Q,) float64."""
    place = {question: index for index, question in enumerate(questions)}
    sums, counts = np.zeros(len(questions)), np.zeros(len(questions))
    for sample in samples:
        value = quantity(sample)
        if value is not None:
            sums[place[sample.question_id]] += value
            counts[place[sample.question_id]] += 1.0
    return sums, counts


def estimate_mean(sums: Floats, counts: Floats, *, seed: int, level: float, resamples: int) -> Estimate:
    """The mean over completions, sum(sums) / sum(counts), and its percentile bootstrap interval over questions.

    The interval has no width when all questions agree (say, no failure in any): the bootstrap sees no spread.

    Args:
        sums, counts: (Q,) from `sum_by_question`.
    """
    return _estimate(np.stack([sums, counts], axis=1), _mean, seed, level, resamples)


def estimate_difference(
    before: tuple[Floats, Floats], after: tuple[Floats, Floats], *, seed: int, level: float, resamples: int
) -> Estimate:
    """The mean after minus the mean before, with both taken over the same questions in every resample (paired)."""
    return _estimate(np.stack([*after, *before], axis=1), _mean_difference, seed, level, resamples)


def _mean(sums_and_counts: Floats) -> float:
    total, count = sums_and_counts.sum(axis=0)
    return total / count if count > 0 else math.nan


def _mean_difference(columns: Floats) -> float:
    after_total, after_count, before_total, before_count = columns.sum(axis=0)
    if after_count == 0 or before_count == 0:
        return math.nan
    return after_total / after_count - before_total / before_count


def _estimate(
    columns: Floats, statistic: Callable[[Floats], float], seed: int, level: float, resamples: int
) -> Estimate:
    value = statistic(columns)
    if math.isnan(value):
        return Estimate(None, None, None)
    low, high = bootstrap_interval(columns, seed=seed, level=level, statistic=statistic, resamples=resamples)
    return Estimate(float(value), low, high)
