"""Data sets: each gives `Example`s, chosen by `data.name`. A new one is a function here and a file beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from mrpo.config import DataConfig
from mrpo.errors import UserError
from mrpo.records import Example

Split = Literal["train", "validation", "test"]

# Phantom makes questions without end; these sizes stand for "all" where the config names none.
PHANTOM_TRAIN_SIZE = 20_000
PHANTOM_EVAL_SIZE = 1_000


def load_dataset(config: DataConfig, split: Split) -> Sequence[Example]:
    """The questions of one split, at most `train_size` for training and `eval_size` for validation and test.

    VQA-RAD has no validation split: there `validation` is the test split, which evaluation uses throughout.

    Raises:
        UserError: files are missing or broken; see the loader of the data set.
    """
    return _LOADERS[config.name](config, split)


def _load_phantom(config: DataConfig, split: Split) -> Sequence[Example]:
    from mrpo.data.phantom import PhantomDataset

    if split == "train":
        size = config.train_size or PHANTOM_TRAIN_SIZE
        return PhantomDataset(split, size=size, seed=config.seed, corruption=config.corruption)
    return PhantomDataset(split, size=config.eval_size or PHANTOM_EVAL_SIZE, seed=config.seed)


def _load_vqa_rad(config: DataConfig, split: Split) -> Sequence[Example]:
    from mrpo.data.vqa_rad import load_vqa_rad

    if config.root is None:
        raise UserError("data.root must name the folder of vqa_rad's files")
    examples = load_vqa_rad(config.root, "train" if split == "train" else "test", on_error=config.on_error)
    return examples[: config.train_size if split == "train" else config.eval_size]


_LOADERS: dict[str, Callable[[DataConfig, Split], Sequence[Example]]] = {
    "phantom": _load_phantom,
    "vqa_rad": _load_vqa_rad,
}
