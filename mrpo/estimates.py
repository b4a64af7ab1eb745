"""Shares and means over evaluated completions, with bootstrap intervals over questions.

Completions of one question are not independent, so questions are resampled and not completions. Every figure is a
ratio of two sums over questions (so much of it, in so many completions that have it), which also covers a mean that
few completions define, such as the failure accumulation rate. Equal seeds draw equal questions: the difference of two
figures of the same questions, resample by resample, is paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_WEIGHTS_AT_ONCE = 1 << 22  # of float64: 32 MiB
_ROUNDING = 1e-12  # below this a difference of two means is none


class OfQuestion(Protocol):
    """Anything that belongs to a question."""

    @property
    def question_id(self) -> str: ...


Sample = TypeVar("Sample", bound=OfQuestion)


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its interval; all None when undefined, the ends alone when no resample defines it."""

    value: float | None
    low: float | None
    high: float | None


def question_ids(samples: Sequence[OfQuestion]) -> list[str]:
    """The distinct questions of `samples`, sorted, so that the order of samples changes no interval."""
    return sorted({sample.question_id for sample in samples})


def sum_by_question(
    samples: Sequence[Sample], questions: Sequence[str], quantity: Callable[[Sample], float | None]
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

    The interval has no width when all questions agree, as the bootstrap sees no spread; `estimate_share` knows better.

    Args:
        sums, counts: (Q,) from `sum_by_question`.
    """
    return summarize_draws(mean(sums, counts), resampled_means(sums, counts, seed=seed, resamples=resamples), level)


def estimate_share(sums: Floats, counts: Floats, *, seed: int, level: float, resamples: int) -> Estimate:
    """`estimate_mean` of what lies in [0, 1], with the exact interval where it is 0, or 1, in every question."""
    found = estimate_mean(sums, counts, seed=seed, level=level, resamples=resamples)
    return with_exact_ends(found, int((counts > 0).sum()), level)


def with_exact_ends(share: Estimate, questions: int, level: float) -> Estimate:
    """The Clopper-Pearson interval where a share is 0 or 1 in all of `questions`; any other estimate as it is.

    None of n is [0, 1 - (alpha / 2)^(1 / n)]. The bound holds for any quantity in [0, 1], not only for one that is 0 or
    1: of all that have a given mean, the one that is 0 or 1 is most often 0 everywhere. Clopper & Pearson, Biometrika
    26 (1934).
    """
    if share.value not in (0.0, 1.0):
        return share
    reach = 1.0 - ((1.0 - level) / 2.0) ** (1.0 / questions)
    return Estimate(0.0, 0.0, reach) if share.value == 0.0 else Estimate(1.0, 1.0 - reach, 1.0)


def estimate_difference(
    before: tuple[Floats, Floats], after: tuple[Floats, Floats], *, seed: int, level: float, resamples: int
) -> Estimate:
    """The mean after minus the mean before, with both taken over the same questions in every resample (paired)."""
    first, second = (resampled_means(*sums, seed=seed, resamples=resamples) for sums in (before, after))
    return summarize_draws(mean(*after) - mean(*before), second - first, level)


def mean(sums: Floats, counts: Floats) -> Floats:
    """The means over completions: (Q, ...) sums and counts -> (...); NaN where nothing is defined."""
    return _ratio(sums.sum(axis=0), counts.sum(axis=0))


def resampled_means(sums: Floats, counts: Floats, *, seed: int, resamples: int) -> Floats:
    """The means over `resamples` draws of Q questions with replacement: (Q, ...) -> (resamples, ...).

    NaN where no drawn question defines the figure. Equal seeds and Q give equal draws.
    """
    size = len(sums)
    columns = np.stack([sums.reshape(size, -1), counts.reshape(size, -1)])
    drawn = np.empty((2, resamples, columns.shape[2]))
    generator = np.random.default_rng(seed)
    rows = max(1, _WEIGHTS_AT_ONCE // max(1, size))
    for first in range(0, resamples, rows):
        # How often each question is drawn is all that a sum needs, and makes the sums one matrix product.
        draws = (generator.integers(size, size=size) for _ in range(min(rows, resamples - first)))
        weights = np.stack([np.bincount(draw, minlength=size) for draw in draws]).astype(np.float64)
        drawn[:, first : first + len(weights)] = weights @ columns
    return _ratio(*drawn).reshape(resamples, *sums.shape[1:])


def summarize_draws(value: Floats, draws: Floats, level: float) -> Estimate:
    """A figure with the percentile interval of its resamples, (resamples,); NaNs among them are left out."""
    if np.isnan(value):
        return Estimate(None, None, None)
    if np.isnan(draws).all():
        return Estimate(float(value), None, None)
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(value), float(low), float(high))


def two_sided_p(differences: Floats) -> float | None:
    """The p-value of no difference that belongs to the percentile interval; None when no resample is defined.

    Twice the smaller share of resampled differences, (resamples,), on either side of zero, with one added to count the
    data themselves: the smallest possible value is 2 / (resamples + 1). Davison & Hinkley, Bootstrap Methods (1997), 4.
    """
    defined = differences[~np.isnan(differences)]
    if not len(defined):
        return None
    below, above = (defined <= _ROUNDING).sum(), (defined >= -_ROUNDING).sum()
    return min(1.0, 2.0 * float(min(below, above) + 1) / (len(defined) + 1))


def _ratio(totals: Floats, counts: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, totals / counts, np.nan)
