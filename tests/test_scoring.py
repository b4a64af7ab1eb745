"""From completions to the table of numbers."""

from __future__ import annotations

import math

import pytest
from scored_items import scored

from mrpo.config import Config
from mrpo.scoring import COLUMNS, columns, mean_reward, score_table, total_reward


def test_a_row_of_the_table() -> None:
    table = score_table([scored([True, False, False, True], answer=0.7, tokens=12)], tau=0.6)
    row = {name: values.item() for name, values in columns(table).items()}
    expected = {
        "answer": 0.7,
        "process": 0.5,
        "length": -0.25,
        "correct": 1.0,
        "num_steps": 4,
        "valid_steps": 0.5,
        "fully_valid": 0,
        "early": 0,  # first failure at 2 of 4
        "mid": 1,
        "late": 0,
        "far": 0.5,  # of the two steps after it, one is invalid
        "tokens": 12,
        "truncated": 0,
        "unjudged": 0,
        "rouge1": 0.5,
    }
    assert {name: row[name] for name in expected} == expected
    assert all(math.isnan(row[name]) for name in set(COLUMNS) - set(expected))


def test_an_unjudged_row_is_undefined_and_counted() -> None:
    table = columns(score_table([scored(None, finish="length")], tau=0.6))
    assert table["unjudged"].item() == table["truncated"].item() == 1
    for name in ("process", "valid_steps", "early", "mid", "late", "far", "fully_valid"):
        assert math.isnan(table[name].item()), name


WEIGHTED = Config.model_validate(
    {
        "reward": {"answer_weight": 2.0, "process_weight": 3.0, "length_weight": 4.0},
        "rollout": {"group_size": 2},
        "optim": {"batch_size": 2},
    }
)


def test_the_total_is_the_weighted_sum_where_an_unjudged_completion_has_its_groups_process_reward() -> None:
    groups = [[True, False], [True, True]], [[True, False], None], [None, None]
    table = columns(score_table([scored(validity, answer=1.0) for group in groups for validity in group], tau=0.6))
    assert total_reward(table, WEIGHTED).tolist() == [2 + p - 1 for p in (1.5, 3, 1.5, 1.5, 0, 0)]


def test_the_mean_reward_is_the_sum_of_the_logged_parts() -> None:
    """However many stay unjudged: a missing process reward is not one of 0."""
    items = [scored([True, False], answer=1.0), scored(None, answer=0.5), scored(None, answer=0.0)]
    table = columns(score_table(items, tau=0.6))
    assert mean_reward(table, WEIGHTED) == pytest.approx(2 * 0.5 + 3 * 0.5 - 4 * 0.25)
    nobody = columns(score_table([scored(None), scored(None)], tau=0.6))
    assert mean_reward(nobody, WEIGHTED) == pytest.approx(-4 * 0.25)
