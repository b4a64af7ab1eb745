"""PathVQA (He et al. 2020): 32,632 questions on pathology images. Open-ended are 9,903 for training, 3,357 for testing.

Two layouts are read. The hub copy (flaviagiammarino/path-vqa) is Parquet with image, question and answer; it keeps no
file names, so `metadata` has the MD5 of the image bytes, by which MedThink's rationales find it. The original files are
`qas/SPLIT/SPLIT_qa.pkl` and `images/SPLIT/NAME.jpg`, SPLIT one of train, val and test; a list in `SPLIT.json` does as
well, with keys image, question and answer, or problem and solution.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Never, Unpack

from mrpo.data.layout import Layout, named_image, stored_image
from mrpo.data.reading import ReadOptions, Split, read_json_list
from mrpo.data.tables import find_shards, first_file, read_shards
from mrpo.errors import UserError
from mrpo.records import Example

LAYOUT = Layout("path_vqa")
SYNONYMS = {"problem": "question", "solution": "answer"}


def load_path_vqa(root: Path, split: Split, **options: Unpack[ReadOptions]) -> tuple[Example, ...]:
    """The open-ended questions of one split, in file order. `Example.id` is `path_vqa/SPLIT/ROW`.

    `metadata` has image_name, or image_md5 for the hub copy.

    Raises:
        UserError: no known layout, unreadable files, and see `Layout.read`.
    """
    if shards := find_shards(root, split):
        rows = read_shards(shards, "image", "question", "answer")
        return LAYOUT.read(rows, split, stored_image(options), file=shards[0].parent, options=options)
    part = "val" if split == "validation" else split
    file = first_file(root, f"qas/{part}/{part}_qa.pkl", f"{split}.json", f"{part}.json")
    entries = _read_pickle(file) if file.suffix == ".pkl" else read_json_list(file)
    named = [
        {SYNONYMS.get(key, key): value for key, value in entry.items()} if isinstance(entry, dict) else entry
        for entry in entries
    ]
    find_image = named_image("image", root, f"images/{part}", "images", ".", options=options, suffix=".jpg")
    return LAYOUT.read(named, split, find_image, file=file, options=options)


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dictionaries, text and numbers; a pickle that names anything else could run code and is refused."""

    def find_class(self, module: str, name: str) -> Never:
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, only plain lists and dictionaries are read")


def _read_pickle(file: Path) -> list[Any]:
    try:
        with file.open("rb") as stream:
            entries = _PlainUnpickler(stream).load()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except Exception as error:  # a broken pickle raises nearly anything
        raise UserError(f"{file}: not readable as a pickle: {error}") from None
    if not isinstance(entries, list):
        raise UserError(f"{file}: expected a list of questions, got {type(entries).__name__}")
    return entries
