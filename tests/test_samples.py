from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mrpo.pictures import shown_picture
from mrpo.records import Completion, Example, Rewards, ScoredCompletion, Step, StepVerdict, Unjudged, Verdict
from mrpo.samples import sample_record, save_images


def scored(verdict: Verdict | Unjudged, steps: tuple[Step, ...]) -> ScoredCompletion:
    rewards = Rewards(1.0, None if isinstance(verdict, Unjudged) else 0.5, -0.25, {"symbolic": 1.0})
    return ScoredCompletion(Completion((5, 6, 7, 8, 9), "text", "length"), "liver", steps, verdict, rewards)


def example(*images: Path | Image.Image, name: str = "set/1") -> Example:
    return Example(name, images, "Which organ?", "liver", None, "train", {"dataset": "toy"})


STEPS = (Step("One.", 0, 2), Step("Two.", 2, 4))


def test_a_judged_completion() -> None:
    verdict = Verdict((StepVerdict(True, False, "said"), StepVerdict(False, False, "wrong")))
    advantages = torch.tensor([0.5, 0.5, -2.0, -2.0, -0.5])
    record = sample_record(example(), scored(verdict, STEPS), advantages, ["images/a.png"])
    assert record["steps"] == [
        {"text": "One.", "valid": True, "reason": "said", "gold_alignment": True, "answer_contribution": False,
         "advantage": 0.5},
        {"text": "Two.", "valid": False, "reason": "wrong", "gold_alignment": False, "answer_contribution": False,
         "advantage": -2.0},
    ]  # fmt: skip
    assert (record["advantage"], record["correct"], record["unjudged"]) == (-0.5, True, None)
    assert (record["dataset"], record["finish_reason"], record["num_tokens"]) == ("toy", "length", 5)
    assert record["images"] == ["images/a.png"]


def test_an_unjudged_completion_without_advantages() -> None:
    record = sample_record(example(), scored(Unjudged("no answer of the judge"), STEPS))
    assert [step["valid"] for step in record["steps"]] == [None, None]
    assert record["unjudged"] == "no answer of the judge"
    assert record["reward"]["process"] is None
    assert record["advantage"] is None


def test_no_advantage_outside_steps_where_steps_take_every_token() -> None:
    verdict = Verdict((StepVerdict(True, True),))
    record = sample_record(example(), scored(verdict, (Step("All.", 0, 5),)), torch.ones(5))
    assert record["advantage"] is None


def test_pictures_are_saved_once_and_files_named(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    (tmp_path / "run").mkdir()
    taken = example(Image.fromarray(pixels), tmp_path / "scan.jpg", name="../../odd name/ü")
    places = save_images(taken, tmp_path / "run")
    assert places[1] == str(tmp_path / "scan.jpg")
    saved = tmp_path / "run" / places[0]
    assert saved.parent == tmp_path / "run" / "images"
    assert np.array_equal(np.asarray(Image.open(saved)), pixels)
    written = saved.stat().st_mtime_ns
    assert save_images(taken, tmp_path / "run") == places
    assert saved.stat().st_mtime_ns == written
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("mode", ["CMYK", "F", "LAB"])
def test_pictures_of_any_mode_are_saved_as_they_are_shown(tmp_path: Path, mode: str) -> None:
    picture = Image.linear_gradient("L").convert(mode)
    (place,) = save_images(example(picture), tmp_path)
    assert np.array_equal(np.asarray(Image.open(tmp_path / place)), np.asarray(shown_picture(picture)))


def test_names_that_look_alike_and_several_pictures_stay_apart(tmp_path: Path) -> None:
    picture = Image.new("RGB", (2, 2))
    names = [save_images(example(picture, picture, name=name), tmp_path) for name in ("a/b", "a-b", "a b")]
    assert len({place for places in names for place in places}) == 6
