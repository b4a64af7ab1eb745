"""`mrpo data`: the counts of real and small sets, what it refuses, and that a broken file ends with status 1."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, get_args

import pytest
from image_cases import pixels, write_turned
from PIL import Image

from mrpo.cli import main
from mrpo.commands.data import NAMES
from mrpo.config import DataConfig
from mrpo.data import SPLITS
from mrpo.data.prepared import read_prepared

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
VQA_RAD = Path(os.environ.get("MRPO_VQA_RAD", DATA / "vqa-rad"))
SLAKE = Path(os.environ.get("MRPO_SLAKE", DATA / "slake"))

Capture = pytest.CaptureFixture[str]


def counts_of(capsys: Capture, *arguments: object) -> dict[str, Any]:
    assert main(["data", "prepare", *map(str, arguments), "--json"]) == 0
    counts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return counts


def refusal(capsys: Capture, *arguments: object) -> str:
    assert main(["data", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def question(qid: int, **changes: Any) -> dict[str, Any]:
    """A row of SLAKE."""
    return {
        "qid": qid,
        "img_name": "xmlab1/source.jpg",
        "question": f"Where is organ {qid}?",
        "answer": "Left",
        "q_lang": "en",
        "location": "Abdomen",
        "modality": "CT",
        "content_type": "Position",
    } | changes


@pytest.fixture
def slake(tmp_path: Path) -> Path:
    root = tmp_path / "slake"
    for number in (1, 2):
        (root / "imgs" / f"xmlab{number}").mkdir(parents=True)
        Image.new("L", (16, 12), number).save(root / "imgs" / f"xmlab{number}" / "source.jpg")
    train = [
        question(0),
        question(1, question="Where  is organ 0?", answer="left"),
        question(2, answer="Yes"),
        question(3, img_name="xmlab2/source.jpg"),
        question(4, q_lang="zh"),
    ]
    (root / "train.json").write_text(json.dumps(train))
    (root / "test.json").write_text(json.dumps([question(5)]))
    return root


def test_counts_of_a_small_set(slake: Path, tmp_path: Path, capsys: Capture) -> None:
    counts = counts_of(capsys, "slake", "--root", slake, "--out", tmp_path / "out.jsonl")
    train = counts["splits"]["train"]
    assert (train["total"], train["open_ended"], train["written"], train["distinct"]) == (4, 3, 3, 2)
    assert (train["images"], train["missing_images"], train["with_gold"]) == (2, 0, 0)
    assert (counts["total"], counts["open_ended"], counts["images"]) == (5, 4, 2)
    examples = read_prepared(tmp_path / "out.jsonl")
    assert [e.id for e in examples] == ["slake/0", "slake/1", "slake/3", "slake/5"]
    assert {e.metadata["dataset"] for e in examples} == {"slake"}
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["root"] == str(slake)


def test_a_file_gets_a_plain_table_even_where_colour_is_forced(
    slake: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert main(["data", "prepare", "slake", "--root", str(slake), "--out", str(tmp_path / "out.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert "train" in printed
    assert "\x1b" not in printed


def test_options_of_prepare(slake: Path, tmp_path: Path, capsys: Capture) -> None:
    gold = tmp_path / "gold" / "R-SLAKE" / "open-end"
    gold.mkdir(parents=True)
    entry = {
        "question": "where is organ 3?",
        "answer": "left",
        "solution": "It lies left.",
        "image": "xmlab2_source.jpg",
    }
    (gold / "train.json").write_text(json.dumps([entry]))
    out = tmp_path / "out.jsonl"
    options = ("--gold", tmp_path / "gold", "--split", "train", "--questions", "all", "--dataset", "mine")
    counts = counts_of(capsys, "slake", "--root", slake, "--out", out, *options)
    assert (counts["written"], counts["with_gold"], list(counts["splits"])) == (4, 1, ["train"])
    examples = read_prepared(out)
    assert [e.rationale for e in examples] == [None, None, None, "It lies left."]
    assert examples[2].metadata["open_ended"] is False
    assert examples[0].metadata["dataset"] == "mine"


def test_images_that_are_all_absent_are_counted(slake: Path, tmp_path: Path, capsys: Capture) -> None:
    (slake / "imgs").rename(tmp_path / "elsewhere")
    out = tmp_path / "out.jsonl"
    counts = counts_of(capsys, "slake", "--root", slake, "--out", out)
    assert (counts["images"], counts["missing_images"], counts["written"]) == (2, 2, 4)
    assert main(["data", "check", str(out), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["rows"], result["ok"], len(result["problems"])) == (4, False, 4)
    assert main(["data", "show", str(out), "-n", "1"]) == 0
    assert "(missing)" in capsys.readouterr().out


def test_a_single_absent_image_is_a_bad_row(slake: Path, tmp_path: Path, capsys: Capture) -> None:
    (slake / "imgs" / "xmlab2" / "source.jpg").unlink()
    out = tmp_path / "out.jsonl"
    text = refusal(capsys, "prepare", "slake", "--root", slake, "--out", out)
    assert "row 4: image" in text
    assert "xmlab2/source.jpg not found" in text
    assert not out.exists()
    counts = counts_of(capsys, "slake", "--root", slake, "--out", out, "--on-error", "skip")
    assert (counts["written"], counts["missing_images"]) == (3, 0)


def test_phantom_of_a_size_and_seed(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out.jsonl"
    counts = counts_of(capsys, "phantom", "--out", out, "--size", 3, "--seed", 2, "--split", "test")
    assert (counts["written"], counts["with_gold"], counts["images"], counts["missing_images"]) == (3, 3, 3, 0)
    assert [e.id for e in read_prepared(out)] == [f"phantom/2/test/{n}" for n in range(3)]
    assert sorted(file.suffix for file in (tmp_path / "out_images").iterdir()) == [".png"] * 3
    assert main(["data", "check", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 3 rows, all fine\n"


def test_generic_keeps_closed_questions_and_takes_the_name_of_its_file(tmp_path: Path, capsys: Capture) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "problem": "What?", "solution": answer} for answer in ("Left", "no")]
    source = tmp_path / "mine.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    counts = counts_of(capsys, "generic", "--file", source, "--out", tmp_path / "out.jsonl")
    assert (counts["total"], counts["open_ended"], counts["written"]) == (2, 1, 2)
    assert read_prepared(tmp_path / "out.jsonl")[0].metadata["dataset"] == "mine"
    assert "would be read as a part of" in refusal(capsys, "prepare", "generic", "--file", source, "--out", source)
    text = refusal(capsys, "prepare", "generic", "--root", tmp_path, "--out", tmp_path / "sub" / "out.jsonl")
    assert "would be read as a part of" in text
    assert len(source.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["mimic_vqa"], "must be the folder of mimic_vqa's files"),
        (["generic"], "--file must name what to read"),
        (["vqa_rad", "--root", ".", "--split", "validation"], "vqa_rad has no validation split; it has train, test"),
        (["vqa_rad", "--root", ".", "--size", "3"], "--size is for phantom"),
        (["vqa_rad", "--root", ".", "--file", "x.json"], "--file is for generic"),
        (["phantom", "--gold", "."], "MedThink has no rationales for phantom"),
        (["slake", "--root", "{folder}"], "train.json not found"),
    ],
)
def test_what_prepare_refuses(arguments: list[str], expected: str, tmp_path: Path, capsys: Capture) -> None:
    given = [argument.format(folder=tmp_path) for argument in arguments]
    assert expected in refusal(capsys, "prepare", *given, "--out", tmp_path / "out" / "out.jsonl")
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_here_are_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail(api: object, name: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fail)
    text = refusal(capsys, "prepare", "slake", "--root", tmp_path / "new", "--out", tmp_path / "out.jsonl")
    assert f"{tmp_path / 'new'} does not exist" in text
    assert "no route" in text


@pytest.mark.parametrize(
    "arguments", [["prepare", "nosuch", "--out", "x"], ["prepare", "phantom"], [], ["show", "-n", "0"]]
)
def test_command_lines_that_cannot_be_parsed(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["data", *arguments])
    assert caught.value.code == 2


def test_check_lists_all_problems_and_ends_with_status_1(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out.jsonl"
    main(["data", "prepare", "phantom", "--out", str(out), "--size", "3", "--split", "train"])
    lines = out.read_text().splitlines()
    (tmp_path / "out_images" / "000002.png").write_bytes(b"no image")
    (tmp_path / "out_images" / "000003.png").unlink()
    out.write_text("\n".join([*lines, lines[0], "{"]))
    capsys.readouterr()
    assert main(["data", "check", str(out)]) == 1
    *found, summary = capsys.readouterr().out.splitlines()
    expected = [
        "row 2: image",
        "row 3: image",
        'row 4: "id" phantom/0/train/0 is already used',
        "row 5: not valid JSON",
    ]
    assert len(found) == len(expected)
    for line, part in zip(found, expected, strict=True):
        assert line.startswith(f"{out}: {part}")
    assert summary == f"{out}: 4 of 5 rows are bad"
    assert "none.jsonl not found" in refusal(capsys, "check", tmp_path / "none.jsonl")


def test_show_prints_text_as_it_is_and_the_fault_of_a_bad_row(tmp_path: Path, capsys: Capture) -> None:
    rows = [
        {"id": f"r{n}", "dataset": "mine", "split": "train", "images": [], "question": text, "answer": "A"}
        for n, text in enumerate(["[bold red]Where?[/]", "\x1b[2Jgone", ""])
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["data", "show", str(tmp_path / "rows.jsonl")]) == 0
    shown = capsys.readouterr().out
    assert "[bold red]Where?[/]" in shown
    assert "gone" in shown
    assert "\x1b" not in shown
    assert 'row 3: "question" is empty' in shown
    assert "3 of 3 rows" in shown


def test_show_tells_the_size_of_the_upright_image(tmp_path: Path, capsys: Capture) -> None:
    write_turned(tmp_path / "turned.png", pixels(height=12, width=20), 6)
    row = {"id": "r", "dataset": "mine", "split": "train", "images": ["turned.png"], "question": "Q?", "answer": "A"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert main(["data", "show", str(tmp_path / "rows.jsonl")]) == 0
    assert "(20 x 12)" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_show_draws_samples_by_seed(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out.jsonl"
    main(["data", "prepare", "phantom", "--out", str(out), "--size", "30", "--split", "train"])

    def shown(*options: str) -> list[str]:
        capsys.readouterr()
        assert main(["data", "show", str(out), "-n", "4", *options]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if "phantom/0/train/" in line]

    assert [line.split(":")[0].split()[-1] for line in shown()] == ["1", "2", "3", "4"]
    assert len(shown("--seed", "1")) == 4
    assert shown("--seed", "1") == shown("--seed", "1") != shown("--seed", "2")


def test_every_data_set_can_be_prepared_and_configured() -> None:
    configured = get_args(DataConfig.model_fields["name"].annotation)
    assert set(NAMES) == {*SPLITS, "phantom", "generic"}
    assert set(configured) == {*NAMES, "prepared"}


@pytest.mark.skipif(not VQA_RAD.is_dir(), reason="the VQA-RAD release is not here; MRPO_VQA_RAD=FOLDER names it")
def test_the_real_vqa_rad_gives_the_known_counts(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out.jsonl"
    counts = counts_of(capsys, "vqa_rad", "--root", VQA_RAD, "--out", out)
    train, test = counts["splits"]["train"], counts["splits"]["test"]
    assert (train["open_ended"], train["written"], train["distinct"]) == (855, 855, 854)
    assert (test["open_ended"], test["written"]) == (200, 200)
    assert (counts["total"], counts["missing_images"], counts["with_gold"]) == (2248, 0, 0)
    assert len(read_prepared(out)) == 1055


@pytest.mark.skipif(not SLAKE.is_dir(), reason="SLAKE's question files are not here; MRPO_SLAKE=FOLDER names them")
def test_the_real_slake_gives_the_known_counts_and_reports_its_images_missing(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out.jsonl"
    counts = counts_of(capsys, "slake", "--root", SLAKE, "--out", out)
    train, test = counts["splits"]["train"], counts["splits"]["test"]
    assert (train["open_ended"], train["distinct"], test["open_ended"]) == (3238, 3234, 706)
    if not (SLAKE / "imgs").exists():
        assert counts["missing_images"] == counts["images"] > 0
    assert len(read_prepared(out, missing="allow")) == 3238 + 706
    assert main(["data", "prepare", "slake", "--root", str(SLAKE), "--out", str(out)]) == 0
    assert "images is there" in capsys.readouterr().out
