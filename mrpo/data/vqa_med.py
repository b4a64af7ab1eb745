"""VQA-Med of ImageCLEF 2019 and 2020 (Ben Abacha et al.): text files, one question a line, its fields parted by `|`.

2019: `All_QA_Pairs_train.txt` with `Train_images/`, `All_QA_Pairs_val.txt` with `Val_images/`, and for testing, the
category before the question, `VQAMed2019_Test_Questions_w_Ref_Answers.txt` with `VQAMed2019_Test_Images/`. 2020:
`VQAnswering_2020_Train_QA_pairs.txt`, `VQAnswering_2020_Val_QA_Pairs.txt`, and a test set in two files, questions and
answers. Files may lie at the root or in a folder of it, images beside them. The paper evaluates 425 questions without
saying which; each year's test set has 500, yes/no questions included, and here all open-ended ones are kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

from mrpo.data.layout import Layout, named_image
from mrpo.data.reading import BadRow, MissingFile, ReadOptions, Split, read_text
from mrpo.errors import UserError
from mrpo.records import Example

QUESTIONS_2020 = "VQAMed2020-Task1-VQAnswering-Test-Questions.txt"
ANSWERS_2020 = "VQAMed2020-Task1-VQAnswering-Test-ReferenceAnswers.txt"
FILES: dict[Split, tuple[str, ...]] = {
    "train": ("All_QA_Pairs_train.txt", "VQAnswering_2020_Train_QA_pairs.txt"),
    "validation": ("All_QA_Pairs_val.txt", "VQAnswering_2020_Val_QA_Pairs.txt"),
    "test": ("VQAMed2019_Test_Questions_w_Ref_Answers.txt", QUESTIONS_2020),
}
IMAGES: dict[Split, tuple[str, ...]] = {
    "train": ("Train_images", "VQAnswering_2020_Train_images"),
    "validation": ("Val_images", "VQAnswering_2020_Val_images"),
    "test": ("VQAMed2019_Test_Images", "VQAnswering_2020_Test_images", "images"),
}


def load_vqa_med(root: Path, split: Split, **options: Unpack[ReadOptions]) -> tuple[Example, ...]:
    """The open-ended questions of one split, in file order. `Example.id` is `vqa_med/SPLIT/ROW`.

    `metadata` has image_name, the question_type where the file gives it, and under answers all accepted ones where
    there are several (parted by `#` in the file); the first is the gold answer.

    Raises:
        MissingFile: there is no such file.
        UserError: there are several, as of both years; it is not text; and see `Layout.read`.
    """
    found = [file for name in FILES[split] for file in sorted(root.rglob(name))]
    if not found:
        raise MissingFile(f"{root} holds none of {', '.join(FILES[split])}")
    if len(found) > 1:
        raise UserError(f"{root} holds {' and '.join(map(str, found))}; data.root must be the folder of one year")
    (file,) = found
    lines = _lines(file)
    if file.name == QUESTIONS_2020:
        answers = dict(line.split("|", 1) for line in _lines(file.with_name(ANSWERS_2020)) if "|" in line)
        lines = [f"{line}|{answers.get(line.split('|')[0], '')}" for line in lines]
    beside = file.parent.relative_to(root)
    folders = [str(beside / folder) for folder in (*IMAGES[split], ".")]
    find_image = named_image("image", root, *folders, options=options, suffix=".jpg")
    return LAYOUT.read(map(_row, lines), split, find_image, file=file, options=options)


def _lines(file: Path) -> list[str]:
    return [line for line in read_text(file).split("\n") if line.strip()]


def _row(line: str) -> dict[str, Any] | BadRow:
    fields = line.split("|")
    if len(fields) not in (3, 4):
        return BadRow(f"{len(fields)} fields, expected image|question|answer or image|category|question|answer")
    image, *category, question, answers = fields
    accepted = [answer.strip() for answer in answers.split("#")]
    return {
        "image": image,
        "question": question,
        "answer": accepted[0],
        "answers": accepted if len(accepted) > 1 else None,
        "category": category[0] if category else None,
    }


LAYOUT = Layout("vqa_med", metadata={"question_type": "category", "answers": "answers"})
