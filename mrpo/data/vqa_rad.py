"""VQA-RAD (Lau et al. 2018, CC0): 2,248 questions on 315 radiology images, in two layouts.

As released on OSF (project 89kps) it is one JSON file and a folder of images. Open-ended, answered by neither yes nor
no, are 855 questions for training (854 distinct) and 200 for testing. `phrase_type` says which split a row belongs to
(test_freeform and test_para are the test split), and five answers are JSON integers. The hub copy
(flaviagiammarino/vqa-rad, without four duplicates) is Parquet with image, question and answer, files train and test.
Neither has a validation split or gold rationales; evaluation, during a run as well as after it, uses the test split.
"""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from mrpo.data.layout import Layout, Row, named_image, stored_image
from mrpo.data.reading import BadRow, ReadOptions, Split, read_json_list, text
from mrpo.data.tables import find_shards, read_shards
from mrpo.records import Example

QUESTIONS = "VQA_RAD Dataset Public.json"
IMAGES = "VQA_RAD Image Folder"
PHRASE_TYPES = ("freeform", "para", "test_freeform", "test_para")


def load_vqa_rad(root: Path, split: Split, **options: Unpack[ReadOptions]) -> tuple[Example, ...]:
    """The open-ended questions of one split, in file order. `Example.id` is `vqa_rad/QID`, or `vqa_rad/SPLIT/ROW`.

    Of the OSF release every row of both splits and every image that an open-ended question uses is checked, so that
    what is wrong shows before a run starts. `metadata` has organ, image_name, question_type and phrase_type; of the hub
    copy image_md5.

    Raises:
        UserError: missing or unreadable files or no questions; with on_error="raise" also all bad rows at once (missing
            or wrong values, duplicate ids, missing, undecodable or outlying images). "skip" leaves bad rows out and
            logs how many.
    """
    shards = find_shards(root, split)
    if shards and not (root / QUESTIONS).exists():
        rows = read_shards(shards, "image", "question", "answer")
        return HUB.read(rows, split, stored_image(options), file=shards[0].parent, options=options)
    file = root / QUESTIONS
    listed = read_json_list(
        file, hint=f"data.root must be the folder that holds {QUESTIONS!r} and {IMAGES!r}, or the hub's Parquet files"
    )
    return OSF.read(listed, split, named_image("image_name", root, IMAGES, options=options), file=file, options=options)


def _split(row: Row) -> Split:
    phrase_type = text(row, "phrase_type")
    if phrase_type not in PHRASE_TYPES:
        raise BadRow(f'"phrase_type" is {phrase_type!r}, expected one of {", ".join(PHRASE_TYPES)}')
    return "test" if phrase_type.startswith("test") else "train"


HUB = Layout("vqa_rad")
OSF = Layout(
    "vqa_rad",
    metadata={"organ": "image_organ", "question_type": "question_type", "phrase_type": "phrase_type"},
    id_key="qid",
    split_of=_split,
)
