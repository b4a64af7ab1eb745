"""Where a chain of judged steps first fails, from its steps; None where none is invalid."""

from __future__ import annotations

from collections.abc import Sequence

from mrpo.metrics import Stage, failure_bin, failure_stage, first_failure_point


def first_failure_stage(validity: Sequence[bool]) -> Stage | None:
    point = first_failure_point(validity)
    return None if point is None else failure_stage(point)


def first_failure_bin(validity: Sequence[bool]) -> int | None:
    point = first_failure_point(validity)
    return None if point is None else failure_bin(point)
