"""PathVQA: the hub's Parquet, the original pickles and JSON lists give the same questions."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from files import image_bytes, write_images, write_parquet

from mrpo.data.path_vqa import load_path_vqa
from mrpo.errors import UserError

PAIRS = [("what is stained?", "nuclei"), ("is it benign?", "yes"), ("how many cells?", "two"), ("is it fat?", "No")]


def summary(examples: tuple[Any, ...]) -> list[tuple[str, str, str]]:
    return [(example.id, example.question, example.answer) for example in examples]


EXPECTED = [("path_vqa/test/1", "what is stained?", "nuclei"), ("path_vqa/test/3", "how many cells?", "two")]


def test_hub_rows_carry_the_md5_of_their_image(tmp_path: Path) -> None:
    rows = [
        {"image": {"bytes": image_bytes(number % 2, "JPEG"), "path": None}, "question": question, "answer": answer}
        for number, (question, answer) in enumerate(PAIRS)
    ]
    write_parquet(tmp_path / "data/test-00000-of-00001-0ab.parquet", rows)
    examples = load_path_vqa(tmp_path, "test")
    assert summary(examples) == EXPECTED
    assert [e.metadata["image_md5"] for e in examples] == [hashlib.md5(image_bytes(0, "JPEG")).hexdigest()] * 2
    assert examples[0].images[0] is examples[1].images[0]
    assert examples[0].load_images()[0].size == (24, 16)
    stored = load_path_vqa(tmp_path, "test", image_folder=tmp_path / "out")
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [stored[0].metadata["image_md5"] + ".jpeg"]
    assert len(load_path_vqa(tmp_path, "test", questions="all")) == 4


def test_original_files(tmp_path: Path) -> None:
    write_images(tmp_path, "images/test/test_0001.jpg")
    (tmp_path / "qas/test").mkdir(parents=True)
    entries = [{"image": "test_0001", "question": question, "answer": answer} for question, answer in PAIRS]
    (tmp_path / "qas/test/test_qa.pkl").write_bytes(pickle.dumps(entries))
    examples = load_path_vqa(tmp_path, "test")
    assert summary(examples) == EXPECTED
    assert examples[0].images == (tmp_path.resolve() / "images/test/test_0001.jpg",)
    assert examples[0].metadata == {"image_name": "test_0001.jpg"}


@pytest.mark.parametrize(
    ("file", "split"), [("test.json", "test"), ("val.json", "validation"), ("train.json", "train")]
)
@pytest.mark.parametrize("keys", [("question", "answer"), ("problem", "solution")])
def test_json_list(tmp_path: Path, file: str, split: Any, keys: tuple[str, str]) -> None:
    write_images(tmp_path, "images/a.jpg")
    rows = [{"image": "images/a.jpg", **dict(zip(keys, pair, strict=True))} for pair in PAIRS]
    (tmp_path / file).write_text(json.dumps(rows))
    expected = [(name.replace("test", split), *rest) for name, *rest in EXPECTED]
    assert summary(load_path_vqa(tmp_path, split)) == expected


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("this must not run",)


def test_a_pickle_that_could_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "qas/train").mkdir(parents=True)
    file = tmp_path / "qas/train/train_qa.pkl"
    for content, message in (
        (pickle.dumps([Harmful()]), r"it holds a builtins\.print"),
        (b"no pickle", "not readable as a pickle"),
        (pickle.dumps({"image": "a"}), "expected a list of questions, got dict"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_path_vqa(tmp_path, "train")
    assert "must not run" not in capsys.readouterr().out


def test_no_known_layout(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds none of qas/val/val_qa\.pkl, validation\.json, val\.json"):
        load_path_vqa(tmp_path, "validation")
