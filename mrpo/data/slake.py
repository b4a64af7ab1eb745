"""SLAKE (Liu et al. 2021, CC BY 4.0; hub: BoKelvin/SLAKE): `train.json`, `validation.json`, `test.json`, `imgs/`.

Its questions are Chinese and English; only the English ones are kept. Open-ended are 3,238 for training, 3,234 of them
distinct, and 706 for testing. One training answer, that of question 1622, is empty in the release, and counts. The
`img_name` of a row is `xmlabN/source.jpg`, a file in `imgs/` (as `imgs.zip` unpacks), in `images/`, or in the root.
"""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from mrpo.data.layout import Layout, named_image
from mrpo.data.reading import ReadOptions, Split, read_json_list, text
from mrpo.records import Example

LAYOUT = Layout(
    "slake",
    answer=lambda row: text(row, "answer", integer_ok=True, empty_ok=True),
    belongs=lambda row: text(row, "q_lang") == "en",
    metadata={"organ": "location", "modality": "modality", "question_type": "content_type"},
    id_key="qid",
)


def load_slake(root: Path, split: Split, **options: Unpack[ReadOptions]) -> tuple[Example, ...]:
    """The English open-ended questions of one split, in file order. `Example.id` is `slake/QID`.

    `metadata` has image_name, organ, modality and question_type.

    Raises:
        UserError: see `Layout.read` and `read_json_list`.
    """
    file = root / f"{split}.json"
    rows = read_json_list(file, hint="the root must be the folder that holds SLAKE's question files and `imgs`")
    find_image = named_image("img_name", root, "imgs", "images", ".", options=options)
    return LAYOUT.read(rows, split, find_image, file=file, options=options)
