"""The loss inputs that are known before the verdicts."""

from __future__ import annotations

import pytest
import torch
from scored_items import alone

from mrpo.config import Config
from mrpo.sampling import token_weights


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        ("sequence", [1 / (2 * 2), 1 / (4 * 2), 0.0]),
        ("token", [1 / 6, 1 / 6, 0.0]),
        ("constant", [1 / (3 * 8), 1 / (3 * 8), 0.0]),
    ],
)
def test_token_weights(normalization: str, expected: list[float]) -> None:
    config = Config.model_validate({"loss": {"normalization": normalization}, "rollout": {"max_tokens": 8}})
    weights = token_weights(config, alone(), [2, 4, 8], [True, True, False])
    assert [len(w) for w in weights] == [2, 4, 8]
    for row, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(row, torch.full_like(row, value))


def test_weights_of_a_batch_without_kept_completions_are_zero() -> None:
    weights = token_weights(Config(), alone(), [3], [False])
    assert weights[0].tolist() == [0.0] * 3
