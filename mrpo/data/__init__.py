"""Data sets: each gives `Example`s, chosen by `data.name`. A new one is a file here and a line in `SPLITS`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from mrpo.config import DataConfig
from mrpo.errors import UserError
from mrpo.records import Example

if TYPE_CHECKING:
    from mrpo.data.reading import ReadOptions, Split

# Published data sets and the splits that they may have; `mrpo.data.NAME.load_NAME(root, split)` reads one.
SPLITS: dict[str, tuple[Split, ...]] = {
    "vqa_rad": ("train", "test"),
    "slake": ("train", "validation", "test"),
    "path_vqa": ("train", "validation", "test"),
    "pmc_vqa": ("train", "validation", "test"),
    "vqa_med": ("train", "validation", "test"),
    "quilt_vqa": ("test",),
    "rad_vqa": ("test",),
    "mimic_vqa": ("train", "validation", "test"),
}

# Phantom makes questions without end; these sizes stand for "all" where the config names none.
PHANTOM_TRAIN_SIZE = 20_000
PHANTOM_EVAL_SIZE = 1_000


def load_dataset(config: DataConfig, split: Split) -> Sequence[Example]:
    """The questions of one split, at most `train_size` for training and `eval_size` for validation and test.

    Where there is no validation split, `validation` is the test split; prepared and generic data that have no test
    split are tested on validation.

    Raises:
        UserError: files are missing or broken; see the loader of the data set.
    """
    if config.name == "phantom":
        return _phantom(config, split)
    examples = (_own if config.name in ("prepared", "generic") else _published)(config, split)
    examples = _answered(examples, config)
    return examples[: config.train_size if split == "train" else config.eval_size]


def load_published(name: str, root: Path, split: Split, **options: Unpack[ReadOptions]) -> tuple[Example, ...]:
    """One split of one of the data sets in `SPLITS`.

    Raises:
        UserError: see its loader.
    """
    load = getattr(importlib.import_module(f"mrpo.data.{name}"), f"load_{name}")
    examples: tuple[Example, ...] = load(root, split, **options)
    return examples


def _answered(examples: tuple[Example, ...], config: DataConfig) -> tuple[Example, ...]:
    """The questions that have an answer; SLAKE has one that lacks it."""
    unanswered = [example.id for example in examples if not example.answer.strip()]
    if unanswered and config.on_error == "raise":
        raise UserError(
            f"data.name={config.name}: {len(unanswered)} questions have no answer ({', '.join(unanswered[:5])}); "
            "data.on_error=skip leaves them out"
        )
    return tuple(example for example in examples if example.answer.strip())


def _phantom(config: DataConfig, split: Split) -> Sequence[Example]:
    from mrpo.data.phantom import PhantomDataset

    if split == "train":
        size = config.train_size or PHANTOM_TRAIN_SIZE
        return PhantomDataset(
            split, size=size, seed=config.seed, corruption=config.corruption, look=config.phantom_look
        )
    size = config.eval_size or PHANTOM_EVAL_SIZE
    return PhantomDataset(split, size=size, seed=config.seed, look=config.phantom_look)


def _published(config: DataConfig, split: Split) -> tuple[Example, ...]:
    if config.root is None:
        raise UserError(f"data.root must name the folder of {config.name}'s files")
    if split not in SPLITS[config.name]:
        if split == "train":
            raise UserError(f"data.name={config.name} has no training questions: evaluate on it, train on another")
        split = "test"
    examples = load_published(config.name, config.root, split, on_error=config.on_error)
    if config.gold is not None:
        from mrpo.data.medthink import load_gold

        examples = load_gold(config.gold, config.name, on_error=config.on_error).explain(examples)
    return examples


def _own(config: DataConfig, split: Split) -> tuple[Example, ...]:
    """Prepared or generic rows: `file` for training, for evaluation `eval_file` where there is one."""
    file = config.file if split == "train" else config.eval_file or config.file
    if file is None:
        raise UserError(f"data.file must name the questions of data.name={config.name}")
    if config.name == "prepared":
        from mrpo.data.prepared import read_prepared

        examples = read_prepared(file, root=config.root, on_error=config.on_error)
    else:
        from mrpo.data.generic import load_generic

        examples = load_generic(file, root=config.root, on_error=config.on_error)
    # Without a split of its own, validation uses the test questions and the test the validation questions.
    wanted = ("train",) if split == "train" else (split, "test", "validation")
    for name in wanted:
        if chosen := tuple(example for example in examples if example.split == name):
            return chosen
    if split == "train":
        raise UserError(f"{file} has no questions of the train split")
    if config.eval_file is None:
        hint = "name other questions in data.eval_file"
    elif config.name == "generic":
        hint = 'give its rows "split": "test", or name the file test.jsonl'
    else:
        hint = "prepare a file of them with mrpo data prepare --split test"
    raise UserError(
        f"{file} has no questions of the test or validation split: {hint}, or leave the evaluation out with "
        "eval.at_start=false eval.at_end=false eval.every=0"
    )
