from __future__ import annotations

import pytest

from mrpo.rewards import length_reward


@pytest.mark.parametrize(
    ("num_steps", "expected"), [(0, -1.0), (1, -0.75), (3, -0.25), (4, 0.0), (10, 0.0), (11, -0.1), (25, -1.5)]
)
def test_length_reward(num_steps: int, expected: float) -> None:
    assert length_reward(num_steps, 4, 10) == pytest.approx(expected)
