from __future__ import annotations

import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrpo.config import RewardConfig
from mrpo.rewards import AnswerReward

REWARD = AnswerReward(RewardConfig())


def score(prediction: str | None, gold: str) -> tuple[float, dict[str, float]]:
    return REWARD([prediction], [gold])[0]


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("Left lung.", "left  lung"),
        ("3.50 cm", "3.5 cm"),
        ("1,000", "1000"),
        ("+3", "3"),
        ("1/2", "0.5"),
        (r"$\frac{1}{2}$", "0.5"),
        (r"\boxed{3}", "3"),
        (r"$3 \text{ cm}$", "3.0 cm."),
        (r"$3\times10^{3}$", "3000"),
        ("50%", "0.5"),
        ("10^3", "1000"),
        ("$x+1$", "$1+x$"),
        ("左肺", "左肺"),
    ],
)
def test_same_answers_score_one(prediction: str, gold: str) -> None:
    reward, parts = score(prediction, gold)
    assert reward == 1.0
    assert parts["symbolic"] == 1.0


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("left", "right"),
        ("3 cm", "3 mm"),
        ("2 on the left", "2 on the right"),
        ("120/80 mmHg", "60/40 mmHg"),
        ("2-3", "4-5"),
        ("L4-L5", "L5-L6"),
        ("<5", ">5"),
        ("-3", "3"),
        ("3.5", "5.3"),
        ("$9^{9^{9^{9}}}$", "3"),
        ("9^9^9^9", "3"),
        (r"$\sum_{i=1}^{99} 9^{99}$", "3"),
        ("$3$ cm", "$3$ mm"),
        ("$(x+y)^9*(a+b+c+d+e+f+g+h)^9$", "2"),  # this and the next four would take minutes
        ("$((x+y+z+w+a+b+c+d)^9)^9$", "2"),
        ("$(x+y)^{99}(x-y)^{99}$", "2"),
        (r"$((1.5+\sqrt{2}+\sqrt{3})^{99})^{99}$", "2"),
        ("$" + 20 * "{" + "x" + 20 * "}" + "$", "2"),
        ("1" * 100, "2"),
        ("$", "$$"),
    ],
)
def test_different_answers_are_not_the_same_quantity(prediction: str, gold: str) -> None:
    reward, parts = score(prediction, gold)
    assert parts["symbolic"] == 0.0
    assert reward < 1.0


@pytest.mark.parametrize("prediction", [None, "", "  \n"])
def test_missing_answer_scores_zero(prediction: str | None) -> None:
    reward, parts = score(prediction, "left lung")
    assert reward == 0.0
    assert set(parts) == {"symbolic", "rouge1", "bleu1", "lexical"}
    assert set(parts.values()) == {0.0}


def test_lexical_parts_by_hand() -> None:
    reward, parts = score("The LEFT lung", "left lung lobe nodule")
    assert parts["rouge1"] == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert parts["bleu1"] == pytest.approx(2 / 3 * math.exp(1 - 4 / 3))
    assert parts["lexical"] == reward == pytest.approx((parts["rouge1"] + parts["bleu1"]) / 2)


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("CA 125", "CA-125"),
        ("COVID 19", "covid-19"),
        ("2 3 cm", "2-3 cm"),
        ("30° 40°", "30°-40°"),
        ("L4 5", "L4-5"),
        ("T12 L1", "T12-L1"),
        ("50% 60%", "50%-60%"),
        ("type (II) 3", "type (II)-3"),
        ("cafe\u0301 3", "cafe\u0301-3"),
    ],
)
def test_a_hyphen_behind_a_word_is_no_sign(prediction: str, gold: str) -> None:
    assert score(prediction, gold)[1]["lexical"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [("-3", "3"), ("+3", "-3"), ("(-3)", "(3)"), ("z=-3", "z=3"), ("10^-3", "10^3"), ("<5", ">5"), ("<5", "5")],
)
def test_signs_and_relations_are_part_of_a_number(prediction: str, gold: str) -> None:
    assert score(prediction, gold)[1]["rouge1"] < 1.0


word = st.text(st.characters(categories=["L", "Nd"]), min_size=1, max_size=6)


@given(words=st.lists(word | st.sampled_from(["3.5", "1,000", "50%", "<5"]), min_size=2, max_size=6))
def test_hyphens_between_words_count_as_spaces(words: list[str]) -> None:
    assert score("-".join(words), " ".join(words))[1]["rouge1"] == score(" ".join(words), " ".join(words))[1]["rouge1"]


def test_weights_are_rescaled_over_the_parts_that_are_there() -> None:
    reward = AnswerReward(RewardConfig(rouge_weight=0.3, bleu_weight=0.1))
    value, parts = reward(["a nodule"], ["a large nodule"])[0]
    assert value == pytest.approx(0.75 * parts["rouge1"] + 0.25 * parts["bleu1"])


def test_works_outside_the_main_thread() -> None:
    rewards: list[float] = []
    thread = threading.Thread(target=lambda: rewards.append(score("7/2", "3.500")[0]))
    thread.start()
    thread.join()
    assert rewards == [1.0]


@given(prediction=st.none() | st.text(max_size=80), gold=st.text(max_size=80))
def test_every_part_lies_in_the_unit_interval(prediction: str | None, gold: str) -> None:
    reward, parts = score(prediction, gold)
    assert all(0.0 <= value <= 1.0 for value in (reward, *parts.values()))
