"""MedThink's rationales: both shapes of its files, and what finds which rationale."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from files import image_bytes, write_images, write_parquet

from mrpo.data.medthink import FOLDERS, load_gold
from mrpo.data.path_vqa import load_path_vqa
from mrpo.errors import UserError
from mrpo.records import Example


def problem(**changes: Any) -> dict[str, Any]:
    return {
        "question": "Where is the mass?",
        "choices": ["left lung", "right lung"],
        "answer": 1,
        "solution": "The mass lies right.",
        "image": "a.jpg",
    } | changes


def write(root: Path, content: Any, *, folder: str = "R-RAD", name: str = "trainset.json") -> Path:
    file = root / folder / "open-end" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def example(answer: str = "Right lung", question: str = "Where is the mass?", **metadata: str) -> Example:
    return Example("set/1", (), question, answer, None, "train", metadata or {"image_name": "a.jpg", "organ": "CHEST"})


@pytest.mark.parametrize("shape", ["dict", "list"])
def test_both_shapes(tmp_path: Path, shape: str) -> None:
    problems = [problem(), problem(answer=0, solution="It lies left."), problem(answer="Nowhere", solution="No mass.")]
    write(tmp_path, problems if shape == "list" else {str(i): row for i, row in enumerate(problems)})
    gold = load_gold(tmp_path, "vqa_rad")
    explained = gold.explain([example(), example("left  LUNG"), example("nowhere"), example("both")])
    assert [e.rationale for e in explained] == ["The mass lies right.", "It lies left.", "No mass.", None]
    assert explained[0].metadata == {"image_name": "a.jpg", "organ": "CHEST"}
    assert explained[3] == example("both")
    assert gold.conflicts == 0


def test_image_question_and_answer_all_count(tmp_path: Path) -> None:
    write(tmp_path, [problem()])
    explain = load_gold(tmp_path, "vqa_rad").explain
    same = [example(question=" where  is the MASS ?"), example("RIGHT\tlung"), example(image_name="images/A.jpg")]
    other = [
        example(question="Where is a mass?"),
        example("left lung"),
        example(image_name="b.jpg"),
        example(image_md5="0"),
    ]
    assert [e.rationale for e in explain(same)] == ["The mass lies right."] * 3
    assert [e.rationale for e in explain(other)] == [None] * 4


def test_slake_names_its_images_in_two_ways(tmp_path: Path) -> None:
    rows = [problem(image=None, img_name=name, solution=name) for name in ("xmlab1_source.jpg", "xmlab2/source.jpg")]
    write(tmp_path, rows, folder="R-SLAKE")
    explain = load_gold(tmp_path, "slake").explain
    names = ["xmlab1/source.jpg", "imgs/xmlab2/source.jpg", "xmlab3/source.jpg", "source.jpg"]
    assert [e.rationale for e in explain([example(image_name=name) for name in names])] == [
        "xmlab1_source.jpg",
        "xmlab2/source.jpg",
        None,
        None,
    ]


def test_the_first_of_several_rationales_is_kept_and_the_others_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, [problem(), problem(solution="the  mass lies RIGHT."), problem(solution="Another reason.")])
    write(tmp_path, [problem(solution="A third reason.")], name="zz_testset.json")
    with caplog.at_level(logging.WARNING):
        gold = load_gold(tmp_path, "vqa_rad")
    assert gold.conflicts == 2
    assert "2 rows give a second rationale" in caplog.text
    assert gold.explain([example()])[0].rationale == "The mass lies right."


def test_hub_rows_find_their_rationale_by_the_bytes_of_the_image(tmp_path: Path) -> None:

    rows = [
        {"image": {"bytes": image_bytes(n)}, "question": "Where is the mass?", "answer": "right lung"} for n in (1, 2)
    ]
    write_parquet(tmp_path / "hub/train-00000-of-00001.parquet", rows)
    write(tmp_path, [problem(image="train_0422.jpg"), problem(image="train_0007.jpg")], folder="R-PathVQA")
    named = tmp_path / "R-PathVQA/images/Train_images/train_0422.jpg"
    write_images(named.parent, "train_0007.jpg")
    named.write_bytes(image_bytes(1))
    found, lost = load_gold(tmp_path, "path_vqa").explain(load_path_vqa(tmp_path / "hub", "train"))
    assert (found.rationale, found.metadata["image_name"]) == ("The mass lies right.", "train_0422.jpg")
    assert lost.rationale is None
    assert "image_name" not in lost.metadata


def test_all_bad_rows_of_a_file_are_reported(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        {
            "good": problem(),
            "range": problem(answer=2),
            "negative": problem(answer=-1),
            "empty": problem(solution=" "),
            "no image": problem(image=None),
            "text": "text",
            "choices": problem(choices="left"),
            "bool": problem(answer=True),
        },
    )
    with pytest.raises(UserError) as caught:
        load_gold(tmp_path, "vqa_rad")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{file}: 7 bad rows")
    parts = ["no index", "no index", '"solution" is empty', '"img_name" is missing', "got str", "no index", "true"]
    for number, (line, part) in enumerate(zip(lines[1:], parts, strict=True), start=2):
        assert f"row {number}: " in line
        assert part in line
    assert len(load_gold(tmp_path, "vqa_rad", on_error="skip").rationales) == 1


def test_what_is_no_medthink_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no rationales for pmc_vqa, only for vqa_rad, slake, path_vqa"):
        load_gold(tmp_path, "pmc_vqa")
    for dataset, folder in FOLDERS.items():
        with pytest.raises(UserError, match=f"{folder}/open-end holds no JSON files"):
            load_gold(tmp_path, dataset)
    write(tmp_path, "text")
    with pytest.raises(UserError, match="expected a list or a dictionary of problems, got str"):
        load_gold(tmp_path, "vqa_rad")
