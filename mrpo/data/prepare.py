"""From a data set's own files to one prepared file, with counts of what is in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Literal

from PIL import Image

from mrpo.data import PHANTOM_EVAL_SIZE, PHANTOM_TRAIN_SIZE, SPLITS, load_published
from mrpo.data.generic import image_root, load_generic
from mrpo.data.hub import data_folder
from mrpo.data.medthink import load_gold
from mrpo.data.phantom import PhantomDataset
from mrpo.data.prepared import image_folder, write_prepared
from mrpo.data.reading import Missing, MissingFile, OnError, ReadOptions, Split
from mrpo.errors import UserError
from mrpo.records import Example

ALL_SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Order:
    """What to prepare.

    name: `phantom`, `generic` or a data set of `mrpo.data.SPLITS`. root: the folder of its files, or where to download
    them from the hub; for `generic` the one of its images, if another than that of `source`, which holds the rows.
    splits: default all that are there. questions: open-ended ones or all. gold: MedThink's folder. size, seed: of
    `phantom`, questions in each split and seed. dataset: what rows and tables call it; default: `name`, for `generic`
    the name of `source`.
    """

    name: str
    root: Path | None = None
    source: Path | None = None
    splits: tuple[Split, ...] = ()
    questions: Literal["open", "all"] = "open"
    on_error: OnError = "raise"
    gold: Path | None = None
    size: int | None = None
    seed: int = 0
    dataset: str | None = None

    def wants(self, example: Example) -> bool:
        return self.questions == "all" or _is_open_ended(example)


@dataclass
class Counts:
    """What was read and what of it was written.

    total, open_ended: questions read. written: questions kept. distinct: those that differ in image, question or
    answer, white space and case folded. with_gold: kept ones with a rationale. images, missing_images: pictures that
    the kept ones use, and those of them whose file is not there.
    """

    total: int = 0
    open_ended: int = 0
    written: int = 0
    distinct: int = 0
    with_gold: int = 0
    images: int = 0
    missing_images: int = 0
    _seen: set[object] = field(default_factory=set, repr=False)

    def add(self, example: Example, images: Sequence[Path | str], *, kept: bool) -> None:
        """Counts a question whose images are these paths, or digests of pictures in memory."""
        self.total += 1
        self.open_ended += _is_open_ended(example)
        if not kept:
            return
        self.written += 1
        self.with_gold += bool(example.rationale)
        self.distinct += self._is_new((tuple(images), _folded(example.question), _folded(example.answer)))
        for image in images:
            if self._is_new(image):
                self.images += 1
                self.missing_images += isinstance(image, Path) and not image.exists()

    def as_dict(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def _is_new(self, key: object) -> bool:
        new = key not in self._seen
        self._seen.add(key)
        return new


def prepare(order: Order, file: Path) -> dict[str, Counts]:
    """Writes the prepared file; returns the counts by split, and over all under "total".

    Images that are all missing are only counted: question files are often published without them. Where some are
    there, a missing one is a bad row.

    Raises:
        UserError: the order does not fit the data set, files are missing or broken, or no question is left; with
            on_error="raise" also bad rows, all at once.
    """
    _check(order, file)
    if order.name in SPLITS:
        order = replace(order, root=data_folder(order.name, order.root))
    parts = _read(order, file, "allow")
    counts = count(chain.from_iterable(parts), order)
    if 0 < counts["total"].missing_images < counts["total"].images:
        parts = _read(order, file, "error")
        counts = count(chain.from_iterable(parts), order)
    if not counts["total"].written:
        raise UserError(f"{order.source or order.root}: no open-ended question; --questions all keeps the others, too")
    kept = (example for example in chain.from_iterable(parts) if order.wants(example))
    if order.name == "generic":
        source = _required(order.source, "--file")
        write_prepared(kept, file, dataset=order.dataset or _name(source), root=order.root or image_root(source))
    else:
        write_prepared(kept, file, dataset=order.dataset or order.name, root=order.root)
    return counts


def count(examples: Iterable[Example], order: Order) -> dict[str, Counts]:
    """Counts by split, and over all under "total"."""
    counts: dict[str, Counts] = {}
    total = Counts()
    for example in examples:
        images = [image if isinstance(image, Path) else _digest(image) for image in example.images]
        for one in (counts.setdefault(example.split, Counts()), total):
            one.add(example, images, kept=order.wants(example))
    return counts | {"total": total}


def _check(order: Order, file: Path) -> None:
    if order.name in SPLITS and (absent := set(order.splits) - set(SPLITS[order.name])):
        raise UserError(f"{order.name} has no {absent.pop()} split; it has {', '.join(SPLITS[order.name])}")
    if order.size is not None and order.name != "phantom":
        raise UserError(f"--size is for phantom; {order.name} has the questions of its files")
    if order.source is not None and order.name != "generic":
        raise UserError(f"--file is for generic; {order.name} has its own files, in --root")
    if order.source is not None and file.resolve().is_relative_to(order.source.resolve()):
        raise UserError(f"--out {file} would be read as a part of --file {order.source}; write it elsewhere")
    if order.gold is not None and order.name not in SPLITS:
        raise UserError(f"--gold: MedThink has no rationales for {order.name}")


def _read(order: Order, file: Path, missing: Missing) -> list[Sequence[Example]]:
    options: ReadOptions = {
        "on_error": order.on_error,
        "missing": missing,
        "questions": "all",
        "image_folder": image_folder(file),
    }
    if order.name == "phantom":
        return [_phantom(order, split) for split in order.splits or ALL_SPLITS]
    if order.name == "generic":
        examples = load_generic(_required(order.source, "--file"), root=order.root, **options)
        return [[example for example in examples if not order.splits or example.split in order.splits]]
    parts = list(_published(order, _required(order.root, "--root"), options))
    if order.gold is None:
        return parts
    gold = load_gold(order.gold, order.name, on_error=order.on_error)
    return [gold.explain(part) for part in parts]


def _phantom(order: Order, split: Split) -> Sequence[Example]:
    size = PHANTOM_TRAIN_SIZE if split == "train" else PHANTOM_EVAL_SIZE
    return PhantomDataset(split, size=size if order.size is None else order.size, seed=order.seed)


def _published(order: Order, root: Path, options: ReadOptions) -> Iterator[Sequence[Example]]:
    """The splits asked for, or else those whose files are there."""
    absent: list[MissingFile] = []
    splits = order.splits or SPLITS[order.name]
    for split in splits:
        try:
            yield load_published(order.name, root, split, **options)
        except MissingFile as error:
            absent.append(error)
            if order.splits or len(absent) == len(splits):
                raise absent[0] from None


def _required(path: Path | None, option: str) -> Path:
    if path is None:
        raise UserError(f"{option} must name what to read")
    return path


def _name(source: Path) -> str:
    return source.stem if source.is_file() else source.name


def _is_open_ended(example: Example) -> bool:
    """Loaders mark the questions that are not."""
    return bool(example.metadata.get("open_ended", True))


def _digest(image: Image.Image) -> str:
    return hashlib.md5(image.tobytes(), usedforsecurity=False).hexdigest()


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()
