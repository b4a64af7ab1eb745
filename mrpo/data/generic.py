"""Your own data: rows of `{image | images, problem | question, solution | answer, rationale?, id?, split?}`.

The rows come from a JSON list, JSON lines, Parquet, a folder of such files, a folder that `datasets` saved to disk, or
the Hugging Face hub. An image is a path, bytes, or the `{"bytes", "path"}` of a `datasets` image column. Where a row
has an answer and a solution but no rationale, the solution is the rationale; the tags `<think>` and `<answer>` around a
whole text, and `<image>` placeholders in the question, are taken off.

A row without a split belongs to the one that its file is named after (`test.jsonl`, `train-00000-of-00002.parquet`), or
else to `train`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from PIL import Image

from mrpo.data.reading import (
    BadRow,
    BadRows,
    ImageFinder,
    ReadOptions,
    Split,
    collect,
    is_open_ended,
    read_json_lines,
    read_json_list,
    text,
)
from mrpo.data.tables import ImageStore, read_shards
from mrpo.errors import UserError
from mrpo.records import Example

SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".arrow")

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SHARD = re.compile(r"(^|/)data-\d{5}-of-\d{5}$|-\d{5}-of-\d{5}$")
_TAGS = re.compile(r"<(think|thinking|answer)>(.*)</\1>", re.DOTALL)
_KNOWN = ("image", "images", "problem", "question", "solution", "answer", "rationale", "id", "split")


@dataclass(frozen=True)
class Table:
    """Rows that are numbered together: those of one file, or of one split at the hub."""

    place: Path
    name: str
    split: Split
    rows: Iterable[Any]


def load_generic(source: Path, *, root: Path | None = None, **options: Unpack[ReadOptions]) -> tuple[Example, ...]:
    """The questions of all splits, in order; closed ones too unless `questions="open"` is asked for.

    Args:
        source: a file, a folder, or `OWNER/NAME` at the hub.
        root: the folder that image paths are relative to and must not leave; default: `source` or the folder it is in.

    `Example.id` is the row's `id`, with the table's name before it where there are several; without one it is
    `NAME/ROW`. Other columns that hold text, numbers or booleans become metadata.

    Raises:
        UserError: there is no such source, it is unreadable, or has no usable row; with on_error="raise" also all bad
            rows of all files at once. "skip" leaves them out and logs how many.
    """
    tables = list(_tables(source))
    find = ImageFinder(root or image_root(source), missing=options.get("missing", "error"))
    images = RowImages(find, options.get("image_folder"))
    examples: list[Example] = []
    problems: list[BadRows] = []
    for table in tables:
        read_row = _row_reader(table, images, options, several=len(tables) > 1)
        try:
            examples += collect(table.rows, read_row, file=table.place, on_error=options.get("on_error", "raise"))
        except BadRows as error:
            problems.append(error)
    if problems:
        raise problems[0] if len(problems) == 1 else UserError("\n".join(map(str, problems)))
    if not examples:
        raise UserError(f"{source}: no usable row with question and answer")
    return tuple(examples)


def image_root(source: Path) -> Path:
    """The folder that image paths are relative to where none is named."""
    return source if source.is_dir() else source.parent


class RowImages:
    """The images of a row: paths below the root, and bytes that are kept by an `ImageStore`."""

    def __init__(self, find: ImageFinder, store_folder: Path | None) -> None:
        self._find, self._store = find, ImageStore(store_folder)

    def __call__(self, row: Mapping[str, Any]) -> tuple[Path | Image.Image, ...]:
        key = "images" if row.get("images") is not None or "image" not in row else "image"
        if key not in row:
            raise BadRow('"image" is missing (null for a question without one)')
        value = row[key]
        cells = [] if value is None else value if isinstance(value, list) else [value]
        return tuple(self._one(cell, key) for cell in cells)

    def _one(self, cell: Any, key: str) -> Path | Image.Image:
        if isinstance(cell, Mapping) and cell.get("bytes") is None:
            cell = cell.get("path")
        if isinstance(cell, str) and cell:
            return self._find(cell)
        if not isinstance(cell, bytes | Mapping):
            raise BadRow(f'"{key}" is {str(cell)[:60]!r}, expected a path, or bytes from Parquet or `datasets`')
        return self._store({key: cell}, key)[0]


def _row_reader(
    table: Table, images: RowImages, options: ReadOptions, *, several: bool
) -> Callable[[dict[str, Any], int], Example | None]:
    first_row: dict[str, int] = {}

    def read_row(row: dict[str, Any], number: int) -> Example | None:
        name = _text_of(row, "id", integer_ok=True) or f"{table.name}/{number}"
        if first_row.setdefault(name, number) != number:
            raise BadRow(f'"id" {name} is already used in row {first_row[name]}')
        question = re.sub(r"\s*<image>\s*", " ", _required(row, "question", "problem")).strip()
        if not question:
            raise BadRow('"question" is empty')
        answer = _untagged(_required(row, "answer", "solution", integer_ok=True))
        rationale = _text_of(row, "rationale")
        if rationale is None and row.get("answer") is not None:
            rationale = _text_of(row, "solution")
        is_open = is_open_ended(answer)
        if options.get("questions") == "open" and not is_open:
            return None
        return Example(
            id=f"{table.name}/{name}" if several and row.get("id") is not None else name,
            images=images(row),
            question=question,
            answer=answer,
            rationale=None if rationale is None else _untagged(rationale),
            split=_split_of(row, table.split),
            metadata={key: value for key, value in row.items() if key not in _KNOWN and _is_plain(value)}
            | ({} if is_open else {"open_ended": False}),
        )

    return read_row


def _text_of(row: Mapping[str, Any], key: str, *, integer_ok: bool = False) -> str | None:
    return None if row.get(key) is None else text(row, key, integer_ok=integer_ok)


def _required(row: Mapping[str, Any], key: str, other: str, *, integer_ok: bool = False) -> str:
    """The text under `key`, or under `other` where that has none."""
    if row.get(key) is None and row.get(other) is not None:
        key = other
    if key not in row:
        raise BadRow(f'"{key}" (or "{other}") is missing')
    return text(row, key, integer_ok=integer_ok)


def _untagged(value: str) -> str:
    whole = _TAGS.fullmatch(value)
    inside = whole[2].strip() if whole else value
    if not inside:
        raise BadRow(f"{value!r} has nothing inside its tags")
    return inside


def _split_of(row: Mapping[str, Any], default: Split) -> Split:
    value = _text_of(row, "split")
    if value is not None and value.lower() not in SPLIT_NAMES:
        raise BadRow(f'"split" is {value[:60]!r}, expected one of {", ".join(SPLIT_NAMES)}')
    return default if value is None else SPLIT_NAMES[value.lower()]


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))


def _tables(source: Path) -> Iterator[Table]:
    if source.is_dir():
        yield from _folder_tables(source)
    elif source.is_file():
        yield _file_table([source], source.stem)
    elif _HUB_ID.fullmatch(str(source)):
        yield from _hub_tables(str(source))
    else:
        raise UserError(f"{source}: no such file or folder, and no OWNER/NAME of the Hugging Face hub")


def _folder_tables(source: Path) -> Iterator[Table]:
    """One table a file, the shards of one (`train-00000-of-00002`, `train/data-00000-of-00001`) together."""
    tables: dict[str, list[Path]] = {}
    for file in sorted(file for file in source.rglob("*") if _is_rows(file, source)):
        name = _SHARD.sub("", file.relative_to(source).with_suffix("").as_posix()) or source.name
        tables.setdefault(name + file.suffix, []).append(file)
    if not tables:
        raise UserError(f"{source} holds no rows: no {', '.join(SUFFIXES)} file")
    stems = Counter(name.removesuffix(files[0].suffix) for name, files in tables.items())
    for name, files in tables.items():
        stem = name.removesuffix(files[0].suffix)
        yield _file_table(files, stem if stems[stem] == 1 else name)  # train.json and train.jsonl are two


def _is_rows(file: Path, source: Path) -> bool:
    """Whether a file of a folder holds rows, and not what `datasets` writes beside them."""
    beside = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
    hidden = any(part.startswith(".") for part in file.relative_to(source).parts)
    is_cache = file.name in beside or (file.suffix == ".arrow" and file.name.startswith("cache-"))
    return file.suffix in SUFFIXES and not is_cache and not hidden and file.is_file()


def _file_table(files: list[Path], name: str) -> Table:
    file = files[0]
    match file.suffix:
        case ".json":
            rows: Iterable[Any] = read_json_list(file)
        case ".jsonl" | ".ndjson":
            rows = read_json_lines(file)
        case ".parquet" | ".arrow":
            rows = read_shards(files)
        case suffix:
            raise UserError(f"{file}: rows are read from {', '.join(SUFFIXES)} files, not {suffix or 'such a file'}")
    words = [word for part in reversed(name.lower().split("/")) for word in re.split(r"[^a-z]+", part)]
    split: Split = next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "train")
    return Table(file if len(files) == 1 else file.with_name(f"*{file.suffix}"), name, split, rows)


def _hub_tables(name: str) -> Iterator[Table]:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name}: no such file; from the Hugging Face hub it needs pip install mrpo[data]") from None
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # no network, no such data set, no access, several configurations, broken files, ...
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"{name}: no such file, and the Hugging Face hub does not give it: {lines[0]}") from None
    for split, table in loaded.items():
        rows = (row for batch in table.with_format("arrow").iter(batch_size=64) for row in batch.to_pylist())
        yield Table(Path(name) / split, split, SPLIT_NAMES.get(split, "train"), rows)
