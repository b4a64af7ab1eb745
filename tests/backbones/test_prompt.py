"""Prompts and their lengths."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import pytest
import torch
from hypothesis import example as with_example
from hypothesis import given, settings
from hypothesis import strategies as st
from image_cases import STORED, pixels, write_turned
from PIL import Image
from transformers import GotOcr2ImageProcessorPil

from mrpo.backbones import Processor, load_processor
from mrpo.backbones.internvl import InternVL
from mrpo.config import Config
from mrpo.records import Example


@pytest.fixture(scope="module")
def processor(tiny_policy: Path) -> Processor:
    return load_processor(
        Config.model_validate({"model": {"path": str(tiny_policy)}, "data": {"max_image_pixels": 40_000}})
    )


side = st.integers(20, 400)
sizes = st.lists(st.tuples(side, side), max_size=3)


@settings(deadline=None, max_examples=30)
@given(sizes=sizes, question=st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=40))
def test_lengths_are_known_without_decoding_the_images(
    processor: Processor, sizes: list[tuple[int, int]], question: str
) -> None:
    example = Example("x", tuple(Image.new("RGB", size) for size in sizes), question, "", None, "test")
    prompt = processor.encode_prompt(example)
    assert processor.count_prompt_tokens(example) == len(prompt.input_ids)
    placeholder = processor.model_config.image_token_id
    runs = [(token, list(run)) for token, run in groupby(prompt.input_ids.tolist())]
    collapsed = [token for token, run in runs for _ in (run[:1] if token == placeholder else run)]
    assert collapsed == list(prompt.text_ids)
    assert prompt.text_ids.count(placeholder) == len(prompt.pictures) == len(sizes)
    assert all(picture.width * picture.height <= 40_000 for picture in prompt.pictures)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tiff"])
def test_the_tokens_of_a_turned_image_are_those_of_the_upright_one(
    processor: Processor, tmp_path: Path, orientation: int, suffix: str
) -> None:
    upright = pixels(height=40, width=200)
    file = write_turned(tmp_path / f"turned{suffix}", upright, orientation)
    turned, straight = (Example("x", (i,), "What?", "", None, "test") for i in (file, Image.fromarray(upright)))
    prompt, expected = processor.encode_prompt(turned), processor.encode_prompt(straight)
    assert processor.count_prompt_tokens(turned) == len(prompt.input_ids)
    assert torch.equal(prompt.images["image_grid_thw"], expected.images["image_grid_thw"])
    if suffix != ".jpg":
        assert torch.equal(prompt.images["pixel_values"], expected.images["pixel_values"])


def test_a_question_may_hold_any_character(processor: Processor) -> None:
    example = Example("x", (Image.new("RGB", (20, 20)),), "What is \0 in it?", "", None, "test")
    ids = processor.encode_prompt(example).input_ids.tolist()
    assert "What is \0 in it?" in processor.tokenizer.decode(ids)


@settings(deadline=None, max_examples=20)
@with_example(sizes=[(1, 3000), (3000, 1)], crop=True)  # as long and thin as they come
@given(sizes=st.lists(st.tuples(side, side), min_size=1, max_size=3), crop=st.booleans())
def test_internvl_counts_tiles_without_the_image(sizes: list[tuple[int, int]], crop: bool) -> None:
    class Settings:
        image_seq_length = 4

    images = GotOcr2ImageProcessorPil(size={"height": 56, "width": 56}, crop_to_patches=crop, max_patches=4)
    _, counts = InternVL().process_images(images, [Image.new("RGB", size) for size in sizes], Settings)
    assert [InternVL().count_image_tokens(images, *size, Settings) for size in sizes] == counts
