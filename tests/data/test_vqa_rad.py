"""VQA-RAD: the real files give the known counts, and every kind of broken row or image is found."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from files import image_bytes, write_parquet
from PIL import Image

from mrpo.config import DataConfig
from mrpo.data import load_dataset
from mrpo.data.vqa_rad import IMAGES, QUESTIONS, load_vqa_rad
from mrpo.errors import UserError

REAL = Path(os.environ.get("MRPO_VQA_RAD", Path(__file__).parents[2] / ".." / "shared" / "data" / "vqa-rad"))


def row(qid: Any, **changes: Any) -> dict[str, Any]:
    return {
        "qid": qid,
        "phrase_type": "freeform",
        "image_name": "a.jpg",
        "image_organ": "CHEST",
        "question": "Where is the mass?",
        "question_type": "POS",
        "answer": "Left lung",
    } | changes


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "set" / IMAGES).mkdir(parents=True)
    picture = Image.effect_noise((64, 48), 90)
    for name in ("a.jpg", "b.png"):
        picture.save(tmp_path / "set" / IMAGES / name)
    return tmp_path / "set"


def write(root: Path, rows: Any) -> None:
    (root / QUESTIONS).write_text(rows if isinstance(rows, str) else json.dumps(rows))


def message(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_vqa_rad(root, "train")
    return str(caught.value)


def test_open_ended_rows_of_a_split(root: Path) -> None:
    write(
        root,
        [
            row("0", answer=" Yes "),
            row(1, answer=4),
            row(2, answer="no"),
            row(3, phrase_type="test_para", image_name="b.png"),
            row(4, phrase_type="para", answer="No mass "),
        ],
    )
    train, test = load_vqa_rad(root, "train"), load_vqa_rad(root, "test")
    assert [(example.id, example.answer) for example in train] == [("vqa_rad/1", "4"), ("vqa_rad/4", "No mass")]
    assert [example.id for example in test] == ["vqa_rad/3"]
    assert test[0].images == (root.resolve() / IMAGES / "b.png",)
    assert test[0].load_images()[0].size == (64, 48)
    assert test[0].rationale is None
    assert test[0].metadata == {
        "organ": "CHEST",
        "image_name": "b.png",
        "question_type": "POS",
        "phrase_type": "test_para",
    }


@pytest.fixture
def broken(root: Path, tmp_path: Path) -> Path:
    """A set with one good row, the first, and every kind of bad row after it."""
    folder = root / IMAGES
    whole = (folder / "a.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("not an image")
    (tmp_path / "outside.jpg").write_bytes(whole)
    (folder / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    without_answer = row(10)
    del without_answer["answer"]
    write(
        root,
        [
            row(1),
            "text",
            without_answer,
            row(3, answer="  "),
            row(4, answer=True),
            row(5, question=None),
            row(6, phrase_type="tset_freeform"),
            row(1, answer="Right lung"),
            row(8, image_name="none.jpg"),
            row(9, image_name="half.jpg"),
            row(11, image_name="text.jpg"),
            row(12, image_name="../../outside.jpg"),
            row(13, image_name=str(tmp_path / "outside.jpg")),
            row(14, image_name="link.jpg"),
            row(15, image_name="a\0.jpg"),
            row([16]),
            row(17, image_name="."),
        ],
    )
    return root


def test_all_bad_rows_are_reported_at_once(broken: Path) -> None:
    text = message(broken)
    assert text.splitlines()[0].startswith(f"{broken / QUESTIONS}: 16 bad rows")
    expected = {
        2: "expected an object, got str",
        3: '"answer" is missing',
        4: '"answer" is empty',
        5: '"answer" is true, expected text or an integer',
        6: '"question" is null, expected text',
        7: "\"phrase_type\" is 'tset_freeform', expected one of freeform",
        8: '"qid" 1 is already used in row 1',
        9: "none.jpg not found",
        10: "half.jpg cannot be decoded: image file is truncated",
        11: "text.jpg cannot be decoded: cannot identify image file",
        12: "'../../outside.jpg' lies outside",
        13: "outside.jpg' lies outside",
        14: "'link.jpg' lies outside",
        15: "null byte",
        16: '"qid" is [16], expected text or an integer',
        17: "cannot be decoded",
    }
    lines = text.splitlines()[1:]
    assert len(lines) == len(expected)
    for line, (number, part) in zip(lines, expected.items(), strict=True):
        assert line.startswith(f"  - row {number}: ")
        assert part in line


def test_skip_leaves_bad_rows_out_and_logs_their_number(broken: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        examples = load_vqa_rad(broken, "train", on_error="skip")
    assert [example.id for example in examples] == ["vqa_rad/1"]
    assert "skipped 16 of 17 rows" in caplog.text


def test_a_closed_question_needs_no_image(root: Path) -> None:
    write(root, [row(1), row(2, answer="Yes", image_name="none.jpg")])
    assert len(load_vqa_rad(root, "train")) == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"qid": 1,\n "answer": }]', "not valid JSON: line 2, column 12"),
        ('{"qid": 1}', "expected a list of questions, got dict"),
        ("[]", "no usable open-ended question in the train split"),
        (None, "data.root must be the folder that holds"),
    ],
)
def test_unusable_question_file(root: Path, content: str | None, expected: str) -> None:
    if content is not None:
        write(root, content)
    text = message(root)
    assert expected in text
    assert str(root / QUESTIONS) in text


def test_load_dataset_limits_sizes_and_evaluates_on_the_test_split(root: Path) -> None:
    write(root, [row(i, phrase_type="test_freeform" if i % 2 else "freeform") for i in range(10)])
    config = DataConfig.model_validate({"name": "vqa_rad", "root": root, "train_size": 3, "eval_size": 2})
    assert [example.id for example in load_dataset(config, "train")] == ["vqa_rad/0", "vqa_rad/2", "vqa_rad/4"]
    assert load_dataset(config, "validation") == load_dataset(config, "test")
    assert [example.id for example in load_dataset(config, "test")] == ["vqa_rad/1", "vqa_rad/3"]


def test_load_dataset_makes_phantom_splits_of_the_configured_sizes() -> None:
    config = DataConfig.model_validate({"train_size": 5, "eval_size": 3, "seed": 7})
    sizes = {split: len(load_dataset(config, split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 5, "validation": 3, "test": 3}
    assert len(load_dataset(DataConfig(), "train")) > 1000


@pytest.mark.skipif(not REAL.is_dir(), reason="the VQA-RAD release is not here; MRPO_VQA_RAD=FOLDER names it")
def test_the_real_files_give_the_known_counts() -> None:
    train, test = load_vqa_rad(REAL, "train"), load_vqa_rad(REAL, "test")
    assert (len(train), len(test)) == (855, 200)
    distinct = {(e.images, " ".join(e.question.lower().split()), " ".join(e.answer.lower().split())) for e in train}
    assert len(distinct) == 854
    assert sorted(e.answer for e in (*train, *test) if e.answer.isdecimal()) == ["12", "12", "2", "2", "4"]
    assert not {e.id for e in train} & {e.id for e in test}
    assert not any(e.answer.lower() in ("yes", "no") for e in (*train, *test))


def test_the_hub_layout(tmp_path: Path) -> None:
    rows = [
        {"image": {"bytes": image_bytes(1, "JPEG"), "path": None}, "question": "where is it?", "answer": answer}
        for answer in ("left lung", "yes", "right lung")
    ]
    write_parquet(tmp_path / "data/train-00000-of-00001-eb88.parquet", rows)
    write_parquet(tmp_path / "data/test-00000-of-00001-e5bc.parquet", rows[:1])
    train, test = load_vqa_rad(tmp_path, "train"), load_vqa_rad(tmp_path, "test")
    assert [example.id for example in train] == ["vqa_rad/train/1", "vqa_rad/train/3"]
    assert [example.id for example in test] == ["vqa_rad/test/1"]
    assert train[0].metadata == {"image_md5": hashlib.md5(image_bytes(1, "JPEG")).hexdigest()}
    assert train[0].load_images()[0].size == (24, 16)


def test_missing_images_may_be_allowed(root: Path) -> None:
    write(root, [row(1, image_name="none.jpg"), row(2)])
    first, second = load_vqa_rad(root, "train", missing="allow")
    assert first.images == (root.resolve() / IMAGES / "none.jpg",)
    assert second.images[0].is_file()
    write(root, [row(1, image_name="../../none.jpg")])
    with pytest.raises(UserError, match="lies outside"):
        load_vqa_rad(root, "train", missing="allow")
