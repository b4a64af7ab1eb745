"""Prepared data: one JSON object a line, the same for every data set, so that whatever was prepared can be trained on.

    {"id", "dataset", "split", "images", "root", "question", "answer", "rationale", "metadata"}

`images` are paths relative to `root`, an absolute folder, and stay below it; `root` null is the folder of the file
itself, so that a file and the pictures written beside it can move together. `rationale` is text or null.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from mrpo.data.reading import BadRow, ImageFinder, Missing, OnError, collect, read_json_lines, text
from mrpo.errors import UserError
from mrpo.pictures import Picture, shown_picture
from mrpo.records import Example

SPLITS = ("train", "validation", "test")


def read_prepared(
    file: Path, *, root: Path | None = None, on_error: OnError = "raise", missing: Missing = "error"
) -> tuple[Example, ...]:
    """The examples of a prepared file, in order; `metadata` gets the name of their `dataset`.

    `root` wins over the rows' own. Every row is checked and every image decoded; missing="allow" lets images be absent.

    Raises:
        UserError: the file is unreadable or has no usable row; with on_error="raise" also all bad rows at once: broken
            JSON, text that is not UTF-8, missing, unknown or wrong values, duplicate ids, and images that are missing,
            cannot be decoded or lie outside the root. "skip" leaves bad rows out and logs how many.
    """
    read_row = row_reader(file, root=root, missing=missing)
    examples = collect(read_lines(file), lambda row, number: read_row(row), file=file, on_error=on_error, id_key="id")
    if not examples:
        raise UserError(f"{file}: no usable row; `mrpo data prepare` writes such a file")
    return examples


def read_lines(file: Path) -> list[Any]:
    """The rows of a prepared file, unchecked; a line that is no JSON is a `BadRow`.

    Raises:
        UserError: the file is missing or unreadable.
    """
    return read_json_lines(file, hint="`mrpo data prepare` writes such a file")


def row_reader(file: Path, *, root: Path | None = None, missing: Missing = "error") -> Callable[[Any], Example]:
    """A function that makes the example of one row of `file`, or raises `BadRow` telling all that is wrong with it."""
    finder = cache(lambda folder: ImageFinder(folder, missing=missing))

    def read_row(row: Any) -> Example:
        values = _checked(row, lambda: finder(root or _root(row) or file.parent))
        metadata = values["metadata"] | {"dataset": values.pop("dataset")}
        return Example(**values | {"metadata": metadata})

    return read_row


def write_prepared(examples: Iterable[Example], file: Path, *, dataset: str, root: Path | None) -> None:
    """Writes `examples` as a prepared file, whole or not at all.

    Images that are paths must lie below `root` or the folder of `file`. Pictures in memory are written as PNG to the
    folder `image_folder(file)`. A `dataset` in an example's metadata wins over the argument.

    Raises:
        UserError: an image lies outside both folders, or the file cannot be written.
    """
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as lines:
            for number, example in enumerate(examples, start=1):
                row = _row(example, number, file, dataset=dataset, root=root)
                # A lone surrogate becomes \udXXX, which JSON reads back as the same.
                lines.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        os.replace(temporary, file)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def image_folder(file: Path) -> Path:
    """Where the pictures of a prepared file are written that come without a file of their own."""
    return file.with_name(f"{file.stem}_images")


def _root(row: Mapping[str, Any]) -> Path | None:
    value = row.get("root")
    if value is None:
        return None
    if not isinstance(value, str) or not os.path.isabs(value):
        raise BadRow(f'"root" is {json.dumps(value)[:60]}, expected an absolute folder or null')
    return Path(value)


def _checked(row: Mapping[str, Any], finder: Callable[[], ImageFinder]) -> dict[str, Any]:
    """The values of a row by the names of `Example`, and `dataset`; what is wrong with any of them is told together."""
    readers: dict[str, Callable[[], Any]] = {
        "id": lambda: text(row, "id"),
        "dataset": lambda: text(row, "dataset"),
        "split": lambda: _split(row),
        "images": lambda: _images(row, finder),
        "question": lambda: text(row, "question"),
        "answer": lambda: text(row, "answer", empty_ok=True),
        "rationale": lambda: text(row, "rationale") if row.get("rationale") is not None else None,
        "metadata": lambda: _metadata(row),
    }
    known = [*readers, "root"]
    problems = [f'unknown key "{key}"{_meant(key, known)}' for key in row if key not in known]
    values = {}
    for key, read in readers.items():
        try:
            values[key] = read()
        except BadRow as problem:
            problems.append(str(problem))
    if problems:
        raise BadRow("; ".join(problems))
    return values


def _meant(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f' (did you mean "{near[0]}"?)' if near else ""


def _split(row: Mapping[str, Any]) -> str:
    value = text(row, "split")
    if value not in SPLITS:
        raise BadRow(f'"split" is "{value[:60]}", expected one of {", ".join(SPLITS)}')
    return value


def _images(row: Mapping[str, Any], finder: Callable[[], ImageFinder]) -> tuple[Path, ...]:
    names = row.get("images")
    if "images" not in row:
        raise BadRow('"images" is missing')
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise BadRow(f'"images" is {json.dumps(names)[:60]}, expected a list of paths')
    find, found, problems = finder(), [], []
    for name in names:
        try:
            found.append(find(name))
        except BadRow as problem:
            problems.append(str(problem))
    if problems:
        raise BadRow("; ".join(problems))
    return tuple(found)


def _metadata(row: Mapping[str, Any]) -> dict[str, Any]:
    value = row.get("metadata", {})
    if not isinstance(value, dict):
        raise BadRow(f'"metadata" is {json.dumps(value)[:60]}, expected an object')
    return value


def _row(example: Example, number: int, file: Path, *, dataset: str, root: Path | None) -> dict[str, Any]:
    images, folder = _relative(_on_disk(example.images, number, file), file, root, example.id)
    return {
        "id": example.id,
        "dataset": example.metadata.get("dataset", dataset),
        "split": example.split,
        "images": images,
        "root": folder,
        "question": example.question,
        "answer": example.answer,
        "rationale": example.rationale,
        "metadata": {key: value for key, value in example.metadata.items() if key != "dataset"},
    }


def _on_disk(images: tuple[Picture, ...], number: int, file: Path) -> list[Path]:
    """The paths of the images, all pictures beside `file` as shown if one is in memory: a row has one root."""
    if all(isinstance(image, Path) for image in images):
        return [image for image in images if isinstance(image, Path)]
    folder = image_folder(file).resolve()
    folder.mkdir(exist_ok=True)
    paths = []
    for place, image in enumerate(images):
        path = folder / f"{number:06d}{f'-{place}' if place else ''}.png"
        shown_picture(image).save(path)
        paths.append(path)
    return paths


def _relative(paths: list[Path], file: Path, root: Path | None, name: str) -> tuple[list[str], str | None]:
    """The paths relative to the folder that holds them all, and that folder; None is the one of `file`."""
    folders: list[tuple[Path, str | None]] = [(file.parent.resolve(), None)]
    if root is not None:
        folders.insert(0, (root.resolve(), str(root.resolve())))
    for folder, written in folders:
        if all(path.is_relative_to(folder) for path in paths):
            return [str(path.relative_to(folder)) for path in paths], written
    raise UserError(f"{name}: image {paths[0]} must lie below {' or '.join(str(folder) for folder, _ in folders)}")
