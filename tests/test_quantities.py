from __future__ import annotations

from dataclasses import dataclass

import pytest

from mrpo.quantities import (
    far,
    fully_valid,
    incorrect_in_bin,
    is_in_stage,
    is_in_stage_of_failures,
    rate_in_bin,
)

T, F = True, False


@dataclass(frozen=True)
class Sample:
    correct: bool | None
    validity: tuple[bool, ...] | None
    question_id: str = "q"


@pytest.mark.parametrize(
    "quantity",
    [
        *(is_in_stage(stage) for stage in ("early", "mid", "late", "none")),
        *(is_in_stage_of_failures(stage) for stage in ("early", "mid", "late")),
        *(rate_in_bin(bin, correct=correct) for bin in range(5) for correct in (T, F)),
        *(incorrect_in_bin(bin) for bin in range(5)),
        far,
        fully_valid,
    ],
)
def test_nothing_is_defined_without_a_verdict(quantity) -> None:
    assert quantity(Sample(T, None)) is None


def test_an_unjudged_answer_is_neither_right_nor_wrong() -> None:
    sample = Sample(None, (F, F, T, T, T))  # bin 1, rate 1/4
    assert incorrect_in_bin(0)(sample) is None
    assert rate_in_bin(0, correct=T)(sample) is None
    assert rate_in_bin(0, correct=F)(sample) is None
    assert incorrect_in_bin(0)(Sample(F, sample.validity)) == 1.0
    assert rate_in_bin(0, correct=F)(Sample(F, sample.validity)) == 0.25
    assert rate_in_bin(0, correct=T)(Sample(F, sample.validity)) is None


def test_without_steps_nothing_fails_and_nothing_is_valid() -> None:
    sample = Sample(T, ())
    assert [is_in_stage(stage)(sample) for stage in ("early", "late", "none")] == [0.0, 0.0, 0.0]
    assert is_in_stage_of_failures("early")(sample) is None
    assert fully_valid(sample) == 0.0
    assert fully_valid(Sample(T, (T,))) == 1.0
