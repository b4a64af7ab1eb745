"""RadImageNet-VQA (Raidium 2025; hub: raidium/RadImageNet-VQA, gated): CT and MRI; the paper's Rad-VQA, 2,000 items.

The hub's `benchmark` configuration, Parquet of 9,000 rows, has image, question, choices, answer, question_type (open,
closed, multiple_choice) and metadata. Open are those on anatomy and on pathology, for 1,000 images each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

from mrpo.data.layout import Layout, stored_image
from mrpo.data.reading import MissingFile, ReadOptions, Split, text
from mrpo.data.tables import find_shards, read_shards
from mrpo.errors import UserError
from mrpo.records import Example

LAYOUT = Layout(
    "rad_vqa",
    is_open=lambda row, answer: text(row, "question_type").lower() == "open",
    metadata={
        "question_type": "question_type",
        "content_type": "content_type",
        "modality": "modality",
        "organ": "location",
        "pathology": "pathology",
        "question_id": "question_id",
    },
)


def load_rad_vqa(root: Path, split: Split, **options: Unpack[ReadOptions]) -> tuple[Example, ...]:
    """The questions marked open, in file order; there is a test split only. `Example.id` is `rad_vqa/test/ROW`.

    `metadata` has image_md5, question_type, content_type, modality, organ, pathology and question_id.

    Raises:
        MissingFile: there are no such files.
        UserError: another split than test, and see `read_shards` and `Layout.read`.
    """
    if split != "test":
        raise UserError(f"rad_vqa is a benchmark with a test split only, no {split} split")
    shards = find_shards(root, "test", "benchmark", "data/benchmark")
    if not shards:
        raise MissingFile(f"{root} holds no Parquet files of RadImageNet-VQA's benchmark: benchmark/test-*.parquet")
    rows = map(_flat, read_shards(shards, "image", "question", "answer", "question_type"))
    return LAYOUT.read(rows, split, stored_image(options), file=shards[0].parent, options=options)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    nested = row.get("metadata")
    return {**nested, **row} if isinstance(nested, dict) else row
