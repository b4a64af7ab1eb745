from __future__ import annotations

import math

import numpy as np
import pytest
from metric_oracles import bootstrap_interval

from mrpo.estimates import (
    Estimate,
    estimate_mean,
    estimate_share,
    mean,
    resampled_means,
    summarize_draws,
    two_sided_p,
)


def test_the_fast_bootstrap_is_the_plain_one() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 3, size=37).astype(float)
    sums = rng.random(37) * counts
    estimate = estimate_mean(sums, counts, seed=5, level=0.9, resamples=300)
    expected = bootstrap_interval(
        np.stack([sums, counts], axis=1),
        seed=5,
        level=0.9,
        statistic=lambda drawn: drawn[:, 0].sum() / drawn[:, 1].sum(),
        resamples=300,
    )
    assert (estimate.low, estimate.high) == pytest.approx(expected)
    assert estimate.value == pytest.approx(sums.sum() / counts.sum())


def test_many_columns_are_drawn_alike() -> None:
    rng = np.random.default_rng(1)
    sums, counts = rng.random((20, 4)), np.ones((20, 4))
    together = resampled_means(sums, counts, seed=2, resamples=50)
    assert together.shape == (50, 4)
    for column in range(4):
        alone = resampled_means(sums[:, column], counts[:, column], seed=2, resamples=50)
        np.testing.assert_allclose(together[:, column], alone)


def test_draws_do_not_depend_on_how_many_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, counts = np.random.default_rng(3).random((11, 2)), np.ones((11, 2))
    at_once = resampled_means(sums, counts, seed=0, resamples=30)
    monkeypatch.setattr("mrpo.estimates._WEIGHTS_AT_ONCE", 40)
    np.testing.assert_allclose(resampled_means(sums, counts, seed=0, resamples=30), at_once)


def test_what_nothing_defines_is_undefined() -> None:
    sums, counts = np.array([[0.0, 2.0], [0.0, 0.0]]), np.array([[0.0, 1.0], [0.0, 0.0]])
    np.testing.assert_equal(mean(sums, counts), [math.nan, 2.0])
    drawn = resampled_means(sums, counts, seed=0, resamples=40)
    assert np.isnan(drawn[:, 0]).all()
    assert set(np.unique(drawn[~np.isnan(drawn[:, 1]), 1])) == {2.0}
    assert estimate_mean(sums[:, 0], counts[:, 0], seed=0, level=0.95, resamples=9).value is None


def test_a_figure_that_no_resample_defines_has_no_interval() -> None:
    assert summarize_draws(np.array(0.5), np.full(9, np.nan), 0.95) == Estimate(0.5, None, None)
    # One of a thousand questions defines it; the only resample misses that one.
    sums, counts = np.eye(1000)[0], np.eye(1000)[0]
    assert estimate_mean(sums, counts, seed=1, level=0.95, resamples=1) == Estimate(1.0, None, None)


def test_exact_ends_hold_the_level_for_the_worst_quantity() -> None:
    # 10 of 12 questions define it, in 3 completions each; all are 0. Were the mean above the upper end, a quantity that
    # is 0 or 1 by question, which is the likeliest to be 0 everywhere, would be so in at most 2.5 % of samples.
    counts = np.array([3.0] * 10 + [0.0] * 2)
    none = estimate_share(np.zeros(12), counts, seed=0, level=0.95, resamples=20)
    assert none.high is not None
    assert (none.value, none.low, (1 - none.high) ** 10) == (0.0, 0.0, pytest.approx(0.025))
    every = estimate_share(counts, counts, seed=0, level=0.95, resamples=20)
    assert (every.value, every.low, every.high) == (1.0, pytest.approx(1 - none.high), 1.0)
    some = counts * 0.5
    how = {"seed": 0, "level": 0.95, "resamples": 20}
    assert estimate_share(some, counts, **how) == estimate_mean(some, counts, **how) == Estimate(0.5, 0.5, 0.5)
    assert estimate_share(some[10:], counts[10:], **how) == Estimate(None, None, None)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1.0] * 99, 2 / 100),
        ([-1.0] * 99, 2 / 100),
        ([1.0] * 90 + [-1.0] * 9, 20 / 100),
        ([0.0] * 99, 1.0),
        ([1e-16] * 99, 1.0),
        ([math.nan] * 50 + [1.0] * 49, 2 / 50),
        ([math.nan] * 3, None),
    ],
)
def test_p_value(differences: list[float], p: float | None) -> None:
    assert two_sided_p(np.array(differences)) == (None if p is None else pytest.approx(p))
