from __future__ import annotations

import math
from statistics import fmean, stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mrpo.algorithms import advantages, fill_unjudged, gdpo_advantages, group_advantages, telescoped_credits
from mrpo.config import AdvantageConfig, Config, RewardConfig

NAN = float("nan")


def tensor(rows: object) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def standardized(rewards: list[float]) -> list[float]:
    """(R - mean) / (std + 1e-4) by the statistics module, whose stdev has Bessel's correction."""
    return [(reward - fmean(rewards)) / (stdev(rewards) + 1e-4) for reward in rewards]


groups = st.integers(2, 6).flatmap(
    lambda size: st.lists(st.lists(st.floats(-2, 2), min_size=size, max_size=size), min_size=1, max_size=4)
)


def test_group_advantages_by_hand() -> None:
    rewards = tensor([[1.0, 0.0, 0.0, 1.0]])
    std = math.sqrt(1 / 3)
    expected = tensor([[0.5, -0.5, -0.5, 0.5]])
    torch.testing.assert_close(group_advantages(rewards, normalize="group_std"), expected / (std + 1e-4))
    torch.testing.assert_close(group_advantages(rewards, normalize="group_mean"), expected)


@given(rows=groups)
def test_group_advantages_against_the_formula(rows: list[list[float]]) -> None:
    expected = tensor([standardized(row) for row in rows])
    actual = group_advantages(tensor(rows), normalize="group_std")
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


@given(rows=groups)
def test_gdpo_against_the_formula(rows: list[list[float]]) -> None:
    parts = [rows, [[math.sin(7 * value) for value in row] for row in rows]]
    weights = [1.0, 0.5]
    summed = [
        [sum(w * score for w, score in zip(weights, scores, strict=True)) for scores in zip(*group, strict=True)]
        for group in zip(*([standardized(row) for row in part] for part in parts), strict=True)
    ]
    flat = standardized([score for row in summed for score in row])
    actual = gdpo_advantages(tensor(parts), tensor(weights))
    torch.testing.assert_close(actual.flatten(), tensor(flat), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e6])
def test_equal_rewards_give_exact_zeros(value: float, dtype: torch.dtype) -> None:
    rewards = torch.full((3, 7), value, dtype=dtype)
    zeros = torch.zeros_like(rewards)
    assert torch.equal(group_advantages(rewards, normalize="group_std"), zeros)
    assert torch.equal(group_advantages(rewards, normalize="group_mean"), zeros)
    assert torch.equal(gdpo_advantages(rewards.expand(3, 3, 7), torch.ones(3)), zeros)
    process = rewards.clone()
    process[:, 2] = NAN
    assert torch.equal(fill_unjudged(process), rewards)


def test_fill_unjudged_takes_the_mean_of_the_judged() -> None:
    process = tensor([[0.2, NAN, 0.6], [NAN, NAN, 0.5], [NAN, NAN, NAN]])
    torch.testing.assert_close(fill_unjudged(process), tensor([[0.2, 0.4, 0.6], [0.5, 0.5, 0.5], [0.0, 0.0, 0.0]]))


def config(algorithm: str, **advantage: object) -> Config:
    reward = RewardConfig(answer_weight=2.0, process_weight=0.5, length_weight=1.0)
    return Config(algorithm=algorithm, reward=reward, advantage=AdvantageConfig(**advantage))


def test_mrpo_and_grpo_compare_the_weighted_sum() -> None:
    answer, process, length = tensor([[1.0, 0.3, 0.0]]), tensor([[0.5, 1.0, 0.0]]), tensor([[0.0, -0.25, -1.0]])
    expected = tensor([standardized([2.25, 0.6 + 0.5 - 0.25, -1.0])])
    for algorithm in ("mrpo", "grpo"):
        torch.testing.assert_close(advantages(config(algorithm), answer, process, length), expected)
    centered = advantages(config("mrpo", normalize="group_mean"), answer, process, length)
    torch.testing.assert_close(centered, tensor([[2.25 - 0.7, 0.85 - 0.7, -1.7]]))


def test_gdpo_is_chosen_with_the_weights() -> None:
    answer, process, length = tensor([[1.0, 0.3, 0.0]]), tensor([[0.5, 1.0, 0.0]]), tensor([[0.0, -0.25, -1.0]])
    scores = [standardized(part[0].tolist()) for part in (answer, process, length)]
    expected = standardized([2 * a + 0.5 * p + q for a, p, q in zip(*scores, strict=True)])
    torch.testing.assert_close(advantages(config("gdpo"), answer, process, length), tensor([expected]))


@pytest.mark.parametrize("algorithm", ["mrpo", "grpo", "gdpo"])
@given(rows=groups, data=st.data())
def test_unjudged_never_gives_nan(algorithm: str, rows: list[list[float]], data: st.DataObject) -> None:
    rewards = tensor(rows)
    unjudged = data.draw(st.lists(st.booleans(), min_size=rewards.numel(), max_size=rewards.numel()))
    process = rewards.sin().masked_fill(torch.tensor(unjudged).view_as(rewards), NAN)
    assert advantages(config(algorithm), rewards, process, -rewards.abs()).isfinite().all()


@pytest.mark.parametrize("algorithm", ["mrpo", "grpo"])
def test_unjudged_is_like_a_process_reward_at_the_mean(algorithm: str) -> None:
    answer, length = tensor([[1.0, 0.0, 0.4, 0.0]]), tensor([[0.0, 0.0, -0.5, 0.0]])
    unjudged = advantages(config(algorithm), answer, tensor([[0.25, 0.75, NAN, 0.5]]), length)
    at_the_mean = advantages(config(algorithm), answer, tensor([[0.25, 0.75, 0.5, 0.5]]), length)
    torch.testing.assert_close(unjudged, at_the_mean)


def test_unjudged_leaves_the_others_their_distance_from_the_mean() -> None:
    """All-invalid in place of unjudged would have raised the others, and a full mark would have lowered them."""
    nothing = tensor([[0.0, 0.0, 0.0, 0.0]])
    judged = tensor([[0.25, 0.75, 0.5]])
    actual = advantages(config("mrpo", normalize="group_mean"), nothing, tensor([[0.25, 0.75, 0.5, NAN]]), nothing)
    torch.testing.assert_close(actual[:, :3], 0.5 * group_advantages(judged, normalize="group_mean"))
    assert actual[0, 3] == 0.0


def test_gdpo_scores_the_judged_as_if_the_unjudged_were_absent() -> None:
    process = tensor([[0.0, 1.0, 0.25, NAN], [0.0, 1.0, 0.25, NAN]])
    actual = gdpo_advantages(process[None], tensor([1.0]))
    scores = [*standardized([0.0, 1.0, 0.25]), 0.0]
    torch.testing.assert_close(actual.flatten(), tensor(standardized(scores * 2)))


def test_telescoped_credits_by_hand() -> None:
    """All four start alike; two fail at the first step, and one of the others at the second."""
    histories = [(True, True), (True, False), (False, True), (False, False)]
    # Values: () 0, (T) 1, (F) -1, (T, T) 1.5, (T, F) 0.5, (F, T) -1.5, (F, F) -0.5.
    expected = [[1.0, 0.5, 0.0], [1.0, -0.5, 0.0], [-1.0, -0.5, 0.0], [-1.0, 0.5, 0.0]]
    assert telescoped_credits([1.5, 0.5, -1.5, -0.5], histories) == expected


def test_steps_that_set_no_completion_apart_earn_nothing() -> None:
    assert telescoped_credits([1.0, -1.0], [(False, True)] * 2) == [[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]


def test_a_chain_that_ends_earlier_shares_the_history_of_the_longer_one() -> None:
    # Values: () 0, (T) 0, (T, F) -1: the end of the first earns what the second step of the other loses.
    assert telescoped_credits([1.0, -1.0], [(True,), (True, False)]) == [[0.0, 1.0], [0.0, -1.0, 0.0]]


def test_unjudged_completions_keep_their_advantage_and_change_no_value() -> None:
    judged = telescoped_credits([1.0, -1.0], [(True,), (False,)])
    assert telescoped_credits([1.0, 5.0, -1.0], [(True,), None, (False,)]) == [judged[0], [5.0], judged[1]]


chains = st.lists(st.tuples(st.floats(-3, 3), st.lists(st.booleans(), max_size=5)), min_size=2, max_size=8)


@given(group=chains)
def test_telescoped_credits_add_up_and_average_to_zero_where_completions_part(group: list) -> None:
    own, histories = [a for a, _ in group], [tuple(h) for _, h in group]
    credits = telescoped_credits(own, histories)
    for advantage, found in zip(own, credits, strict=True):
        assert sum(found) == pytest.approx(advantage - fmean(own), abs=1e-9)
    for history in {h[:k] for h in histories for k in range(len(h) + 1)}:
        members = [i for i, h in enumerate(histories) if h[: len(history)] == history]
        assert sum(credits[i][len(history)] for i in members) == pytest.approx(0.0, abs=1e-9)


def test_an_algorithm_that_compares_no_completions_is_refused() -> None:
    rewards = tensor([[1.0, 0.0]])
    for algorithm in ("sft", "new"):
        config = Config().model_copy(update={"algorithm": algorithm})
        with pytest.raises(ValueError, match=algorithm):
            advantages(config, rewards, rewards, rewards)
