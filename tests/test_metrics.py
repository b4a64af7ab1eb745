from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from metric_oracles import bootstrap_interval, summarize

from mrpo.metrics import (
    failure_accumulation_rate,
    failure_bin,
    failure_stage,
    first_failure_point,
)


def steps(letters: str) -> list[bool]:
    """One step a letter, "v" for valid and "x" for invalid."""
    return [letter == "v" for letter in letters]


@pytest.mark.parametrize(
    ("letters", "ffp", "far"),
    [
        ("", None, None),
        ("vvv", None, None),
        ("x", 1.0, None),
        ("vvx", 1.0, None),
        ("xvvv", 0.25, 0.0),
        ("vxxvx", 0.4, 2 / 3),
        ("xx", 0.5, 1.0),
    ],
)
def test_failure_of_one_completion(letters: str, ffp: float | None, far: float | None) -> None:
    assert first_failure_point(steps(letters)) == ffp
    assert failure_accumulation_rate(steps(letters)) == far


@given(f=st.integers(1, 60), extra=st.integers(0, 60))
def test_stages_and_bins_are_exact_at_their_ends(f: int, extra: int) -> None:
    k = f + extra
    assert failure_stage(f / k) == ["early", "mid", "late"][math.ceil(3 * f / k) - 1 if 3 * f % k else 3 * f // k - 1]
    assert failure_bin(f / k) == -(-5 * f // k) - 1


def test_summary_by_hand() -> None:
    letters = ["xvvv", "vxxvx", "vvx", "vvvv", "", "xxvvv"]
    summary = summarize([steps(each) for each in letters], [True, False, False, True, False, False])
    assert (summary.num_completions, summary.num_failures) == (6, 4)
    assert summary.stage_of_failures == {"early": 2 / 4, "mid": 1 / 4, "late": 1 / 4}
    assert summary.stage_of_all == {"early": 2 / 6, "mid": 1 / 6, "late": 1 / 6}
    assert summary.far == pytest.approx((0 + 2 / 3 + 1 / 4) / 3)
    assert summary.far_by_bin_correct == (None, 0.0, None, None, None)
    assert summary.far_by_bin_incorrect == (0.25, pytest.approx(2 / 3), None, None, None)
    assert summary.incorrect_by_bin == (1.0, 0.5, None, None, 1.0)
    assert summary.valid_steps == pytest.approx((3 / 4 + 2 / 5 + 2 / 3 + 1 + 3 / 5) / 5)


def test_summary_of_nothing() -> None:
    summary = summarize([], [])
    assert summary.num_failures == 0
    assert summary.far is None
    assert set(summary.stage_of_all.values()) == {None}


def test_summary_refuses_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="shorter"):
        summarize([[True]], [])


def test_interval_of_a_mean_matches_the_normal_approximation() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    low, high = bootstrap_interval(values, seed=0, level=0.9)
    half = 1.645 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_interval_is_deterministic_by_seed() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(np.arange(9.0), seed=3) != bootstrap_interval(np.arange(9.0), seed=4)


def test_samples_of_one_question_are_drawn_together() -> None:
    """Four equal samples a question must not narrow the interval."""
    values = np.random.default_rng(2).random(100)
    single = bootstrap_interval(values, seed=0)
    assert bootstrap_interval(np.repeat(values[:, None], 4, axis=1), seed=0) == pytest.approx(single)


def test_other_statistic() -> None:
    assert bootstrap_interval([1.0, 1.0, 1.0], seed=0, statistic=np.median) == (1.0, 1.0)
    low, high = bootstrap_interval([math.nan, *[2.0, 4.0] * 10], seed=0, statistic=np.nanmean)
    assert 2.0 <= low < high <= 4.0


@pytest.mark.parametrize(("values", "level"), [([], 0.95), ([1.0], 0.0), ([1.0], 1.0)])
def test_bad_interval_is_refused(values: list[float], level: float) -> None:
    with pytest.raises(ValueError, match=r"question|level"):
        bootstrap_interval(values, seed=0, level=level)
