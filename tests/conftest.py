"""What several tests share: a tiny random policy; GPU tests skip without one."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# How long an example takes says nothing on a busy machine.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Before anyone imports triton: without a GPU its kernels are tested under its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Before any model is built: two busy threads on two cores make tiny models many times slower.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Qwen3-VL of about a million parameters."""
    from mrpo.backbones.tiny import build_tiny

    folder = tmp_path_factory.mktemp("tiny")
    build_tiny(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """From the name of a family to a folder with a random model of it; see tiny_models."""
    from tiny_models import build_tiny_model

    return cache(lambda family: build_tiny_model(family, tmp_path_factory.mktemp(family)))
