from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mrpo.data.phantom import PhantomDataset
from mrpo.data.phantom.language import TEMPLATES
from mrpo.data.targets import sft_target
from mrpo.judge.phantom import PhantomJudge
from mrpo.records import Example, JudgeRequest, Unjudged, Verdict

MODALITY, TONE = "The image is an MRI scan.", "Each lesion is dark."
SPLEEN, KIDNEY = "The spleen holds two lesions.", "The left kidney holds one lesion."
SUM, END = "Adding two and one makes three.", "So the answer is three."
GOLD = [MODALITY, TONE, SPLEEN, KIDNEY, SUM, END]


def example(kind: str = "total", organ: str | None = None, answer: str = "three") -> Example:
    """An MRI image with two dark lesions in the spleen and one in the left kidney."""
    places = {"liver": "upper left", "spleen": "upper right", "left kidney": "lower right"}
    lesions = {"liver": 0, "spleen": 2, "left kidney": 1}
    organs = [{"name": name, "place": place, "lesions": lesions[name]} for name, place in places.items()]
    scene = {"modality": "MRI", "tone": "dark", "organs": organs, "pixel_seed": 0}
    metadata = {"scene": scene, "question": {"kind": kind, "organ": organ}}
    return Example("hand", (Image.new("RGB", (64, 64)),), "How many?", answer, None, "test", metadata)


def verdict(steps: list[str], case: Example | None = None) -> Verdict:
    (result,) = PhantomJudge().judge([JudgeRequest(case or example(), tuple(steps), "three")])
    assert isinstance(result, Verdict)
    assert len(result.steps) == len(steps)
    return result


def valid(steps: list[str], case: Example | None = None) -> list[bool]:
    return list(verdict(steps, case).validity)


def test_gold_is_valid_throughout():
    assert all(valid(GOLD))


def test_context_steps_are_aligned_but_contribute_nothing():
    steps = verdict(GOLD).steps
    assert all(step.gold_alignment for step in steps)
    assert [step.answer_contribution for step in steps] == [False, False, True, True, True, True]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_gold_of_the_data_set_is_valid_and_told_by_one_pass(split):
    requests = []
    for item in PhantomDataset(split, size=200, corruption=1.0):
        gold = item.metadata["gold_rationale"]
        requests.append(JudgeRequest(item, tuple(f"{s}." for s in gold.removesuffix(".").split(". ")), item.answer))
    for result in PhantomJudge().judge(requests):
        assert isinstance(result, Verdict)
        assert all(result.validity)


def test_a_misreading_fails_where_it_first_shows():
    for item in PhantomDataset("train", size=300, corruption=0.5):
        told = [f"{s}." for s in sft_target(item)[0].removesuffix(".").split(". ")]
        gold = [f"{s}." for s in item.metadata["gold_rationale"].removesuffix(".").split(". ")]
        differs = next((i for i, (a, b) in enumerate(zip(told, gold, strict=True)) if a != b), None)
        result = valid(told, item)
        assert (differs is None) == all(result)
        if differs is not None:
            assert result.index(False) == differs


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        # A wrong statement is invalid and spares the true ones after it.
        (["The image is a CT scan.", *GOLD[1:]], [False, True, True, True, True, True]),
        ([MODALITY, TONE, "The spleen holds three lesions.", KIDNEY, SUM, END], [True, True, False, True, True, True]),
        # The wrong organ stands for the finding it replaced.
        ([MODALITY, TONE, "The liver holds two lesions.", KIDNEY, SUM, END], [True, True, False, True, True, True]),
        # ... but for one finding only.
        ([MODALITY, TONE, "The liver holds two lesions.", SUM, END], [True, True, False, False, False]),
        # Omission: everything after the gap fails.
        ([MODALITY, SPLEEN, KIDNEY, SUM, END], [True, False, False, False, False]),
        ([END], [False]),
        # A finding told late is valid itself.
        ([MODALITY, SPLEEN, TONE, KIDNEY, SUM, END], [True, False, True, True, True, True]),
        # Repetition.
        ([MODALITY, MODALITY, *GOLD[1:]], [True, False, True, True, True, True, True]),
        ([*GOLD, END], [True] * 6 + [False]),
        # True but irrelevant, and no stand-in for what it leaves out.
        ([MODALITY, "The spine is dark.", *GOLD[1:]], [True, False, True, True, True, True, True]),
        ([MODALITY, TONE, "The liver holds zero lesions.", KIDNEY, SUM, END], [True, True] + [False] * 4),
        ([MODALITY, TONE, SPLEEN, KIDNEY, "Adding one and one makes two.", SUM, END], [True] * 4 + [False, True, True]),
        # Both sides of a bet.
        (["The image is a CT scan.", *GOLD], [False, False, True, True, True, True, True]),
        ([*GOLD[:2], SPLEEN, "The spleen holds three lesions.", *GOLD[3:]], [True] * 3 + [False] + [True] * 3),
        (["So the answer is two.", *GOLD], [False, *[True] * 5, False]),
        # Hedging, meta talk, nothing at all.
        ([MODALITY, TONE, "The spleen holds two or three lesions."], [True, True, False]),
        (["Let me think.", "", ".", "   "], [False] * 4),
        # Other case or spacing is another text.
        ([MODALITY.upper(), MODALITY.lower(), "The  image is an MRI scan."], [False] * 3),
        # White space around a step is the splitter's business, and no way to say things twice.
        ([f" {MODALITY}\n", MODALITY], [True, False]),
        ([MODALITY, TONE, SPLEEN, KIDNEY, SUM, "So the answer is four."], [True] * 5 + [False]),
    ],
)
def test_hand_judged_rationales(steps, expected):
    assert valid(steps) == expected


def test_every_fault_has_a_reason():
    reasons = [
        step.reason for step in verdict(["The image is a CT scan.", "The spine is dark.", KIDNEY, "Hm.", "Hm."]).steps
    ]
    assert reasons[0] == "false of the scene"
    assert "no part of the reasoning" in reasons[1]
    assert reasons[2] == f"skips a finding: {TONE}"
    assert "not a statement" in reasons[3]


def test_relevance_depends_on_the_question():
    case = example("count", "spleen", "two")
    steps = [MODALITY, "The spleen is in the upper right.", TONE, SPLEEN, "So the answer is two."]
    assert all(valid(steps, case))
    assert valid([MODALITY, "The spleen is in the upper right.", TONE, KIDNEY, SPLEEN], case) == [
        True,
        True,
        True,
        False,
        True,
    ]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([s for t in TEMPLATES.values() for s in t.instances()]), max_size=12), st.data())
def test_no_rationale_beats_the_gold(noise, data):
    """Whatever is mixed in, valid steps are distinct gold sentences, and every gold one before them was mentioned."""
    steps = list(noise)
    for sentence in data.draw(st.lists(st.sampled_from(GOLD), max_size=8)):
        steps.insert(data.draw(st.integers(0, len(steps))), sentence)
    said = [step for step, ok in zip(steps, valid(steps), strict=True) if ok]
    assert len(set(said)) == len(said)
    assert set(said) <= set(GOLD)


def test_dropping_any_one_gold_step_fails_the_next():
    for i in range(len(GOLD) - 1):
        result = valid(GOLD[:i] + GOLD[i + 1 :])
        assert result == [True] * i + [False] * (len(GOLD) - 1 - i)


def test_the_corrupted_rationale_of_an_example_is_not_taken_for_gold():
    rng = random.Random(0)
    data = PhantomDataset("train", size=1000, corruption=1.0)
    item = next(data[i] for i in rng.sample(range(1000), 1000) if "modality" in data[i].metadata["misreadings"])
    told = tuple(f"{s}." for s in sft_target(item)[0].removesuffix(".").split(". "))
    assert not valid(list(told), item)[0]


def test_other_examples_are_unjudged():
    other = Example("rad/1", (), "Where?", "liver", None, "train")
    phantom = JudgeRequest(example(), tuple(GOLD), "three")
    results = PhantomJudge().judge([JudgeRequest(other, ("The liver.",), "liver"), phantom])
    assert isinstance(results[0], Unjudged)
    assert "rad/1" in results[0].reason
    assert isinstance(results[1], Verdict)


def test_no_steps_no_verdicts():
    assert verdict([]).steps == ()
