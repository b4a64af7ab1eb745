"""VQA-RAD as released on OSF (project 89kps, CC0): 2,248 questions on 315 radiology images, one JSON file.

Only open-ended questions are kept: those whose answer is neither yes nor no, 855 for training and 200 for testing.
The release has no validation split and no gold rationales; evaluation, during a run as well as after it, uses the test
split. `phrase_type` says which split a row belongs to (test_freeform and test_para are the test split), and five
answers are JSON integers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from mrpo.errors import UserError
from mrpo.records import Example

QUESTIONS = "VQA_RAD Dataset Public.json"
IMAGES = "VQA_RAD Image Folder"
PHRASE_TYPES = ("freeform", "para", "test_freeform", "test_para")

_log = logging.getLogger(__name__)


class _BadRow(Exception):
    """What is wrong with one row."""


def load_vqa_rad(
    root: Path, split: Literal["train", "test"], *, on_error: Literal["raise", "skip"] = "raise"
) -> tuple[Example, ...]:
    """The open-ended questions of one split, in file order. `Example.id` is `vqa_rad/QID`.

    Every row of both splits and every image that an open-ended question uses is checked, so that what is wrong shows
    before a run starts. `metadata` has organ, image_name, question_type and phrase_type.

    Raises:
        UserError: missing or unreadable files or no questions; with on_error="raise" also all bad rows at once (missing
            or wrong values, duplicate ids, missing, undecodable or outlying images). "skip" leaves bad rows out and
            logs how many.
    """
    file = root / QUESTIONS
    rows = _read_rows(file)
    find_image = _image_finder(root)
    examples: list[Example] = []
    problems: list[str] = []
    first_row: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        try:
            example = _read_row(row, find_image)
            qid = str(row["qid"])
            if first_row.setdefault(qid, number) != number:
                raise _BadRow(f'"qid" {qid} is already used in row {first_row[qid]}')
        except _BadRow as problem:
            problems.append(f"row {number}: {problem}")
            continue
        if example is not None and example.split == split:
            examples.append(example)
    if problems and on_error == "raise":
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(f"{file}: {len(problems)} bad rows (data.on_error=skip leaves them out):\n{listed}")
    if problems:
        _log.warning("%s: skipped %d of %d rows, the first for: %s", file, len(problems), len(rows), problems[0])
    if not examples:
        raise UserError(f"{file}: no usable open-ended question in the {split} split")
    return tuple(examples)


def _read_rows(file: Path) -> list[Any]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{file} not found: data.root must be the folder that holds {QUESTIONS!r} and {IMAGES!r}"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text at byte {error.start}") from None
    if not isinstance(rows, list):
        raise UserError(f"{file}: expected a list of questions, got {type(rows).__name__}")
    return rows


def _read_row(row: Any, find_image: Callable[[str], Path]) -> Example | None:
    """The example of a row, or None when the question is not open-ended."""
    if not isinstance(row, dict):
        raise _BadRow(f"expected an object, got {type(row).__name__}")
    qid, answer = (_text(row, key, integer_ok=True) for key in ("qid", "answer"))
    question, image_name, phrase_type = (_text(row, key) for key in ("question", "image_name", "phrase_type"))
    if phrase_type not in PHRASE_TYPES:
        raise _BadRow(f'"phrase_type" is {phrase_type!r}, expected one of {", ".join(PHRASE_TYPES)}')
    if answer.lower().rstrip(".") in ("yes", "no"):
        return None
    return Example(
        id=f"vqa_rad/{qid}",
        images=(find_image(image_name),),
        question=question,
        answer=answer,
        rationale=None,
        split="test" if phrase_type.startswith("test") else "train",
        metadata={
            "organ": row.get("image_organ"),
            "image_name": image_name,
            "question_type": row.get("question_type"),
            "phrase_type": phrase_type,
        },
    )


def _text(row: Mapping[str, Any], key: str, *, integer_ok: bool = False) -> str:
    value = row.get(key)
    if integer_ok and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if key not in row:
        raise _BadRow(f'"{key}" is missing')
    if not isinstance(value, str):
        wanted = "text or an integer" if integer_ok else "text"
        raise _BadRow(f'"{key}" is {json.dumps(value)[:60]}, expected {wanted}')
    if not value.strip():
        raise _BadRow(f'"{key}" is empty')
    return value.strip()


def _image_finder(root: Path) -> Callable[[str], Path]:
    """A function from image name to the real path of a decodable image below `root`; it checks each name once."""
    real_root = root.resolve()

    @cache
    def check(name: str) -> Path | str:
        try:
            path = (real_root / IMAGES / name).resolve(strict=True)
        except FileNotFoundError:
            return f"image {root / IMAGES / name} not found"
        except (OSError, RuntimeError, ValueError) as error:
            return f"image {name!r}: {error}"
        if not path.is_relative_to(real_root):
            return f"image {name!r} lies outside {root}"
        problem = _decode_problem(path)
        return path if problem is None else f"image {root / IMAGES / name} cannot be decoded: {problem}"

    def find(name: str) -> Path:
        found = check(name)
        if isinstance(found, str):
            raise _BadRow(found)
        return found

    return find


def _decode_problem(path: Path) -> str | None:
    """Why the image cannot be decoded, or None. `Image.verify` lets a truncated JPEG pass, so it is really decoded."""
    try:
        with Image.open(path) as image:
            image.draft("L", (image.width // 8, image.height // 8))  # a JPEG is decoded at an eighth: much faster
            image.load()
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        return str(error) or type(error).__name__
    return None
