"""Quilt-VQA (Seyfioglu et al. 2024; hub: wisdomik/Quilt_VQA, gated): questions on histopathology, taken from videos.

The hub's Parquet has image, question, answer, answer_type (OPEN or CLOSED) and context, all under the split name
`train`; it is an evaluation set, so it is read as the test split. Of its 985 rows the paper evaluates 724, open-ended.
"""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from mrpo.data.layout import Layout, stored_image
from mrpo.data.reading import MissingFile, ReadOptions, Split, text
from mrpo.data.tables import find_shards, read_shards
from mrpo.errors import UserError
from mrpo.records import Example

LAYOUT = Layout(
    "quilt_vqa",
    is_open=lambda row, answer: text(row, "answer_type").upper() == "OPEN",
    metadata={"question_type": "answer_type", "context": "context"},
)


def load_quilt_vqa(root: Path, split: Split, **options: Unpack[ReadOptions]) -> tuple[Example, ...]:
    """The questions marked open, in file order; there is a test split only. `Example.id` is `quilt_vqa/test/ROW`.

    `metadata` has image_md5, question_type and context.

    Raises:
        MissingFile: there are no such files.
        UserError: another split than test, and see `read_shards` and `Layout.read`.
    """
    if split != "test":
        raise UserError(f"quilt_vqa has a test split only, no {split} split")
    shards = find_shards(root, "train") or find_shards(root, "test")
    if not shards:
        raise MissingFile(f"{root} holds no Parquet files of Quilt-VQA: data/train-*.parquet")
    rows = read_shards(shards, "image", "question", "answer", "answer_type")
    return LAYOUT.read(rows, split, stored_image(options), file=shards[0].parent, options=options)
