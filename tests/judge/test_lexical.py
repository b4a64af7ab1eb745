"""The word-comparing stand-in judge: cases worked out by hand, and properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrpo.judge.lexical import LexicalJudge, content_words
from mrpo.records import Example, JudgeRequest, Verdict

RATIONALE = "A chest radiograph is shown. There is a rounded opacity in the left upper lobe. This suggests a mass."


def judge(*steps: str, rationale: str | None = RATIONALE, min_overlap: float = 0.5, answer: str = "mass") -> Verdict:
    example = Example("1", (), "What is the finding in the lung?", answer, rationale, "test")
    (verdict,) = LexicalJudge(min_overlap=min_overlap).judge([JudgeRequest(example, steps, None)])
    assert isinstance(verdict, Verdict)
    return verdict


def bits(verdict: Verdict) -> list[tuple[bool, bool]]:
    return [(step.gold_alignment, step.answer_contribution) for step in verdict.steps]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("The image is a chest radiograph.", (True, False)),  # chest, radiograph of image, chest, radiograph
        ("A rounded opacity lies in the left upper lobe.", (True, False)),
        ("It is a mass.", (True, True)),
        ("Masses are seen.", (True, True)),  # mass of mass, seen
        ("A rounded opacity lies in the right upper lobe.", (False, False)),
        ("The right mass is round.", (False, False)),
        ("Both lobes show bilateral opacity.", (False, False)),
        ("The lung is hyperinflated.", (False, True)),  # lung of the question, and something new
        ("The finding in the lung.", (False, False)),  # the question again
        ("Sailing boats drift over quiet water.", (False, False)),
        ("Let me think about the mass in the chest.", (False, False)),
        ("I need to look at the left upper lobe opacity.", (False, False)),
        ("The question asks for the mass.", (False, False)),
        ("So it is, then.", (False, False)),
        ("...", (False, False)),
        ("", (False, False)),
    ],
)
def test_one_step(step: str, expected: tuple[bool, bool]) -> None:
    assert bits(judge(step)) == [expected]


def test_a_repetition_gets_nothing_and_a_new_place_is_no_repetition() -> None:
    steps = ("Opacity in the left upper lobe.", "The upper left lobe: opacity!", "Opacity in the left lobe.")
    assert [valid for valid, _ in bits(judge(*steps))] == [True, False, True]


def test_without_a_gold_rationale_only_answer_contribution_is_left() -> None:
    verdict = judge("A mass is seen.", "A chest radiograph.", "The lung is hyperinflated.", rationale=None)
    assert bits(verdict) == [(False, True), (False, False), (False, True)]


def test_the_side_of_the_answer_counts_too() -> None:
    verdict = judge("The opacity is right lung.", "The opacity is left lung.", rationale=None, answer="Left lung")
    assert bits(verdict) == [(False, False), (False, True)]


def test_min_overlap_is_a_share_of_the_words_of_the_step() -> None:
    step = "chest alpha beta gamma"
    assert judge(step, min_overlap=0.25).validity == (True,)
    assert judge(step, min_overlap=0.26).validity == (False,)
    assert judge("alpha beta", min_overlap=0.0).validity == (False,)


def test_content_words() -> None:
    assert content_words("The Lungs' opacities are increasing; no masses.") == {
        "lung",
        "opacity",
        "increas",
        "no",
        "mass",
    }


@given(st.lists(st.text(max_size=30), max_size=6))
def test_every_step_gets_a_verdict_and_the_judge_is_deterministic(steps: list[str]) -> None:
    first = judge(*steps)
    assert len(first.steps) == len(steps)
    assert judge(*steps) == first
    assert judge(*steps, *steps).validity[len(steps) :] == (False,) * len(steps)
