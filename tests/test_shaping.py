"""From the advantage of a completion to those of its tokens."""

from __future__ import annotations

import math

import pytest
import torch
from scored_items import scored

from mrpo.config import Config
from mrpo.shaping import token_advantages


def test_mrpo_shapes_wrong_answers_by_their_steps_and_nothing_else() -> None:
    items = [scored([False, True, False], answer=0.6), scored([False], answer=0.61), scored(None)]
    shaped = token_advantages(Config(algorithm="mrpo"), items, torch.tensor([-0.5, 2.0, 3.0]))
    first = [-0.5] + 2 * [-0.5 * math.e] + 2 * [0.5] + 2 * [-0.5] + 3 * [-0.5]
    assert shaped[0].tolist() == pytest.approx(first)
    assert shaped[1].tolist() == [2.0] * 10
    assert shaped[2].tolist() == [3.0] * 10


@pytest.mark.parametrize("algorithm", ["grpo", "gdpo"])
def test_baselines_give_every_token_its_group_advantage(algorithm: str) -> None:
    config = Config.model_validate({"algorithm": algorithm})
    (shaped,) = token_advantages(config, [scored([False, True])], torch.tensor([-0.5]))
    assert shaped.tolist() == [-0.5] * 10


def test_completions_of_different_lengths_keep_their_own() -> None:
    items = [scored([True, False], tokens=5), scored([True], tokens=9)]
    shaped = token_advantages(Config(algorithm="mrpo"), items, torch.tensor([-1.0, -2.0]))
    assert [row.tolist() for row in shaped] == [[-1, 1, 1, -1, -1], [-2, 2, 2, *[-2] * 6]]


def test_telescoped_credit_reaches_the_tokens_of_its_step_group_by_group() -> None:
    config = Config.model_validate({"advantage": {"credit": "telescoped"}, "rollout": {"group_size": 2}})
    items = [scored([True, True]), scored([True, False]), scored([False]), scored(None)]
    shaped = token_advantages(config, items, torch.tensor([1.0, -1.0, -2.0, 2.0]))
    # First group: values () 0, (T) 0, (T, T) 1, (T, F) -1. Of the second only one is judged: its value is its own.
    assert shaped[0].tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    assert shaped[1].tolist() == [0, 0, 0, -1, -1, 0, 0, 0, 0, 0]
    assert shaped[2].tolist() == [0.0] * 10
    assert shaped[3].tolist() == [2.0] * 10
