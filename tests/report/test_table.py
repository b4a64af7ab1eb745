from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from mrpo.estimates import estimate_difference, estimate_mean
from mrpo.records import EvaluatedSample
from mrpo.report.table import before_after_table

T, F = True, False
KEYS = ["accuracy", "early_of_all", "early_of_failures", "far", "reward", "fully_valid"]


def sample(question: str, validity, *, correct=False, reward=0.0, greedy=True) -> EvaluatedSample:
    return EvaluatedSample(question, correct, None if validity is None else tuple(validity), reward, greedy)


# Six questions. First failure points: 1/3 (early, its end), 2/4 (mid), 3/3 (late, no rate), none, no steps, unjudged.
BEFORE = [
    sample("a", (F, T, F), correct=True, reward=1.0),
    sample("b", (T, F, T, F), reward=0.5),
    sample("c", (T, T, F), reward=2.5),
    sample("d", (T, T), correct=True, reward=3.0),
    sample("e", (), reward=-1.0),
    sample("f", None, correct=True, reward=100.0),
    sample("a", (F, F, F, F), greedy=False, reward=50.0),
]
AFTER = [sample(q, (T, T, T, T), correct=q != "b", reward=3.0) for q in "fedcba"]


def test_values_against_hand_computed():
    table = before_after_table(BEFORE, AFTER, resamples=50)
    assert [row.key for row in table.rows] == KEYS
    before = {row.key: row.before.value for row in table.rows}
    assert before == pytest.approx(
        {
            "accuracy": 3 / 6,
            "early_of_all": 1 / 5,
            "early_of_failures": 1 / 3,
            "far": (1 / 2 + 1 / 2 + 1) / 3,  # a, b and the sampled completion of a
            "reward": (1.0 + 0.5 + 2.5 + 3.0 - 1.0) / 5,
            "fully_valid": 1 / 5,
        }
    )
    after = {row.key: row.after.value for row in table.rows}
    assert after == dict(zip(KEYS, [5 / 6, 0.0, None, None, 3.0, 1.0], strict=True))
    difference = {row.key: row.difference.value for row in table.rows}
    assert difference["accuracy"] == pytest.approx(2 / 6)
    assert difference["early_of_failures"] is None
    assert difference["far"] is None


def test_json_and_markdown_files(tmp_path):
    table = before_after_table(BEFORE, AFTER, level=0.9, resamples=50)
    table.write(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == ["num_questions", "num_judged", "level", *KEYS]
    assert summary["num_judged"] == {"before": 5, "after": 6, "both": 5}
    assert (summary["num_questions"], summary["level"]) == (6, 0.9)
    assert summary["far"]["after"] == summary["far"]["difference"] == {"value": None, "low": None, "high": None}
    assert set(summary["accuracy"]) == {"before", "after", "difference"}
    rows = (tmp_path / "summary.md").read_text().splitlines()
    assert all(row.count("|") == 6 for row in rows[: 2 + len(KEYS)])
    assert rows[2].startswith("| answer accuracy | all | 50.0 % [")
    assert "| +33.3 points [" in rows[2]
    assert rows[5].endswith("| – | – |")  # noqa: RUF001
    assert rows[-1] == (
        "6 held-out questions, of which 5 were judged before, 6 after and 5 both times; differences of judged figures "
        "are over these 5; 90 % bootstrap intervals over questions, exact ones where all agree."
    )


def test_differences_are_over_the_questions_that_were_judged_both_times():
    """The judge leaves out the two hard questions before, and an easy one after: what it told of both is the same."""
    right, wrong = {"validity": (T, T), "reward": 2.0, "correct": T}, {"validity": (F, T, T), "reward": 0.0}
    unjudged = {"validity": None, "reward": 1.0}
    kinds = [(unjudged, wrong)] * 2 + [(wrong, wrong)] + [(right, right)] * 2 + [(right, unjudged)]
    before = [sample(f"q{i}", **kind) for i, (kind, _) in enumerate(kinds)]
    after = [sample(f"q{i}", **kind) for i, (_, kind) in enumerate(kinds)]
    table = before_after_table(before, after, resamples=50)
    assert {row.key: row.difference.value for row in table.rows} == {
        "accuracy": pytest.approx(-1 / 6),
        "early_of_all": 0.0,
        "early_of_failures": 0.0,
        "far": 0.0,
        "reward": 0.0,
        "fully_valid": 0.0,
    }
    assert (table.num_judged.before, table.num_judged.after, table.num_judged.both) == (4, 5, 3)
    early = next(row for row in table.rows if row.key == "early_of_all")
    assert (early.before.value, early.after.value) == pytest.approx((1 / 4, 3 / 5))


def test_nothing_is_said_of_the_judge_where_it_told_of_every_question():
    table = before_after_table(AFTER, AFTER, resamples=50)
    assert table.caption == "6 held-out questions; 95 % bootstrap intervals over questions, exact ones where all agree"


def test_terminal_table_fits_80_columns_and_colours_what_is_sure():
    questions = [f"q{i}" for i in range(40)]
    before = [sample(q, (F, T, T), correct=i % 2 == 0, reward=2.0) for i, q in enumerate(questions)]
    after = [sample(q, (T, T, T), correct=i % 2 == 1, reward=1.0) for i, q in enumerate(questions)]
    table = before_after_table(before, after, resamples=100).to_rich()
    out = io.StringIO()
    Console(file=out, width=80, force_terminal=True, color_system="standard").print(table)
    line = {
        key: row for row in out.getvalue().splitlines() for key in ("accuracy", "early-stage", "reward") if key in row
    }
    assert "…" not in out.getvalue()
    assert "\x1b[1;32m-100.0 points" in line["early-stage"]  # surely fewer: better
    assert "\x1b[1;31m-1.00" in line["reward"]  # surely less: worse
    assert "\x1b[1m+0.0 points" in line["accuracy"]  # equal in the mean


def test_interval_of_a_share_is_the_binomial_one():
    questions = [f"q{i}" for i in range(400)]
    samples = [sample(q, (T,), correct=i % 4 == 0) for i, q in enumerate(questions)]
    estimate = before_after_table(samples, samples).rows[0].before
    half_width = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert estimate.high - 0.25 == pytest.approx(half_width, rel=0.12)
    assert 0.25 - estimate.low == pytest.approx(half_width, rel=0.12)


def test_a_share_that_no_question_has_keeps_the_doubt_of_so_many_questions():
    questions = [f"q{i}" for i in range(40)]
    samples = [sample(q, (T, T), correct=True, reward=2.0) for q in questions]
    rows = {row.key: row.before for row in before_after_table(samples, samples, resamples=50).rows}
    # Clopper and Pearson's bound p is what makes 40 of 40 misses happen in 2.5 % of samples: (1 - p)^40 = 0.025.
    assert (rows["early_of_all"].value, rows["early_of_all"].low) == (0.0, 0.0)
    assert (1.0 - rows["early_of_all"].high) ** 40 == pytest.approx(0.025)
    assert (rows["accuracy"].value, rows["accuracy"].high) == (1.0, 1.0)
    assert rows["accuracy"].low == pytest.approx(1.0 - rows["early_of_all"].high)
    assert (rows["reward"].low, rows["reward"].high) == (2.0, 2.0)  # no share


def test_difference_is_paired():
    questions = [f"q{i}" for i in range(60)]
    rewards = np.random.default_rng(0).normal(size=60) * 10
    before = [sample(q, (T,), reward=float(r)) for q, r in zip(questions, rewards, strict=True)]
    after = [sample(q, (T,), reward=float(r) + 0.5) for q, r in zip(questions, rewards, strict=True)]
    row = next(row for row in before_after_table(before, after).rows if row.key == "reward")
    # A gain that is the same for every question is sure, however much the questions differ.
    assert (row.difference.low, row.difference.high) == pytest.approx((0.5, 0.5), abs=1e-9)
    assert row.before.high - row.before.low > 3.0


def test_questions_are_resampled_and_not_completions():
    rng = np.random.default_rng(1)
    one = [sample(f"q{i}", rng.random(4) < 0.5, greedy=True) for i in range(30)]
    copies = [EvaluatedSample(s.question_id, s.correct, s.validity, s.reward, greedy=False) for s in one]
    once = before_after_table(one, one, resamples=100).rows[3].before
    five_times = before_after_table([*one, *copies * 4], one, resamples=100).rows[3].before
    assert (five_times.value, five_times.low, five_times.high) == pytest.approx((once.value, once.low, once.high))


def test_order_of_samples_does_not_matter():
    assert before_after_table(BEFORE[::-1], AFTER[::-1], resamples=50) == before_after_table(
        BEFORE, AFTER, resamples=50
    )


def test_ratio_interval_against_the_delta_method():
    rng = np.random.default_rng(2)
    counts = rng.integers(0, 4, size=400).astype(float)
    sums = rng.random(400) * counts
    estimate = estimate_mean(sums, counts, seed=3, level=0.95, resamples=3000)
    mean = sums.sum() / counts.sum()
    half_width = 1.96 * np.sqrt(((sums - mean * counts) ** 2).sum()) / counts.sum()
    assert estimate.value == pytest.approx(mean)
    assert [estimate.low, estimate.high] == pytest.approx([mean - half_width, mean + half_width], abs=0.1 * half_width)
    doubled = estimate_difference((sums, counts), (2 * sums, counts), seed=3, level=0.95, resamples=3000)
    assert [doubled.value, doubled.low, doubled.high] == pytest.approx([mean, estimate.low, estimate.high])


def test_resamples_without_any_defined_completion_are_left_out():
    # One question of three defines the quantity: it is missing from (2/3)^3 = 30 % of the resamples.
    sums, counts = np.array([0.7, 0.0, 0.0]), np.array([1.0, 0.0, 0.0])
    estimate = estimate_mean(sums, counts, seed=0, level=0.95, resamples=200)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.7, 0.7, 0.7))


def test_what_no_resample_defines_is_shown_without_an_interval(tmp_path):
    # One question of a thousand fails, and the only resample misses it.
    samples = [sample("rare", (F, F, T)), *(sample(f"usual {i}", (T,)) for i in range(1000))]
    table = before_after_table(samples, samples, seed=1, resamples=1)
    table.write(tmp_path)
    rate = json.loads((tmp_path / "summary.json").read_text())["far"]
    assert rate["before"] == {"value": 0.5, "low": None, "high": None}
    row = next(row for row in (tmp_path / "summary.md").read_text().splitlines() if "accumulation" in row)
    assert row.endswith("| 50.0 % | 50.0 % | +0.0 points |")


@pytest.mark.parametrize(("before", "after"), [([], []), (BEFORE, AFTER[:-1]), (BEFORE[1:2], AFTER)])
def test_other_questions_are_refused(before, after):
    with pytest.raises(ValueError, match="same questions"):
        before_after_table(before, after)
