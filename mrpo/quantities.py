"""What a figure asks of one evaluated completion: a number, or None where it is undefined and does not count.

`mrpo.estimates` takes their means over completions, with intervals. A completion that was not judged has no validity,
and none of these is defined for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from mrpo.metrics import failure_accumulation_rate, first_failure_bin, first_failure_stage


class Judged(Protocol):
    """A completion of a question, the verdict on its answer and on each of its steps; None: not judged."""

    @property
    def question_id(self) -> str: ...

    @property
    def correct(self) -> bool | None: ...

    @property
    def validity(self) -> tuple[bool, ...] | None: ...


Quantity = Callable[[Judged], float | None]


def is_in_stage(stage: str) -> Quantity:
    """1 where the first failure is in `stage`, else 0. Stage `none`: the chain has steps and all are valid."""

    def quantity(sample: Judged) -> float | None:
        if sample.validity is None:
            return None
        return float((first_failure_stage(sample.validity) or ("none" if sample.validity else "")) == stage)

    return quantity


def is_in_stage_of_failures(stage: str) -> Quantity:
    """1 where the first failure is in `stage`, 0 where it is in another, undefined without failure."""

    def quantity(sample: Judged) -> float | None:
        found = first_failure_stage(sample.validity or ())
        return None if found is None else float(found == stage)

    return quantity


def far(sample: Judged) -> float | None:
    """The failure accumulation rate."""
    return failure_accumulation_rate(sample.validity or ())


def rate_in_bin(index: int, *, correct: bool) -> Quantity:
    """The failure accumulation rate of completions that first fail in bin `index` and answer rightly or wrongly."""

    def quantity(sample: Judged) -> float | None:
        if sample.correct != correct or first_failure_bin(sample.validity or ()) != index:
            return None
        return far(sample)

    return quantity


def incorrect_in_bin(index: int) -> Quantity:
    """1 where a completion that first fails in bin `index` answers wrongly, 0 where rightly."""

    def quantity(sample: Judged) -> float | None:
        if sample.correct is None or first_failure_bin(sample.validity or ()) != index:
            return None
        return float(not sample.correct)

    return quantity


def fully_valid(sample: Judged) -> float | None:
    """1 where a completion has steps and all are valid. Without steps there is no chain that could be valid: 0."""
    if sample.validity is None:
        return None
    return float(len(sample.validity) > 0 and all(sample.validity))
