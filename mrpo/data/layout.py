"""How the rows of a published data set become examples: the part that all loaders share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from mrpo.data.reading import ImageFinder, ReadOptions, Split, collect, is_open_ended, of_split, text
from mrpo.data.tables import ImageStore
from mrpo.records import Example

Row = Mapping[str, Any]
FindImage = Callable[[Row], tuple[Path | Image.Image, dict[str, Any]]]
"""From a row to its image and what is to be remembered of it in the example's metadata."""


@dataclass(frozen=True)
class Layout:
    """Which keys of a row hold what.

    dataset: first part of every id. question: key of the question. answer: the gold answer of a row. belongs: whether
    the row is of this set at all. is_open: whether a row with that answer is open-ended. metadata: from a name in the
    example's metadata to the key of its value, left out where a row has none. id_key: key of the row's own id; without
    one the split and the row's number make the id. split_of: the split of a row, where a file holds several.
    """

    dataset: str
    question: str = "question"
    answer: Callable[[Row], str] = lambda row: text(row, "answer", integer_ok=True)
    belongs: Callable[[Row], bool] = lambda row: True
    is_open: Callable[[Row, str], bool] = lambda row, answer: is_open_ended(answer)
    metadata: Mapping[str, str] = field(default_factory=dict)
    id_key: str | None = None
    split_of: Callable[[Row], Split] | None = None

    def read(
        self, rows: Iterable[Any], split: Split, find_image: FindImage, *, file: Path, options: ReadOptions
    ) -> tuple[Example, ...]:
        """The examples of one split's rows, in order; `file` is named where something is wrong.

        Raises:
            UserError: with on_error="raise" all bad rows at once; no usable question.
        """
        wanted = options.get("questions", "open")

        def read_row(row: dict[str, Any], number: int) -> Example | None:
            if not self.belongs(row):
                return None
            name = f"{split}/{number}" if self.id_key is None else text(row, self.id_key, integer_ok=True)
            question, answer = text(row, self.question), self.answer(row)
            part = self.split_of(row) if self.split_of is not None else split
            is_open = self.is_open(row, answer)
            if wanted == "open" and not is_open:
                return None
            image, known = find_image(row)
            known |= {name: row[key] for name, key in self.metadata.items() if row.get(key) is not None}
            if not is_open:
                known["open_ended"] = False
            return Example(f"{self.dataset}/{name}", (image,), question, answer, None, part, known)

        on_error = options.get("on_error", "raise")
        return of_split(collect(rows, read_row, file=file, on_error=on_error, id_key=self.id_key), split, file=file)


def named_image(key: str, root: Path, *folders: str, options: ReadOptions, suffix: str = "") -> FindImage:
    """Finds the image file that a row names under `key`, without its extension where `suffix` is that."""
    finder = ImageFinder(root, *folders, missing=options.get("missing", "error"))

    def find(row: Row) -> tuple[Path | Image.Image, dict[str, Any]]:
        name = text(row, key)
        name = name if Path(name).suffix else name + suffix
        return finder(name), {"image_name": name}

    return find


def stored_image(options: ReadOptions) -> FindImage:
    """Takes the image that a row carries as bytes; `metadata` gets their MD5, by which gold rationales find it."""
    store = ImageStore(options.get("image_folder"))

    def find(row: Row) -> tuple[Path | Image.Image, dict[str, Any]]:
        image, digest = store(row)
        return image, {"image_md5": digest}

    return find
