"""From completions to the table of numbers, and from the table to token advantages and weights."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch

from mrpo.config import Config
from mrpo.errors import UserError
from mrpo.records import Completion, Rewards, ScoredCompletion, Step, StepVerdict, Unjudged, Verdict
from mrpo.runtime import Runtime
from mrpo.scoring import COLUMNS, columns, score_table, total_reward
from mrpo.trainer import Trainer


def scored(
    validity: list[bool] | None, *, answer: float = 0.0, tokens: int = 10, finish: Any = "stop"
) -> ScoredCompletion:
    """A completion whose step k holds tokens [1 + 2k, 3 + 2k)."""
    count = 2 if validity is None else len(validity)
    return ScoredCompletion(
        completion=Completion(tuple(range(tokens)), "text", finish),
        answer="a",
        steps=tuple(Step(f"s{k}", 1 + 2 * k, 3 + 2 * k) for k in range(count)),
        verdict=Unjudged("no") if validity is None else Verdict(tuple(StepVerdict(v, False) for v in validity)),
        rewards=Rewards(answer, None if validity is None else sum(validity) / len(validity), -0.25, {"rouge1": 0.5}),
    )


class OneProcess(Runtime):
    """Collectives of a process that is alone, without a process group."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values.clone()


def trainer(**sections: Any) -> Trainer:
    config = Config.model_validate(sections)
    unused = cast(Any, None)
    return Trainer(
        config, OneProcess(0, 1, torch.device("cpu")), unused, unused, unused, unused, unused, unused, total_steps=1
    )


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


def test_the_total_is_the_weighted_sum() -> None:
    table = columns(score_table([scored([True, False], answer=1.0), scored(None, answer=0.5)], tau=0.6))
    config = Config.model_validate({"reward": {"answer_weight": 2.0, "process_weight": 3.0, "length_weight": 4.0}})
    assert total_reward(table, config).tolist() == [2 + 1.5 - 1, 1 + 0 - 1]


def test_mrpo_shapes_wrong_answers_by_their_steps_and_nothing_else() -> None:
    items = [scored([False, True, False], answer=0.6), scored([False], answer=0.61), scored(None)]
    shaped = trainer(algorithm="mrpo")._shape(items, torch.tensor([-0.5, 2.0, 3.0]))
    first = [-0.5] + 2 * [-0.5 * math.e] + 2 * [0.5] + 2 * [-0.5] + 3 * [-0.5]
    assert shaped[0].tolist() == pytest.approx(first)
    assert shaped[1].tolist() == [2.0] * 10
    assert shaped[2].tolist() == [3.0] * 10


@pytest.mark.parametrize("algorithm", ["grpo", "gdpo"])
def test_baselines_give_every_token_its_group_advantage(algorithm: str) -> None:
    shaped = trainer(algorithm=algorithm)._shape([scored([False, True])], torch.tensor([-0.5]))
    assert shaped.tolist() == [[-0.5] * 10]


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        ("sequence", [1 / (2 * 2), 1 / (4 * 2), 0.0]),
        ("token", [1 / 6, 1 / 6, 0.0]),
        ("constant", [1 / (3 * 8), 1 / (3 * 8), 0.0]),
    ],
)
def test_token_weights(normalization: str, expected: list[float]) -> None:
    made = trainer(loss={"normalization": normalization}, rollout={"max_tokens": 8})
    weights = made._token_weights([2, 4, 8], [True, True, False])
    assert [len(w) for w in weights] == [2, 4, 8]
    for row, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(row, torch.full_like(row, value))


def test_weights_of_a_batch_without_kept_completions_are_zero() -> None:
    weights = trainer()._token_weights([3], [False])
    assert weights[0].tolist() == [0.0] * 3


def test_too_many_unjudged_stop_the_run_with_the_judges_reason() -> None:
    made = trainer(judge={"max_unjudged": 0.4})
    items = [scored([True]), scored(None)]
    unjudged = columns(score_table(items, tau=0.6))["unjudged"]
    with pytest.raises(UserError, match=r"50% .* judge\.max_unjudged=40%: no$"):
        made._check_judged(unjudged, items)
    trainer(judge={"max_unjudged": 0.5})._check_judged(unjudged, items)
