"""The configuration files that come with the project."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import GotOcr2ImageProcessorPil, Qwen2VLImageProcessorPil

from mrpo.backbones.base import shrunk_size
from mrpo.backbones.internvl import InternVL
from mrpo.backbones.qwen_vl import Qwen3VL, Qwen25VL
from mrpo.config import Config
from mrpo.settings import load_config

CONFIGS = Path(__file__).parent.parent / "configs"
QWEN_SIZES = {"shortest_edge": 3136, "longest_edge": 12_845_056}
PAPER = ("qwen2_5_vl_7b", "qwen3_vl_8b", "internvl3_8b")


def test_default_equals_the_defaults() -> None:
    assert load_config(CONFIGS / "default.yaml") == Config()


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_file_loads(file: Path) -> None:
    assert load_config(file, ["data.root=somewhere"]).output_dir == Path("runs") / file.stem


@pytest.mark.parametrize("name", PAPER)
def test_paper_settings(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml", ["data.root=somewhere"])
    gpus, per_device, accumulation = 4, 2, 8
    assert config.optim.batch_size == gpus * per_device * accumulation
    assert config.optim.micro_batch_size == per_device
    assert (config.rollout.max_tokens, config.rollout.group_size) == (512, 8)
    assert (config.optim.lr, config.loss.beta, config.advantage.tau) == (1e-6, 0.04, 0.6)
    assert (config.optim.steps, config.optim.epochs, config.optim.schedule) == (None, 1.0, "linear")
    assert (config.deepspeed.zero_stage, config.model.dtype) == (3, "bfloat16")
    assert config.update.checkpointing == "auto"
    assert config.data.max_image_pixels == 802_816
    assert config.judge.kind == "openai"


# As the checkpoints' preprocessor_config.json have them.
IMAGES = {
    "qwen2_5_vl_7b": (Qwen25VL(), Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size=QWEN_SIZES)),
    "qwen3_vl_8b": (Qwen3VL(), Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, size=QWEN_SIZES)),
    "internvl3_8b": (InternVL(), GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, crop_to_patches=False)),
}
# Instruction, chat template and a long question take about 40, 20 and 60 tokens.
TEXT_TOKENS = 120


@pytest.mark.parametrize("name", PAPER)
def test_the_largest_image_and_its_question_fit_the_prompt(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml", ["data.root=somewhere"])
    family, images = IMAGES[name]
    # Images of all shapes up to 8 : 1, far above the limit, so that they are scaled down to just below it. The
    # families round the sides to multiples of 28 or 32 pixels, which may make a larger picture of it again.
    sizes = [(3000 + step * 100, 3000) for step in range(211)]
    shrunk = [shrunk_size(size, config.data.max_image_pixels) for wide in sizes for size in (wide, wide[::-1])]
    tokens = max(family.count_image_tokens(images, *size, SimpleNamespace(image_seq_length=256)) for size in shrunk)
    assert tokens + TEXT_TOKENS <= config.prompt.max_tokens


def test_think_tags_are_the_families_own() -> None:
    tags = [load_config(CONFIGS / f"{name}.yaml", ["data.root=somewhere"]).model.think_tag for name in PAPER]
    assert tags == ["think", "thinking", "think"]
