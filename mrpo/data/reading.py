"""What the loaders share: reading a file, finding its images, and turning its rows into examples or reported problems.

A problem of one row is a `BadRow`; `collect` gathers them, so that everything wrong with a file shows at once. What is
wrong with a whole file is a `UserError`.
"""

from __future__ import annotations

import codecs
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypedDict

from mrpo.errors import UserError
from mrpo.pictures import open_image, shown_picture
from mrpo.records import Example

OnError = Literal["raise", "skip"]
Missing = Literal["error", "allow"]
Split = Literal["train", "validation", "test"]

_log = logging.getLogger(__name__)


class BadRow(Exception):
    """What is wrong with one row."""


class BadRows(UserError):
    """The bad rows of one file; `problems` are "row N: what is wrong" in order."""

    def __init__(self, file: Path, problems: Sequence[str]) -> None:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"{file}: {len(problems)} bad rows (on_error=skip leaves them out):\n{listed}")
        self.file, self.problems = file, tuple(problems)


class MissingFile(UserError):
    """A file that a data set needs is not there."""


class ReadOptions(TypedDict, total=False):
    """Keywords that every loader takes.

    on_error: "raise" (default) reports all bad rows as one UserError, "skip" leaves them out and logs how many.
    missing: "error" (default) counts a row without its image as bad, "allow" keeps it with the path it should have.
    questions: "open" (default) keeps open-ended questions only, and a closed one then needs no image; "all" keeps all.
    image_folder: images stored inside a table are written there, named by their MD5; default: they stay in memory.
    """

    on_error: OnError
    missing: Missing
    questions: Literal["open", "all"]
    image_folder: Path


def is_open_ended(answer: str) -> bool:
    """Whether the answer is neither yes nor no."""
    return answer.strip().lower().rstrip(".") not in ("yes", "no")


def read_bytes(file: Path, *, hint: str = "") -> bytes:
    """The content of a file.

    Raises:
        MissingFile: it is not there (`hint` is added: what should be there).
        UserError: it is unreadable.
    """
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise MissingFile(f"{file} not found" + (f": {hint}" if hint else "")) from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None


def read_text(file: Path, *, hint: str = "") -> str:
    """The text of a UTF-8 file, a byte order mark removed.

    Raises:
        UserError: as `read_bytes`, or the file is not UTF-8.
    """
    try:
        return read_bytes(file, hint=hint).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text at byte {error.start}") from None


def read_json(file: Path, *, hint: str = "") -> Any:
    """The value of a JSON file.

    Raises:
        UserError: as `read_text`, or the file is not JSON; then with line and column.
    """
    try:
        return json.loads(read_text(file, hint=hint))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable as JSON: {error}") from None


def read_json_list(file: Path, *, hint: str = "") -> list[Any]:
    """The rows of a JSON file that holds a list.

    Raises:
        UserError: as `read_json`, or the value is no list.
    """
    rows = read_json(file, hint=hint)
    if not isinstance(rows, list):
        raise UserError(f"{file}: expected a list of questions, got {type(rows).__name__}")
    return rows


def read_json_lines(file: Path, *, hint: str = "") -> list[Any]:
    """The value of each line of a JSON-lines file; a line that cannot be read is a `BadRow`, for `collect` to report.

    Raises:
        UserError: as `read_bytes`.
    """
    content = read_bytes(file, hint=hint).removeprefix(codecs.BOM_UTF8)
    return [_line_value(line) for line in content.splitlines()]


def _line_value(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 text at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return BadRow(f"not valid JSON: column {error.colno}: {error.msg}")
    except (ValueError, RecursionError) as error:
        return BadRow(f"not readable as JSON: {error}")


def text(row: Mapping[str, Any], key: str, *, integer_ok: bool = False, empty_ok: bool = False) -> str:
    """The text under `key` without surrounding white space; with `integer_ok` an integer is written out.

    Raises:
        BadRow: it is missing, of another type, empty, or not writable as UTF-8.
    """
    value = row.get(key)
    if integer_ok and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if key not in row:
        raise BadRow(f'"{key}" is missing')
    if not isinstance(value, str):
        wanted = "text or an integer" if integer_ok else "text"
        raise BadRow(f'"{key}" is {json.dumps(value, default=repr)[:60]}, expected {wanted}')
    if not value.strip() and not empty_ok:
        raise BadRow(f'"{key}" is empty')
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise BadRow(f'"{key}" is not valid Unicode: {value[:60]!a} has half of a surrogate pair')
    return value.strip()


def collect(
    rows: Iterable[Any],
    read_row: Callable[[dict[str, Any], int], Example | None],
    *,
    file: Path,
    on_error: OnError = "raise",
    id_key: str | None = None,
) -> tuple[Example, ...]:
    """The examples that `read_row(row, number)` makes of `rows`, in order; None leaves a row out without a word.

    Rows count from 1. A row is a problem that is no object or a `BadRow` itself, that `read_row` refuses with `BadRow`,
    or whose value under `id_key` was used before. Problems are raised all at once, or with "skip" left out and logged.

    Raises:
        BadRows: on_error="raise" and there are problems; one line each, with its row number.
    """
    examples: list[Example] = []
    problems: list[str] = []
    first_row: dict[str, int] = {}
    number = 0
    for number, row in enumerate(rows, start=1):
        try:
            if isinstance(row, BadRow):
                raise row
            if not isinstance(row, dict):
                raise BadRow(f"expected an object, got {type(row).__name__}")
            example = read_row(row, number)
            if id_key is not None and first_row.setdefault(str(row.get(id_key)), number) != number:
                value = row.get(id_key)
                raise BadRow(f'"{id_key}" {value} is already used in row {first_row[str(value)]}')
        except BadRow as problem:
            problems.append(f"row {number}: {problem}")
            continue
        if example is not None:
            examples.append(example)
    if problems and on_error == "raise":
        raise BadRows(file, problems)
    if problems:
        _log.warning("%s: skipped %d of %d rows, the first for: %s", file, len(problems), number, problems[0])
    return tuple(examples)


def of_split(examples: Iterable[Example], split: Split, *, file: Path) -> tuple[Example, ...]:
    """The examples of one split.

    Raises:
        UserError: there are none.
    """
    chosen = tuple(example for example in examples if example.split == split)
    if not chosen:
        raise UserError(f"{file}: no usable open-ended question in the {split} split")
    return chosen


class ImageFinder:
    """From an image's name to its real path below `root`, looked for in each of `folders` in turn.

    Every image is decoded once, so that a broken one shows before a run starts. With missing="allow" a name that is in
    no folder gives the path it should have in the first.
    """

    def __init__(self, root: Path, *folders: str, missing: Missing = "error") -> None:
        self.root = root
        self.folders = folders or (".",)
        self.missing = missing
        self._real_root = root.resolve()
        self._check = cache(self._find)

    def __call__(self, name: str) -> Path:
        """The path of the image called `name`.

        Raises:
            BadRow: it is missing, cannot be decoded, or lies outside the root (links followed).
        """
        found = self._check(name)
        if isinstance(found, str):
            raise BadRow(found)
        return found

    def _find(self, name: str) -> Path | str:
        for folder in self.folders:
            try:
                path = (self._real_root / folder / name).resolve()
                exists = path.exists()
            except (OSError, RuntimeError, ValueError) as error:
                return f"image {name!r}: {error}"
            if not path.is_relative_to(self._real_root):
                return f"image {name!r} lies outside {self.root}"
            if exists:
                problem = decode_problem(path)
                shown = self.root / folder / name
                return path if problem is None else f"image {shown} cannot be decoded: {problem}"
        expected = self._real_root / self.folders[0] / name
        return expected if self.missing == "allow" else f"image {self.root / self.folders[0] / name} not found"


def decode_problem(file: Path | BinaryIO) -> str | None:
    """Why the image cannot be shown, or None. `Image.verify` lets a truncated JPEG pass, so it is really decoded."""
    try:
        with open_image(file) as image:
            image.draft("L", (image.width // 8, image.height // 8))  # a JPEG is decoded at an eighth: much faster
            shown_picture(image)
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        return str(error) or type(error).__name__
    return None
