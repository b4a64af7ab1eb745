from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from metric_oracles import summarize
from PIL import Image

from mrpo.estimates import Estimate, question_ids, sum_by_question
from mrpo.metrics import NUM_BINS, STAGES, first_failure_bin, first_failure_stage
from mrpo.quantities import incorrect_in_bin, is_in_stage, is_in_stage_of_failures, rate_in_bin
from mrpo.records import EvaluatedSample
from mrpo.report.failures import draw_failures, estimate_each
from mrpo.report.style import EVALUATION_COLORS

T, F = True, False


def sample(question: str, validity: tuple[bool, ...] | None, correct: bool = False) -> EvaluatedSample:
    return EvaluatedSample(question, correct, validity, 0.0, greedy=True)


SAMPLES = [
    sample("a", (F, F, F, F, F)),  # point 1/5: early, first bin, rate 1
    sample("a", (F, T, T, T, T), correct=True),  # 1/5, rate 0
    sample("b", (F, T, F, T, T)),  # 1/5, rate 1/4
    sample("c", (T, F, F)),  # 2/3: mid, fourth bin, rate 1
    sample("d", (T, T, T, F), correct=True),  # 1: late, last bin, no rate
    sample("e", (T, T), correct=True),
    sample("f", (T, T, T, T)),
    sample("g", ()),
]


def values(quantities) -> list[float | None]:
    return [estimate.value for estimate in estimate_each(SAMPLES, quantities, seed=0, resamples=20)]


def test_stages_against_hand_computed():
    assert values([is_in_stage(stage) for stage in (*STAGES, "none")]) == [3 / 8, 1 / 8, 1 / 8, 2 / 8]
    assert values([is_in_stage_of_failures(stage) for stage in STAGES]) == [3 / 5, 1 / 5, 1 / 5]


def test_rate_and_incorrect_over_bins_against_hand_computed():
    bins = range(NUM_BINS)
    assert values([rate_in_bin(index, correct=False) for index in bins]) == [5 / 8, None, None, 1.0, None]
    assert values([rate_in_bin(index, correct=True) for index in bins]) == [0.0, None, None, None, None]
    assert values([incorrect_in_bin(index) for index in bins]) == [2 / 3, None, None, 1.0, 0.0]


@given(st.lists(st.tuples(st.lists(st.booleans(), max_size=8), st.booleans()), min_size=1, max_size=12))
def test_values_agree_with_the_summary_without_intervals(chains):
    samples = [sample(str(index), tuple(validity), correct) for index, (validity, correct) in enumerate(chains)]
    summary = summarize([validity for validity, _ in chains], [correct for _, correct in chains])

    def close(quantities, expected) -> None:
        questions = question_ids(samples)
        sums = [sum_by_question(samples, questions, quantity) for quantity in quantities]
        values = [total.sum() / count.sum() if count.any() else None for total, count in sums]
        assert values == [None if value is None else pytest.approx(value) for value in expected]

    close([is_in_stage(stage) for stage in STAGES], summary.stage_of_all.values())
    close([is_in_stage_of_failures(stage) for stage in STAGES], summary.stage_of_failures.values())
    close([rate_in_bin(index, correct=True) for index in range(NUM_BINS)], summary.far_by_bin_correct)
    close([rate_in_bin(index, correct=False) for index in range(NUM_BINS)], summary.far_by_bin_incorrect)
    close([incorrect_in_bin(index) for index in range(NUM_BINS)], summary.incorrect_by_bin)


@given(st.integers(1, 60).flatmap(lambda k: st.tuples(st.integers(1, k), st.just(k))))
def test_cuts_are_exact_fractions_with_their_upper_ends(place_of_steps):
    place, num_steps = place_of_steps
    validity = [T] * (place - 1) + [F] + [T] * (num_steps - place)
    point = Fraction(place, num_steps)
    assert first_failure_bin(validity) == -(-point * 5 // 1) - 1
    assert first_failure_stage(validity) == STAGES[-(-point * 3 // 1) - 1]


def test_no_failure_has_no_stage():
    assert first_failure_stage((T, T)) is None
    assert first_failure_bin(()) is None


def colours(path) -> list[bool]:
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    return [bool((pixels == np.rint(np.array(to_rgb(c)) * 255)).all(axis=1).any()) for c in EVALUATION_COLORS[:3]]


def test_every_evaluation_is_drawn(tmp_path):
    unjudged = [sample("a", None)]
    draw_failures({"before": SAMPLES, "after": SAMPLES[3:]}, tmp_path / "two.png", resamples=20)
    draw_failures({"before": SAMPLES, "unjudged": unjudged}, tmp_path / "one.png", resamples=20)
    draw_failures({"unjudged": unjudged}, tmp_path / "none.png", resamples=20)
    assert colours(tmp_path / "two.png") == [True, True, False]
    assert colours(tmp_path / "one.png") == [True, False, False]
    assert colours(tmp_path / "none.png") == [False, False, False]


def test_a_rate_that_no_resample_defines_is_drawn_without_an_interval(tmp_path):
    samples = [sample("rare", (F, F, T)), *(sample(f"usual {index}", (T, T)) for index in range(1000))]
    (estimate,) = estimate_each(samples, [rate_in_bin(1, correct=False)], seed=1, resamples=1)
    assert estimate == Estimate(0.5, None, None)
    draw_failures({"alone": samples}, tmp_path / "alone.png", seed=1, resamples=1)
    assert colours(tmp_path / "alone.png") == [True, False, False]


def test_drawing_is_reproducible(tmp_path):
    for name in ("a.png", "b.png"):
        draw_failures({"before": SAMPLES, "after": SAMPLES[3:]}, tmp_path / name, seed=3, resamples=20)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        draw_failures({}, tmp_path / "failures.png")
