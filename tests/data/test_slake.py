"""SLAKE: English questions only, both places of the images, and the real question files give the known counts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from files import write_images

from mrpo.data.slake import load_slake
from mrpo.errors import UserError

REAL = Path(os.environ.get("MRPO_SLAKE", Path(__file__).parents[2] / ".." / "shared" / "data" / "slake"))


def row(qid: int, **changes: Any) -> dict[str, Any]:
    return {
        "img_id": 1,
        "img_name": "xmlab1/source.jpg",
        "question": "Where is the liver?",
        "answer": "Left",
        "q_lang": "en",
        "location": "Abdomen",
        "modality": "CT",
        "answer_type": "OPEN",
        "content_type": "Position",
        "qid": qid,
    } | changes


def write(root: Path, *rows: dict[str, Any], split: str = "train") -> None:
    (root / f"{split}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def test_english_open_ended_questions(tmp_path: Path) -> None:
    write_images(tmp_path, "imgs/xmlab1/source.jpg", "xmlab2/source.jpg")
    chinese = row(2, question="肝脏在哪里", answer="左", q_lang="zh", img_name="xmlab9/source.jpg")
    write(tmp_path, row(1), chinese, row(3, answer="Yes"), row(4, img_name="xmlab2/source.jpg"), row(5, answer=""))
    examples = load_slake(tmp_path, "train")
    assert [example.id for example in examples] == ["slake/1", "slake/4", "slake/5"]
    assert [example.answer for example in examples] == ["Left", "Left", ""]
    folder = tmp_path.resolve()
    assert examples[0].images == (folder / "imgs/xmlab1/source.jpg",)
    assert examples[1].images == (folder / "xmlab2/source.jpg",)
    assert examples[0].metadata == {
        "image_name": "xmlab1/source.jpg",
        "organ": "Abdomen",
        "modality": "CT",
        "question_type": "Position",
    }
    assert len(load_slake(tmp_path, "train", questions="all")) == 4


def test_problems_name_the_row_of_the_file(tmp_path: Path) -> None:
    write_images(tmp_path, "imgs/xmlab1/source.jpg")
    write(tmp_path, row(1, q_lang="zh"), row(1), row(3, q_lang=None), row(4, img_name="xmlab2/source.jpg"))
    with pytest.raises(UserError) as caught:
        load_slake(tmp_path, "train")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{tmp_path / 'train.json'}: 3 bad rows")
    assert "row 2" in lines[1]
    assert "already used in row 1" in lines[1]
    assert 'row 3: "q_lang" is null' in lines[2]
    assert "row 4: image" in lines[3]
    assert len(load_slake(tmp_path, "train", on_error="skip", missing="allow")) == 1


@pytest.mark.skipif(not REAL.is_dir(), reason="the SLAKE question files are not here; MRPO_SLAKE=FOLDER names them")
def test_the_real_files_give_the_known_counts() -> None:
    train, test = (load_slake(REAL, split, missing="allow") for split in ("train", "test"))
    assert (len(train), len(test)) == (3238, 706)
    distinct = {(e.images, " ".join(e.question.lower().split()), " ".join(e.answer.lower().split())) for e in train}
    assert len(distinct) == 3234
    assert [e.id for e in train if not e.answer] == ["slake/1622"]
    assert not {e.id for e in train} & {e.id for e in test}
    assert all(e.question.isascii() for e in (*train, *test))
