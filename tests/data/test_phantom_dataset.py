from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrpo.data.phantom import PhantomDataset, corpus
from mrpo.data.phantom.corrupt import HABITS
from mrpo.data.phantom.language import DIAGNOSES, NUMBERS, parse
from mrpo.data.phantom.scene import PLACES
from mrpo.data.targets import sft_target
from mrpo.errors import UserError
from mrpo.records import Example

KINDS = {"modality", "organ", "count", "total", "diagnosis"}


def answer_from_facts(facts: dict, kind: str, organ: str | None) -> str:
    """The gold answer, worked out from the JSON facts alone."""
    counts = {o["name"]: o["lesions"] for o in facts["organs"]}
    if kind == "modality":
        return facts["modality"]
    if kind == "organ":
        (only,) = [name for name, n in counts.items() if n]
        return only
    if kind == "diagnosis":
        return DIAGNOSES[facts["modality"], facts["tone"]]
    return NUMBERS[counts[organ] if kind == "count" else sum(counts.values())]


def pixels(example) -> np.ndarray:
    return np.asarray(example.images[0])


def test_examples_are_fixed_by_seed_split_and_index():
    a, b = (PhantomDataset("train", size=20, seed=3) for _ in range(2))
    reversed_order = [b[i] for i in reversed(range(20))][::-1]
    for one, two in zip(a, reversed_order, strict=True):
        assert (one.id, one.question, one.answer, one.rationale) == (two.id, two.question, two.answer, two.rationale)
        assert one.metadata == two.metadata
        assert (pixels(one) == pixels(two)).all()
    assert [e.metadata["scene"] for e in a] != [e.metadata["scene"] for e in PhantomDataset("train", size=20, seed=4)]


def test_plain_pictures_are_those_that_shipped_policies_know():
    digest = hashlib.sha256()
    for split in ("train", "validation", "test"):
        for example in PhantomDataset(split, size=100):
            digest.update(example.id.encode() + pixels(example)[..., 0].tobytes() + example.rationale.encode())
    assert digest.hexdigest() == "ac24c3018fd4f600fc84de306a33bb8b6ea73fe30f0161c59ff2b7455664ac4e"


@pytest.mark.parametrize("look", ["hard", "shifted"])
def test_a_look_changes_the_pictures_and_nothing_else(look):
    plain, other = (PhantomDataset("test", size=50, look=name) for name in ("plain", look))
    for one, two in zip(plain, other, strict=True):
        assert (one.id, one.question, one.answer, one.rationale) == (two.id, two.question, two.answer, two.rationale)
        assert one.metadata == two.metadata
        assert (pixels(one) != pixels(two)).any()
    again = PhantomDataset("test", size=50, look=look)
    assert all((pixels(one) == pixels(two)).all() for one, two in zip(other, again, strict=True))


def lesion_contrast(look):
    """How far lesions stand out of their organ, in gray levels, where the plain pictures show them to be."""
    faint = []
    for plain, other in zip(*(PhantomDataset("test", size=100, look=name) for name in ("plain", look)), strict=True):
        gray = pixels(plain)[..., 0]
        bright = plain.metadata["scene"]["tone"] == "bright"
        lesions = gray == 255 if bright and plain.metadata["scene"]["modality"] == "ultrasound" else None
        if lesions is not None and lesions.sum() >= 12:
            faint.append(pixels(other)[..., 0][lesions].mean())
    return np.mean(faint)


def test_hard_pictures_have_fainter_lesions():
    assert lesion_contrast("hard") < lesion_contrast("plain") - 40


def test_no_image_and_no_scene_stands_in_two_splits():
    images, scenes = {}, {}
    for split in ("train", "validation", "test"):
        examples = [e for seed in (0, 1) for e in PhantomDataset(split, size=300, seed=seed)]
        images[split] = {pixels(e).tobytes() for e in examples}
        scenes[split] = {json.dumps(e.metadata["scene"], sort_keys=True) for e in examples}
        assert len(images[split]) == len(examples)
    for one, two in pairwise(["train", "validation", "test", "train"]):
        assert not images[one] & images[two]
        assert not scenes[one] & scenes[two]


def test_gold_answers_follow_from_the_facts():
    seen = set()
    for example in PhantomDataset("validation", size=400):
        question = example.metadata["question"]
        assert example.answer == answer_from_facts(example.metadata["scene"], question["kind"], question["organ"])
        assert sft_target(example) == (example.metadata["gold_rationale"], example.answer)
        seen.add(question["kind"])
    assert seen == KINDS


def test_gold_rationales_are_four_to_eight_true_distinct_sentences():
    for example in PhantomDataset("train", size=300):
        assert example.rationale is not None
        sentences = [f"{s}." for s in example.rationale.removesuffix(".").split(". ")]
        assert 4 <= len(sentences) <= 8
        assert len(set(sentences)) == len(sentences)
        statements = [parse(s) for s in sentences]
        assert all(statements)
        assert sentences[-1] == f"So the answer is {example.answer}."


def dark_lesions(image: np.ndarray) -> np.ndarray:
    """Where a CT image shows the gray of dark lesions, inside the body."""
    mask = image[:, :, 0] == 10
    inside = np.zeros_like(mask)
    inside[12:52, 2:62] = True
    return mask & inside


def blob_sizes(mask: np.ndarray) -> list[int]:
    """Sizes of the 4-connected components."""
    left, sizes = {(int(y), int(x)) for y, x in np.argwhere(mask)}, []
    while left:
        queue, size = [left.pop()], 0
        while queue:
            y, x = queue.pop()
            size += 1
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            left -= near
            queue.extend(near)
        sizes.append(size)
    return sizes


def dark_ct(size: int) -> Iterator[Example]:
    """CT images with dark lesions: their gray occurs nowhere else in the body, so the pixels can be counted."""
    for example in PhantomDataset("train", size=size):
        if (example.metadata["scene"]["modality"], example.metadata["scene"]["tone"]) == ("CT", "dark"):
            yield example


def test_images_show_the_lesions_that_the_facts_count():
    checked = 0
    for example in dark_ct(600):
        image = pixels(example)
        assert image.shape == (64, 64, 3)
        assert image.dtype == np.uint8
        shown = sum(size > 8 for size in blob_sizes(dark_lesions(image)))
        assert shown == sum(organ["lesions"] for organ in example.metadata["scene"]["organs"])
        checked += 1
    assert checked > 50


def test_lesions_lie_in_their_organ():
    rows, columns = {"upper": 24, "lower": 40}, {"left": 9, "middle": 32, "right": 55}
    for example in dark_ct(600):
        affected = [organ for organ in example.metadata["scene"]["organs"] if organ["lesions"]]
        if len(affected) == 1:
            row, column = affected[0]["place"].split()
            y, x = np.nonzero(dark_lesions(pixels(example)))
            assert abs(np.median(y) - rows[row]) < 9
            assert abs(np.median(x) - columns[column]) < 14
            assert PLACES[affected[0]["name"]] == affected[0]["place"]


@settings(max_examples=60, deadline=None)
@given(index=st.integers(0, 10_000), low=st.floats(0, 1), high=st.floats(0, 1))
def test_corruption_changes_the_target_never_the_truth(index, low, high):
    low, high = sorted((low, high))
    data = PhantomDataset("train", size=10_001)
    gold, some, more = data[index], data.example(index, corruption=low), data.example(index, corruption=high)
    assert (pixels(gold) == pixels(more)).all()
    assert (gold.question, gold.answer) == (more.question, more.answer)
    assert gold.metadata["gold_rationale"] == more.metadata["gold_rationale"] == gold.rationale
    assert gold.metadata["misreadings"] == []
    assert set(more.metadata["misreadings"]) <= set(HABITS)
    if not more.metadata["misreadings"]:
        assert sft_target(more) == sft_target(gold)
    assert bool(some.metadata["misreadings"]) <= bool(more.metadata["misreadings"])


def test_every_habit_strikes_and_some_reach_the_answer():
    wrong = dict.fromkeys(HABITS, 0)
    for example in PhantomDataset("train", size=1500, corruption=0.3):
        struck = example.metadata["misreadings"]
        if len(struck) == 1:
            rationale, answer = sft_target(example)
            wrong[struck[0]] += answer != example.answer
            assert rationale.endswith(f"So the answer is {answer}.")
    assert all(wrong.values()), wrong


def test_mri_taken_for_ct_reaches_the_diagnosis():
    data = PhantomDataset("train", size=2000)
    cases = (e for e in data if e.metadata["scene"]["modality"] == "MRI" and e.answer == "fibrosis")
    example = data.example(int(next(cases).id.split("/")[-1]), corruption=1.0)
    rationale, answer = sft_target(example)
    assert rationale.startswith("The image is a CT scan. Each lesion is dark.")
    assert "On CT dark lesions suggest cyst." in rationale
    assert (answer, example.answer) == ("cyst", "fibrosis")


def test_sft_target_of_an_example_without_rationale():
    example = PhantomDataset("test", size=1)[0]
    bare = type(example)(example.id, (), "Where?", "liver", None, "train")
    assert sft_target(bare) == ("", "liver")


def test_it_is_a_sequence():
    data = PhantomDataset("test", size=5)
    assert len(data) == 5
    assert data[-1].id == data[4].id
    assert [e.id for e in data[1:3]] == [data[1].id, data[2].id]
    with pytest.raises(IndexError, match="5 questions"):
        data[5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev", "size": 1}, "train, validation, test"),
        ({"split": "train", "size": -1}, "-1"),
        ({"split": "train", "size": 1, "corruption": 1.5}, "1.5"),
        ({"split": "train", "size": 1, "look": "blurred"}, "plain, hard, shifted"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        PhantomDataset(**arguments)


def test_the_vocabulary_is_small_and_complete():
    words = {word for text in corpus() for word in text.replace(".", " ").replace("?", " ").split()}
    assert len(words) <= 100
    for example in PhantomDataset("train", size=200, corruption=0.5):
        text = " ".join((example.question, *sft_target(example)))
        assert set(text.replace(".", " ").replace("?", " ").split()) <= words
