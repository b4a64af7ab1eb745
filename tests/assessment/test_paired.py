from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from assessed_items import item
from hypothesis import given
from hypothesis import strategies as st

from mrpo.assessment import MetricTable, compare, mcnemar_exact, tabulate


def paired(first: MetricTable, second: MetricTable, resamples: int = 2000) -> dict[str, dict]:
    found = compare(first, second, first.draw(resamples), second.draw(resamples))
    return {test["metric"]: test for test in found}


def answers(right: str, dataset: str = "set") -> MetricTable:
    """A question a letter: 1 right, 0 wrong, ? not judged."""
    words = {"1": True, "0": False, "?": None}
    return tabulate([item(f"{i:03}", correct=words[letter], dataset=dataset) for i, letter in enumerate(right)], 1)


def test_a_model_against_itself() -> None:
    rng = np.random.default_rng(0)
    items = [
        item(f"{i}", "".join(rng.choice(["v", "x"], 5)), correct=bool(rng.random() < 0.4), lexical=float(rng.random()))
        for i in range(80)
    ]
    tests = paired(tabulate(items, 1), tabulate(items[::-1], 1))
    assert len(tests) > 10
    for test in tests.values():
        assert (test["difference"]["value"], test["difference"]["low"], test["difference"]["high"]) == (0.0, 0.0, 0.0)
        assert test["p"] == 1.0
    assert tests["accuracy"]["mcnemar"] == {"first_only": 0, "second_only": 0, "p": 1.0}


def test_by_hand() -> None:
    test = paired(answers("1100?01"), answers("0111111"))["accuracy"]
    assert test["difference"]["value"] == pytest.approx(6 / 7 - 3 / 6)
    assert test["difference"]["n"] == 6
    # Of the six questions judged for both, one is right only for the first and three only for the second.
    assert test["mcnemar"] == {"first_only": 1, "second_only": 3, "p": pytest.approx(2 * (1 + 4) / 16)}


def test_the_sign_is_second_minus_first_and_a_sure_gain_is_significant() -> None:
    first, second = answers("0" * 30 + "1" * 30), answers("0" * 15 + "1" * 45)
    gain, loss = paired(first, second)["accuracy"], paired(second, first)["accuracy"]
    assert gain["difference"]["value"] == pytest.approx(0.25)
    assert 0.1 < gain["difference"]["low"] < gain["difference"]["high"] < 0.4
    assert gain["p"] == pytest.approx(2 / 2001)  # no resample without a gain
    assert loss["difference"]["value"] == pytest.approx(-0.25)
    assert loss["p"] == gain["p"]


def test_the_p_value_agrees_with_the_normal_one() -> None:
    rng = np.random.default_rng(3)
    gains = rng.normal(0.02, 0.2, size=400)
    first = tabulate([item(f"{i:03}", lexical=0.5) for i in range(400)], 1)
    second = tabulate([item(f"{i:03}", lexical=0.5 + gain) for i, gain in enumerate(gains)], 1)
    test = paired(first, second, 10_000)["lexical"]
    z = gains.mean() / (gains.std() / math.sqrt(400))
    assert test["difference"]["value"] == pytest.approx(gains.mean())
    assert test["p"] == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=0.02)


def test_pairing_takes_out_what_questions_have_in_common() -> None:
    rng = np.random.default_rng(4)
    easiness = rng.normal(0, 10, size=60)
    first = tabulate([item(f"{i:03}", lexical=e) for i, e in enumerate(easiness)], 1)
    second = tabulate([item(f"{i:03}", lexical=e + 0.5) for i, e in enumerate(easiness)], 1)
    difference = paired(first, second)["lexical"]["difference"]
    assert (difference["low"], difference["high"]) == pytest.approx((0.5, 0.5))


def test_what_one_model_lacks_is_undefined() -> None:
    failing = tabulate([item(str(i), "xxx") for i in range(9)], 1)
    flawless = tabulate([item(str(i), "vvv", correct=None) for i in range(9)], 1)
    tests = paired(failing, flawless)
    for key in ("far", "ffp", "early_of_failures", "accuracy"):
        assert tests[key]["difference"] == {"value": None, "low": None, "high": None, "n": 0}
        assert tests[key]["p"] is None
        assert tests[key]["mcnemar"] is None
    assert tests["early_of_all"]["difference"]["value"] == -1.0


def test_metrics_that_one_model_lacks_are_not_tested() -> None:
    twice = tabulate([item(id, correct=True, sample=k) for id in "ab" for k in range(2)], 2)
    once = tabulate([item(id, correct=True) for id in "ab"], 1)
    assert "mean@2" not in paired(twice, once)
    assert "mean@2" in paired(twice, twice)


def test_other_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="same questions"):
        paired(answers("101"), answers("10"))
    with pytest.raises(ValueError, match="same questions"):
        paired(answers("101"), answers("101", dataset="other"))


@given(first_only=st.integers(0, 300), second_only=st.integers(0, 300))
def test_mcnemar_is_the_binomial_test(first_only: int, second_only: int) -> None:
    # The chance that fair coins fall at least as unevenly as these did.
    total = first_only + second_only
    ways = sum(math.comb(total, i) for i in range(total + 1) if abs(2 * i - total) >= abs(first_only - second_only))
    assert mcnemar_exact(first_only, second_only) == pytest.approx(float(Fraction(ways, 2**total)))


def test_mcnemar_of_many_questions() -> None:
    p = mcnemar_exact(3000, 3300)
    z = (300 - 1) / math.sqrt(6300)  # with the correction for continuity
    assert p == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
