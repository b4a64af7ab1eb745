"""Prompts that a run cannot use are refused by name before it begins."""

from __future__ import annotations

import threading
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


def test_no_threads_are_left(processor: Processor) -> None:
    before = threading.active_count()
    check_prompt_lengths([_example(str(i), 1) for i in range(400)], processor)
    assert threading.active_count() == before
