from __future__ import annotations

import pytest

from mrpo.records import StepVerdict, Unjudged, Verdict
from mrpo.rewards import process_reward

VERDICT = Verdict(tuple(StepVerdict(*bits) for bits in [(True, False), (False, True), (True, True), (False, False)]))


def test_share_of_steps_with_either_bit() -> None:
    assert process_reward(VERDICT, 4) == 0.75


def test_unjudged_has_no_reward() -> None:
    assert process_reward(Unjudged("time-out"), 4) is None


def test_no_steps_need_no_judge() -> None:
    assert process_reward(Verdict(()), 0) == 0.0
    assert process_reward(Unjudged("time-out"), 0) == 0.0


def test_verdict_on_other_steps_is_an_error() -> None:
    with pytest.raises(ValueError, match="4 steps, the completion has 5"):
        process_reward(VERDICT, 5)
