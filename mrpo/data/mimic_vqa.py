"""MIMIC-Ext-MIMIC-CXR-VQA (Bae et al.; PhysioNet, credentialed): template questions on chest X-rays of MIMIC-CXR-JPG.

`train.json`, `valid.json` and `test.json` are lists of objects with idx, image_path, question, answer (a list of
findings), content_type and semantic_type (verify, choose, query). Verify asks for yes or no; the others are open-ended.
Images lie under the root in `files/` as MIMIC-CXR-JPG has them. The paper evaluates 1,724 questions without saying
which; the release's test set has 13,793, and here all open-ended ones of the file are kept.

PhysioNet's data use agreement forbids to pass images and questions on: let them be judged by an endpoint of your own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from mrpo.data.layout import Layout, Row, named_image
from mrpo.data.reading import BadRow, ReadOptions, Split, read_json_list, text
from mrpo.data.tables import first_file
from mrpo.records import Example


def load_mimic_vqa(root: Path, split: Split, **options: Unpack[ReadOptions]) -> tuple[Example, ...]:
    """The open-ended questions of one split, in file order. `Example.id` is `mimic_vqa/SPLIT/ROW`.

    `metadata` has image_name, question_type (the content type) and semantic_type.

    Raises:
        UserError: see `first_file`, `read_json_list` and `Layout.read`.
    """
    name = "valid.json" if split == "validation" else f"{split}.json"
    file = first_file(root, name, f"dataset/{name}", f"mimiccxrvqa/dataset/{name}")
    find_image = named_image("image_path", root, "files", "images", ".", options=options)
    return LAYOUT.read(read_json_list(file), split, find_image, file=file, options=options)


def _answer(row: Row) -> str:
    """The findings in one line; the empty list is read as "none", which is our interpretation."""
    answer = row.get("answer")
    if not isinstance(answer, list):
        return text(row, "answer")
    if not all(isinstance(finding, str) and finding.strip() for finding in answer):
        raise BadRow(f'"answer" is {str(answer)[:60]}, expected a list of findings')
    return ", ".join(finding.strip() for finding in answer) or "none"


LAYOUT = Layout(
    "mimic_vqa", answer=_answer, metadata={"question_type": "content_type", "semantic_type": "semantic_type"}
)
