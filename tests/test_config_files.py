"""The configuration files that come with the project."""

from __future__ import annotations

from pathlib import Path

import pytest

from mrpo.config import Config
from mrpo.settings import load_config

CONFIGS = Path(__file__).parent.parent / "configs"
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
    assert (config.prompt.max_tokens, config.rollout.max_tokens, config.rollout.group_size) == (1024, 512, 8)
    assert (config.optim.lr, config.loss.beta, config.advantage.tau) == (1e-6, 0.04, 0.6)
    assert (config.optim.steps, config.optim.epochs) == (None, 1.0)
    assert (config.deepspeed.zero_stage, config.model.dtype) == (3, "bfloat16")
    assert config.update.checkpointing == "auto"
    assert config.data.max_image_pixels == 802_816
    assert config.judge.kind == "openai"


def test_think_tags_are_the_families_own() -> None:
    tags = [load_config(CONFIGS / f"{name}.yaml", ["data.root=somewhere"]).model.think_tag for name in PAPER]
    assert tags == ["think", "thinking", "think"]
