"""MedThink's gold rationales (Gai et al. 2025) for VQA-RAD, SLAKE and PathVQA, added to the examples of those sets.

Read are the JSON files in `R-RAD/open-end`, `R-SLAKE/open-end` and `R-PathVQA/open-end`: a dictionary keyed by problem
id, or a list, of `{question, choices, answer, solution, image | img_name}`. `solution` is the rationale, and an integer
`answer` is an index into `choices`. The same question is asked of one image with different answers, so a rationale is
found by image, question and answer, white space and case folded. Hub copies of the data sets carry image bytes without
names; they are matched to the named images of MedThink (`R-PathVQA/images`, say) by the MD5 of the bytes.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from mrpo.data.reading import BadRow, OnError, collect, read_json, text
from mrpo.errors import UserError
from mrpo.records import Example

FOLDERS = {"vqa_rad": "R-RAD", "slake": "R-SLAKE", "path_vqa": "R-PathVQA"}

Key = tuple[str, str, str]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gold:
    """Rationales by (image, question, answer).

    conflicts: how many rows gave another rationale for a key that had one; the first is kept. images: the folder of
    MedThink's own copies of the images, which need not be there.
    """

    rationales: Mapping[Key, str]
    conflicts: int
    images: Path

    def explain(self, examples: Iterable[Example]) -> tuple[Example, ...]:
        """The examples, in order, with the rationales that are known; the others stay as they are."""
        return tuple(self._explained(example) for example in examples)

    def _explained(self, example: Example) -> Example:
        name = example.metadata.get("image_name") or self._names.get(example.metadata.get("image_md5", ""))
        rationale = self.rationales.get(_key(name, example.question, example.answer)) if name else None
        if rationale is None:
            return example
        return replace(example, rationale=rationale, metadata={**example.metadata, "image_name": name})

    @cached_property
    def _names(self) -> dict[str, str]:
        files = (file for file in sorted(self.images.rglob("*")) if file.is_file())
        return {hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest(): file.name for file in files}


def load_gold(root: Path, dataset: str, *, on_error: OnError = "raise") -> Gold:
    """MedThink's rationales for `dataset`: vqa_rad, slake or path_vqa. `root` holds `R-RAD` and the like.

    Raises:
        UserError: no rationales for that data set, no such files, unreadable ones; with on_error="raise" also all bad
            rows of a file at once.
    """
    if dataset not in FOLDERS:
        raise UserError(f"MedThink has no rationales for {dataset}, only for {', '.join(FOLDERS)}")
    folder = root / FOLDERS[dataset]
    files = sorted((folder / "open-end").glob("*.json"))
    if not files:
        raise UserError(
            f"{folder / 'open-end'} holds no JSON files: {root} must be the folder of MedThink's R-RAD etc."
        )
    rationales: dict[Key, str] = {}
    conflicts = 0
    for file in files:
        for row in collect(_rows(file), _read_row, file=file, on_error=on_error):
            key = _key(row.metadata["image_name"], row.question, row.answer)
            first = rationales.setdefault(key, row.rationale or "")
            conflicts += _folded(first) != _folded(row.rationale or "")
    if conflicts:
        _log.warning("%s: %d rows give a second rationale for a question; the first is kept", folder, conflicts)
    return Gold(rationales, conflicts, folder / "images")


def _rows(file: Path) -> list[Any]:
    content = read_json(file)
    if isinstance(content, dict):
        return list(content.values())
    if not isinstance(content, list):
        raise UserError(f"{file}: expected a list or a dictionary of problems, got {type(content).__name__}")
    return content


def _read_row(row: dict[str, Any], number: int) -> Example:
    image = text(row, "img_name" if row.get("image") is None else "image")
    question, rationale = text(row, "question"), text(row, "solution")
    return Example(str(number), (), question, _answer(row), rationale, "", {"image_name": image})


def _answer(row: Mapping[str, Any]) -> str:
    answer, choices = row.get("answer"), row.get("choices")
    if isinstance(answer, bool) or not isinstance(answer, int) or not choices:
        return text(row, "answer", integer_ok=True)
    if not isinstance(choices, list) or not 0 <= answer < len(choices):
        raise BadRow(f'"answer" is {answer}, no index into "choices" {str(choices)[:60]}')
    return text({"choices": choices[answer]}, "choices", integer_ok=True)


def _key(image: str, question: str, answer: str) -> Key:
    return _flat(image), _folded(question), _folded(answer)


def _flat(image: str) -> str:
    """The file name alone; SLAKE's `xmlabN/source.jpg`, the same for every N, becomes `xmlabn_source.jpg`."""
    path = PurePosixPath(image.replace("\\", "/"))
    name = f"{path.parent.name}_{path.name}" if path.parent.name.startswith("xmlab") else path.name
    return name.casefold()


def _folded(value: str) -> str:
    """White space and case folded, the white space before punctuation too: "Where is it ?" asks "where is it?"."""
    return re.sub(r" (?=[?.,!;:])", "", " ".join(value.split())).casefold()
