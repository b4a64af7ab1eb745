"""Prompts that a run cannot use are refused by name before it begins."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mrpo.backbones import Processor, load_processor
from mrpo.config import Config
from mrpo.data.phantom import PhantomDataset
from mrpo.errors import UserError
from mrpo.records import Example
from mrpo.rollout.prompts import PromptSizes, check_prompt_lengths


@pytest.fixture(scope="module")
def processor() -> Processor:
    return load_processor(Config.model_validate({"prompt": {"max_tokens": 60}}))


def _example(name: str, words: int, images: tuple[Path | Image.Image, ...] = ()) -> Example:
    return Example(name, images, "lung " * words, "", None, "train")


def test_the_largest_prompt_is_that_of_the_encoded_ones(processor: Processor) -> None:
    examples = [*PhantomDataset("train", size=300), _example("two", 1, (Image.new("RGB", (64, 64)),) * 2)]
    encoded = [processor.encode_prompt(example) for example in examples]
    counts: list[int] = []
    sizes = check_prompt_lengths(examples, processor, progress=counts.append)
    assert sizes == PromptSizes(max(len(p.input_ids) for p in encoded), 2)
    assert sum(counts) == len(examples)
    assert len(counts) > 1


def test_the_first_prompt_that_is_too_long_is_named(processor: Processor) -> None:
    examples = [_example(f"e{i}", 100 if i in (500, 700) else 2) for i in range(900)]
    with pytest.raises(UserError, match=r"example e500: its prompt takes \d+ tokens, above prompt.max_tokens=60"):
        check_prompt_lengths(examples, processor)


def test_only_the_chosen_examples_are_looked_at(processor: Processor) -> None:
    examples = [_example("short", 2), _example("long", 100), _example("shorter", 1)]
    assert check_prompt_lengths(examples, processor, [0, 2, 0]).max_tokens == len(
        processor.encode_prompt(examples[0]).input_ids
    )
    with pytest.raises(UserError, match="example long"):
        check_prompt_lengths(examples, processor, [0, 1])


def test_missing_images_are_named_and_no_pixel_is_decoded(processor: Processor, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    torn = (tmp_path / "whole.png").read_bytes()[:60]  # its header, not its pixels
    (tmp_path / "torn.png").write_bytes(torn)
    assert check_prompt_lengths([_example("torn", 1, (tmp_path / "torn.png",))], processor).max_images == 1
    with pytest.raises(UserError, match="example gone"):
        check_prompt_lengths([_example("gone", 1, (tmp_path / "none.png",))], processor)


def test_an_image_too_long_and_thin_is_named_with_its_size(processor: Processor, tmp_path: Path) -> None:
    Image.new("L", (1, 3000)).save(tmp_path / "rule.png")
    scans = [_example("good", 1, (Image.new("RGB", (5, 1000)),)), _example("rule", 1, (tmp_path / "rule.png",))]
    expected = r"example rule: its image of 1 x 3000 pixels is too long and thin: qwen3_vl takes .* at most 200 : 1"
    with pytest.raises(UserError, match=expected):
        check_prompt_lengths(scans, replace(processor, max_prompt_tokens=10_000))
    with pytest.raises(UserError, match=expected):
        processor.encode_prompt(scans[1])


def test_scaling_down_may_make_an_image_too_thin(processor: Processor) -> None:
    thin = _example("thin", 1, (Image.new("RGB", (10, 1999)),))  # 199.9 : 1, and 3 x 632 after it
    with pytest.raises(UserError, match=r"example thin: its image of 10 x 1999 pixels, scaled to 3 x 632, is too long"):
        check_prompt_lengths([thin], replace(processor, max_image_pixels=2_000))


def test_no_threads_are_left(processor: Processor) -> None:
    before = threading.active_count()
    check_prompt_lengths([_example(str(i), 1) for i in range(400)], processor)
    assert threading.active_count() == before
