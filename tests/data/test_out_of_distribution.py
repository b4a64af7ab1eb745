"""The five sets that are only evaluated on: small files in each published layout."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from files import image_bytes, write_images, write_parquet

from mrpo.data.mimic_vqa import load_mimic_vqa
from mrpo.data.pmc_vqa import load_pmc_vqa
from mrpo.data.quilt_vqa import load_quilt_vqa
from mrpo.data.rad_vqa import load_rad_vqa
from mrpo.data.vqa_med import load_vqa_med
from mrpo.errors import UserError
from mrpo.records import Example


def answers(examples: tuple[Example, ...]) -> list[tuple[str, str]]:
    return [(example.id, example.answer) for example in examples]


def write_csv(file: Path, header: list[str], *rows: list[str]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])


CHOICES = ["Choice A", "Choice B", "Choice C", "Choice D"]


def test_pmc_vqa_version_1_is_asked_for_the_text_of_the_answer(tmp_path: Path) -> None:
    write_images(tmp_path, "images/PMC1_F1.jpg")
    header = ["Figure_path", "Question", "Answer", *CHOICES, "Answer_label"]
    options = [" A: CT ", " B:MRI, T2 ", " C: Ultrasound ", "D: No"]
    write_csv(
        tmp_path / "test_clean.csv",
        header,
        ["PMC1_F1.jpg", "Which modality, is it?", " MRI, T2 ", *options, "B"],
        ["PMC1_F1.jpg", "Is it contrast-enhanced?", "No", *options, "D"],
        ["PMC1_F1.jpg", "Which blood group?", "AB", " A: A ", " B: B ", " C: AB ", "D: 0", "C"],
        ["PMC1_F1.jpg", "Which panel?", "B", " A: D ", " B: A ", " C: B ", "D: C", "C"],
    )
    write_csv(tmp_path / "test.csv", header, ["PMC1_F1.jpg", "Unchecked?", "CT", *options, "A"])
    examples = load_pmc_vqa(tmp_path, "test")
    assert [answer for _, answer in answers(examples)] == ["MRI, T2", "No", "AB", "B"]
    assert [example.id for example in examples] == [f"pmc_vqa/test/{row}" for row in (1, 2, 3, 4)]
    assert examples[0].question == "Which modality, is it?"
    assert examples[0].images == (tmp_path.resolve() / "images/PMC1_F1.jpg",)


def test_pmc_vqa_version_2_gives_the_letter_alone(tmp_path: Path) -> None:
    write_images(tmp_path, "figures/PMC2_F1.jpg")
    header = ["index", "Figure_path", "Caption", "Question", *CHOICES, "Answer", "split"]
    row = ["0", "PMC2_F1.jpg", "A figure.", "What is shown?", "A:liver", "B:A. fumigatus", "C:", "D) spleen"]
    write_csv(tmp_path / "train_2.csv", header, *([*row, letter, "train"] for letter in "ABD"))
    assert [answer for _, answer in answers(load_pmc_vqa(tmp_path, "train"))] == ["liver", "A. fumigatus", "spleen"]
    write_csv(tmp_path / "train_2.csv", header, [*row, "C", "train"], [*row, "A"])
    with pytest.raises(UserError) as caught:
        load_pmc_vqa(tmp_path, "train")
    assert 'row 1: "Choice C" is empty' in str(caught.value)
    assert "row 2: 9 fields, the first line names 10" in str(caught.value)


def test_pmc_vqa_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds none of test_clean\.csv, test\.csv, test_2\.csv"):
        load_pmc_vqa(tmp_path, "test")
    (tmp_path / "test.csv").write_text("Figure_path,Question\n")
    with pytest.raises(UserError, match=r"test\.csv: no column 'Answer', 'Choice A'"):
        load_pmc_vqa(tmp_path, "test")


def test_vqa_med_2019_test_with_categories_and_several_answers(tmp_path: Path) -> None:
    folder = tmp_path / "VQAMed2019Test"
    write_images(folder, "VQAMed2019_Test_Images/synpic1.jpg", "VQAMed2019_Test_Images/synpic2.jpg")
    (folder / "VQAMed2019_Test_Questions_w_Ref_Answers.txt").write_text(
        "synpic1|modality|what is it?|cta - ct angiography\r\n"
        "synpic2|modality|is this a ct scan?|yes\r\n"
        "\r\n"
        "synpic2|abnormality|what is abnormal?|diverticulum#esophageal spasm\r\n"
    )
    first, second = load_vqa_med(tmp_path, "test")
    assert answers((first, second)) == [("vqa_med/test/1", "cta - ct angiography"), ("vqa_med/test/3", "diverticulum")]
    assert first.images == (folder.resolve() / "VQAMed2019_Test_Images/synpic1.jpg",)
    assert first.metadata == {"image_name": "synpic1.jpg", "question_type": "modality"}
    assert second.metadata["answers"] == ["diverticulum", "esophageal spasm"]


@pytest.mark.parametrize(
    ("split", "name", "images"),
    [
        ("train", "All_QA_Pairs_train.txt", "Train_images"),
        ("validation", "All_QA_Pairs_val.txt", "Val_images"),
        ("train", "VQAnswering_2020_Train_QA_pairs.txt", "VQAnswering_2020_Train_images"),
        ("validation", "VQAnswering_2020_Val_QA_Pairs.txt", "VQAnswering_2020_Val_images"),
    ],
)
def test_vqa_med_pairs(tmp_path: Path, split: Any, name: str, images: str) -> None:
    write_images(tmp_path, f"{images}/synpic7.jpg")
    (tmp_path / name).write_text("synpic7|what plane is this?|axial\nsynpic7|is it normal?|no\n")
    assert answers(load_vqa_med(tmp_path, split)) == [(f"vqa_med/{split}/1", "axial")]


def test_vqa_med_2020_test_has_its_answers_in_a_file_of_their_own(tmp_path: Path) -> None:
    write_images(tmp_path, "images/synpic1.jpg", "images/synpic2.jpg", "images/synpic3.jpg")
    stem = "VQAMed2020-Task1-VQAnswering-Test"
    (tmp_path / f"{stem}-Questions.txt").write_text("synpic1|is it normal?\nsynpic2|what is it?\nsynpic3|what is it?\n")
    (tmp_path / f"{stem}-ReferenceAnswers.txt").write_text("synpic2|meningioma\nsynpic1|no\n")
    with pytest.raises(UserError, match='row 3: "answer" is empty'):
        load_vqa_med(tmp_path, "test")
    assert answers(load_vqa_med(tmp_path, "test", on_error="skip")) == [("vqa_med/test/2", "meningioma")]


def test_vqa_med_of_both_years_is_not_read_by_halves(tmp_path: Path) -> None:
    for year, names in (("2019", "All_QA_Pairs_train.txt"), ("2020", "VQAnswering_2020_Train_QA_pairs.txt")):
        (tmp_path / year).mkdir()
        (tmp_path / year / names).write_text("a|what plane?|axial\n")
    with pytest.raises(UserError, match=r"2019/.* and .*2020/.*; data\.root must be the folder of one year"):
        load_vqa_med(tmp_path, "train")


def test_vqa_med_broken_lines_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds none of All_QA_Pairs_val\.txt"):
        load_vqa_med(tmp_path, "validation")
    (tmp_path / "All_QA_Pairs_val.txt").write_text("synpic7|axial\n")
    with pytest.raises(UserError, match=r"row 1: 2 fields, expected image\|question\|answer"):
        load_vqa_med(tmp_path, "validation")


def test_quilt_vqa_keeps_what_is_marked_open(tmp_path: Path) -> None:
    row = {
        "image": {"bytes": image_bytes(1, "JPEG"), "path": "q.jpg"},
        "question": "What is it?",
        "context": "A slide.",
    }
    rows = [
        row | {"answer": "A carcinoma.", "answer_type": "OPEN"},
        row | {"answer": "Yes, it is.", "answer_type": "CLOSED"},
    ]
    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", rows)
    (example,) = load_quilt_vqa(tmp_path, "test")
    assert (example.id, example.answer, example.split) == ("quilt_vqa/test/1", "A carcinoma.", "test")
    assert example.metadata["question_type"] == "OPEN"
    assert example.metadata["context"] == "A slide."
    assert example.load_images()[0].size == (24, 16)
    assert len(load_quilt_vqa(tmp_path, "test", questions="all")) == 2


def test_rad_vqa_keeps_the_open_questions_of_the_benchmark(tmp_path: Path) -> None:
    metadata = {"content_type": "anatomy", "modality": "MR", "location": "knee", "question_id": "k1", "pathology": None}
    row = {"image": {"bytes": image_bytes(3)}, "question": "Which region?", "choices": None, "metadata": metadata}
    rows = [
        row | {"answer": "B", "question_type": "multiple_choice", "choices": ["hip", "knee"]},
        row | {"answer": "knee", "question_type": "open"},
        row | {"answer": "no", "question_type": "closed"},
    ]
    write_parquet(tmp_path / "benchmark/test-00000-of-00001.parquet", rows)
    write_parquet(tmp_path / "alignment/test-00000-of-00001.parquet", [{"conversations": "other"}])
    (example,) = load_rad_vqa(tmp_path, "test")
    assert (example.id, example.answer) == ("rad_vqa/test/2", "knee")
    known = {key: value for key, value in example.metadata.items() if key != "image_md5"}
    assert known == {
        "question_type": "open",
        "content_type": "anatomy",
        "modality": "MR",
        "organ": "knee",
        "question_id": "k1",
    }


@pytest.mark.parametrize("load", [load_quilt_vqa, load_rad_vqa])
def test_benchmarks_have_a_test_split_only(tmp_path: Path, load: Any) -> None:
    with pytest.raises(UserError, match="test split only, no train split"):
        load(tmp_path, "train")
    with pytest.raises(UserError, match="holds no Parquet files"):
        load(tmp_path, "test")


def test_mimic_vqa_joins_lists_of_findings(tmp_path: Path) -> None:
    name = "p10/p10000032/s50414267/02aa804e.jpg"
    write_images(tmp_path, f"files/{name}")
    row = {"image_path": name, "question": "What is there?", "content_type": "anatomy", "semantic_type": "query"}
    given = [["lung opacity", "edema"], ["yes"], [], "male", [3], "no"]
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset/valid.json").write_text(json.dumps([row | {"answer": answer} for answer in given]))
    with pytest.raises(UserError, match=r'1 bad rows .*\n.*row 5: "answer" is \[3\], expected a list of findings'):
        load_mimic_vqa(tmp_path, "validation")
    examples = load_mimic_vqa(tmp_path, "validation", on_error="skip")
    assert [example.answer for example in examples] == ["lung opacity, edema", "none", "male"]
    assert examples[0].metadata == {"image_name": name, "question_type": "anatomy", "semantic_type": "query"}


def test_metadata_can_be_written_as_json(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "data/train-00000-of-00001.parquet",
        [
            {
                "image": {"bytes": image_bytes(1)},
                "question": "What?",
                "answer": "A",
                "answer_type": "OPEN",
                "context": None,
            }
        ],
    )
    (example,) = load_quilt_vqa(tmp_path, "test")
    assert json.loads(json.dumps(example.metadata)) == example.metadata
