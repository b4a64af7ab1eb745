"""What an evaluation amounts to as metrics of a step."""

from __future__ import annotations

import pytest

from mrpo.evaluation import validation_metrics
from mrpo.records import EvaluatedSample


def sample(correct: bool, validity: tuple[bool, ...] | None, reward: float) -> EvaluatedSample:
    return EvaluatedSample("q", correct, validity, reward, greedy=True)


def test_accuracy_is_of_all_and_the_rest_of_those_judged() -> None:
    samples = [
        sample(True, (True, True, True), 2.0),
        sample(False, (False, True, True), 1.0),  # fails at 1 of 3: early
        sample(False, (True, True, False), 0.0),
        sample(True, None, 9.0),
    ]
    assert validation_metrics(samples) == pytest.approx(
        {
            "validation/accuracy": 0.5,
            "validation/reward": 1.0,
            "validation/early": 1 / 3,
            "validation/fully_valid": 1 / 3,
        }
    )


def test_without_a_judged_completion_only_accuracy_is_known() -> None:
    assert validation_metrics([sample(True, None, 1.0)]) == {"validation/accuracy": 1.0}
