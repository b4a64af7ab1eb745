from __future__ import annotations

import numpy as np
import pytest
from assessed_items import item
from metric_oracles import summarize

from mrpo.assessment import METRICS, tabulate

# First failure points: 1/4 early, bin 2, rate 1/3; 2/3 mid, bin 4, rate 1; 1 late, bin 5, no rate; none; no steps;
# not judged.
ITEMS = [
    item("a", "xvvx", correct=True, exact=True, lexical=1.0, tokens=20),
    item("b", "vxx", correct=False, lexical=0.4),
    item("c", "vvx", correct=False, lexical=0.1, finish="length", well_formed=False),
    item("d", "vv", correct=True, lexical=0.5),
    item("e", "", correct=False),
    item("f", None, correct=None, lexical=1.0),
]


def values(items: list, samples: int = 1) -> dict[str, float | None]:
    table = tabulate(items, samples)
    return {key: figure["value"] for key, figure in table.summarize(table.draw(10)).items()}


def test_against_hand_computed() -> None:
    found = values(ITEMS)
    expected = {
        "accuracy": 2 / 5,
        "exact": 1 / 6,
        "lexical": 3.0 / 6,
        "early_of_failures": 1 / 3,
        "mid_of_failures": 1 / 3,
        "late_of_failures": 1 / 3,
        "early_of_all": 1 / 5,
        "mid_of_all": 1 / 5,
        "late_of_all": 1 / 5,
        "failed": 3 / 5,
        "ffp": (1 / 4 + 2 / 3 + 1) / 3,
        "far": (1 / 3 + 1) / 2,
        "far_correct_bin1": None,
        "far_correct_bin2": 1 / 3,
        "far_correct_bin4": None,
        "far_incorrect_bin2": None,
        "far_incorrect_bin4": 1.0,
        "far_incorrect_bin5": None,
        "incorrect_bin1": None,
        "incorrect_bin2": 0.0,
        "incorrect_bin4": 1.0,
        "incorrect_bin5": 1.0,
        "valid_steps": (2 / 4 + 1 / 3 + 2 / 3 + 1) / 4,
        "fully_valid": 1 / 5,
        "num_steps": (4 + 3 + 3 + 2 + 0 + 3) / 6,
        "num_tokens": 70 / 6,
        "truncated": 1 / 6,
        "format": 5 / 6,
        "unjudged_steps": 1 / 6,
        "unjudged_answers": 1 / 6,
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert set(found) == {metric.key for metric in METRICS}
    assert len(METRICS) == 15 + len(expected) - 10  # expected holds 10 of the 15 figures over bins


def test_agrees_with_the_summary_of_training() -> None:
    judged = [each for each in ITEMS if each.validity is not None]
    summary = summarize([each.validity or () for each in judged], [each.correct is True for each in judged])
    found = values(judged)
    assert found["far"] == pytest.approx(summary.far)
    assert found["valid_steps"] == pytest.approx(summary.valid_steps)
    for stage in ("early", "mid", "late"):
        assert found[f"{stage}_of_all"] == pytest.approx(summary.stage_of_all[stage])
        assert found[f"{stage}_of_failures"] == pytest.approx(summary.stage_of_failures[stage])
    for bin in range(5):
        assert found[f"far_correct_bin{bin + 1}"] == pytest.approx(summary.far_by_bin_correct[bin])
        assert found[f"far_incorrect_bin{bin + 1}"] == pytest.approx(summary.far_by_bin_incorrect[bin])
        assert found[f"incorrect_bin{bin + 1}"] == pytest.approx(summary.incorrect_by_bin[bin])


def test_numbers_of_completions() -> None:
    table = tabulate(ITEMS, 1)
    numbers = {key: figure["n"] for key, figure in table.summarize(table.draw(10)).items()}
    wanted = {"accuracy": 5, "exact": 6, "early_of_failures": 3, "early_of_all": 5, "far": 2, "far_correct_bin1": 0}
    assert {key: numbers[key] for key in wanted} == wanted


def test_the_average_weighs_items_and_not_data_sets() -> None:
    large = [item(str(i), dataset="large", correct=i < 2) for i in range(8)]
    small = [item(str(i), dataset="small", correct=True) for i in range(2)]
    table = tabulate([*large, *small], 1)
    figures = {
        name: part.summarize(part.draw(50))["accuracy"]["value"]
        for name, part in (("large", table.of("large")), ("small", table.of("small")), ("average", table))
    }
    assert figures == pytest.approx({"large": 0.25, "small": 1.0, "average": 4 / 10})


def test_accuracy_is_of_the_first_completion_and_reasoning_of_all() -> None:
    items = [
        item("a", "xv", correct=False, sample=0),
        item("a", "vv", correct=True, sample=1),
        item("b", "vv", correct=True, sample=0),
        item("b", "vv", correct=True, sample=1),
        item("c", "vv", correct=False, sample=0),
        item("c", "vv", correct=False, sample=1),
        item("d", "vv", correct=None, sample=0),
        item("d", "vv", correct=False, sample=1),
    ]
    found = values(items, samples=2)
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["mean@2"] == pytest.approx(3 / 7)
    assert found["pass@2"] == pytest.approx(2 / 3)  # of d nobody knows
    assert found["failed"] == pytest.approx(1 / 8)
    assert "mean@2" not in values(items[::2])


def test_questions_are_resampled_and_not_completions() -> None:
    rng = np.random.default_rng(0)
    single = [item(f"q{i:02}", "v" * int(v) + "x" * (4 - int(v))) for i, v in enumerate(rng.integers(0, 5, 30))]
    copies = [
        item(each.example.id, "".join("xv"[v] for v in each.validity or ()), sample=k)
        for each in single
        for k in range(4)
    ]
    one, four = tabulate(single, 1), tabulate(copies, 4)
    expected, found = one.summarize(one.draw(200))["valid_steps"], four.summarize(four.draw(200))["valid_steps"]
    assert [found[end] for end in ("value", "low", "high")] == pytest.approx(
        [expected[end] for end in ("value", "low", "high")]
    )
    assert expected["low"] < expected["value"] < expected["high"]


def test_the_order_of_completions_does_not_matter() -> None:
    forward, backward = tabulate(ITEMS, 1), tabulate(ITEMS[::-1], 1)
    assert forward.summarize(forward.draw(50)) == backward.summarize(backward.draw(50))
