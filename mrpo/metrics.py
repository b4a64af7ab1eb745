"""How reasoning fails: first failure point, failure accumulation rate, and their summaries.

A completion's K judged steps are given as booleans, True for valid; f is the 1-based index of its first invalid step.
The thirds that bound the stages are our assumption: the paper (arXiv 2606.31825) names the stages only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal

Stage = Literal["early", "mid", "late"]
STAGES: tuple[Stage, ...] = ("early", "mid", "late")
NUM_BINS = 5


def first_failure_point(validity: Sequence[bool]) -> float | None:
    """FFP = f / K in (0, 1], or None when no step is invalid."""
    return (list(validity).index(False) + 1) / len(validity) if not all(validity) else None


def failure_accumulation_rate(validity: Sequence[bool]) -> float | None:
    """FAR: the share of invalid steps among those after f, or None when nothing failed or nothing follows."""
    if all(validity):
        return None
    after = list(validity)[list(validity).index(False) + 1 :]
    return after.count(False) / len(after) if after else None


def failure_stage(ffp: float) -> Stage:
    """The third of (0, 1] that a first failure point lies in, upper ends included."""
    return STAGES[_bin(ffp, len(STAGES))]


def failure_bin(ffp: float) -> int:
    """The index of the first failure point's bin, ((i / 5), (i + 1) / 5]."""
    return _bin(ffp, NUM_BINS)


def first_failure_stage(validity: Sequence[bool]) -> Stage | None:
    """The stage of the first invalid step, or None when no step is invalid."""
    point = first_failure_point(validity)
    return None if point is None else failure_stage(point)


def first_failure_bin(validity: Sequence[bool]) -> int | None:
    """The bin of the first invalid step, or None when no step is invalid."""
    point = first_failure_point(validity)
    return None if point is None else failure_bin(point)


def _bin(value: float, count: int) -> int:
    return bisect_left([(i + 1) / count for i in range(count)], value)
