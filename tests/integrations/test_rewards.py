"""What the rewards read of rows as data sets and trainers hand them over."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrpo.errors import UserError
from mrpo.integrations.rewards import example_of


@pytest.mark.parametrize("images", [["a.png", "b.png"], ("a.png", "b.png"), np.array(["a.png", "b.png"], dtype=object)])
def test_images_may_be_any_sequence(images: Any) -> None:
    example = example_of({"prompt": "Which organ?", "answer": "lung", "images": images})
    assert example.images == (Path("a.png"), Path("b.png"))


@pytest.mark.parametrize("images", [None, [], np.array([])])
def test_image_counts_where_there_are_no_images(images: Any) -> None:
    row = {"prompt": "Which organ?", "answer": "lung", "images": images}
    assert example_of({**row, "image": "a.png"}).images == (Path("a.png"),)
    assert example_of(row).images == ()


def test_solution_counts_where_the_answer_is_none() -> None:
    row = {"prompt": "Which organ?", "answer": None}
    assert example_of({**row, "solution": 0}).answer == "0"
    assert example_of({**row, "answer": "", "solution": "lung"}).answer == ""
    with pytest.raises(UserError, match="column answer"):
        example_of({**row, "solution": None})


def test_a_message_may_have_no_content() -> None:
    prompt = [{"role": "user", "content": "Which organ?"}, {"role": "user", "content": None}]
    assert example_of({"prompt": prompt, "answer": "lung"}).question == ""


def test_rewards_do_without_deepspeed() -> None:
    """It is the trainer's, and verl's users need not have it."""
    program = "import sys; sys.modules['deepspeed'] = None; import mrpo.integrations.rewards, mrpo.integrations.verl"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
