"""PMC-VQA (Zhang et al. 2023; hub: RadGenome/PMC-VQA): questions on figures of PubMed Central; 2,000 for testing.

Both published CSV forms are read: version 1 with the answer's text under Answer and its letter under Answer_label, and
version 2 (`*_2.csv`) with the letter alone under Answer. The test split is `test_clean.csv`, whose 2,000 questions were
checked by hand, if it is there. Figures lie in `images/` (`images.zip`) or `figures/` (`images_2.zip`). The set is
multiple-choice; here its questions are asked open-ended, the gold answer being the text of the right choice.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Unpack

from mrpo.data.layout import Layout, Row, named_image
from mrpo.data.reading import BadRow, ReadOptions, Split, text
from mrpo.data.tables import first_file, read_csv
from mrpo.records import Example

LETTERS = "ABCD"
FILES: dict[Split, tuple[str, ...]] = {
    "train": ("train.csv", "train_2.csv"),
    "validation": ("validation.csv",),
    "test": ("test_clean.csv", "test.csv", "test_2.csv"),
}


def load_pmc_vqa(root: Path, split: Split, **options: Unpack[ReadOptions]) -> tuple[Example, ...]:
    """All questions of one split, in file order. `Example.id` is `pmc_vqa/SPLIT/ROW`; `metadata` has image_name.

    Raises:
        UserError: see `first_file`, `read_csv` and `Layout.read`.
    """
    file = first_file(root, *FILES[split])
    rows = read_csv(file, "Figure_path", "Question", "Answer", *(f"Choice {letter}" for letter in LETTERS))
    find_image = named_image("Figure_path", root, "images", "figures", ".", options=options)
    return LAYOUT.read(rows, split, find_image, file=file, options=options)


def _answer(row: Row) -> str:
    """The text of the right choice; a choice is written with its letter, as in "A: Liver".

    "Answer" is this text where "Answer_label" is the letter, as in version 1, and the letter in version 2.
    """
    answer = text(row, "Answer")
    if row.get("Answer_label") or answer not in tuple(LETTERS):
        return answer
    choice = re.sub(rf"^{answer}\s*[:.)]\s*", "", text(row, f"Choice {answer}"))
    if not choice:
        raise BadRow(f'"Choice {answer}" is empty')
    return choice


LAYOUT = Layout("pmc_vqa", question="Question", answer=_answer, is_open=lambda row, answer: True)
