"""Own data in every format: the same rows give the same examples, and everything wrong is found."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mrpo.config import DataConfig
from mrpo.data import load_dataset
from mrpo.data.generic import load_generic
from mrpo.data.prepared import write_prepared
from mrpo.data.reading import BadRows
from mrpo.errors import UserError


def row(**changes: Any) -> dict[str, Any]:
    return {"image": "a.png", "question": "Where is the mass?", "answer": "Left lung"} | changes


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 6), shade).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "mine"
    inside.mkdir()
    (inside / "a.png").write_bytes(picture(1))
    (tmp_path / "outside.png").write_bytes(picture(2))
    return inside


def write(folder: Path, rows: list[Any], name: str = "rows.json") -> Path:
    lines = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(lines)
    return folder / name


def problems(source: Path, **options: Any) -> list[str]:
    with pytest.raises(BadRows) as caught:
        load_generic(source, **options)
    return list(caught.value.problems)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.ndjson"])
def test_a_row(folder: Path, name: str) -> None:
    (example,) = load_generic(
        write(folder, [row(id=7, rationale="It is seen there.", split="val", organ="CHEST", width=3, box=[1, 2])], name)
    )
    assert (example.id, example.split, example.images) == ("7", "validation", (folder.resolve() / "a.png",))
    assert (example.question, example.answer) == ("Where is the mass?", "Left lung")
    assert example.rationale == "It is seen there."
    assert example.metadata == {"organ": "CHEST", "width": 3}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"problem": "What?", "solution": "A"}, ("What?", "A", None)),
        ({"question": "What?", "answer": 4}, ("What?", "4", None)),
        ({"problem": "What?", "answer": "A", "solution": "Because."}, ("What?", "A", "Because.")),
        ({"question": "What?", "answer": "A", "solution": "B", "rationale": "C"}, ("What?", "A", "C")),
        ({"question": "What?", "answer": None, "solution": "B"}, ("What?", "B", None)),
        ({"problem": "<image>What?", "solution": " <answer> A </answer> "}, ("What?", "A", None)),
        ({"problem": "See <image> here", "solution": "a <answer>"}, ("See here", "a <answer>", None)),
        ({"question": "What?", "answer": "A", "rationale": "<think>\nB\n</think>"}, ("What?", "A", "B")),
    ],
)
def test_names_of_the_columns(folder: Path, given: dict[str, Any], expected: tuple[Any, ...]) -> None:
    (example,) = load_generic(write(folder, [{"image": None, **given}]))
    assert (example.question, example.answer, example.rationale) == expected
    assert example.images == ()


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ({"images": None}, 0),
        ({"images": ["a.png", "a.png"], "image": None}, 2),
        ({"image": "a.png", "images": None}, 1),
    ],
)
def test_names_of_the_image_columns(folder: Path, given: dict[str, Any], count: int) -> None:
    (example,) = load_generic(write(folder, [{"question": "What?", "answer": "A", **given}]))
    assert len(example.images) == count


def test_rows_without_ids_are_called_after_file_and_row(folder: Path) -> None:
    examples = load_generic(write(folder, [row(), row(), row(id="own")]))
    assert [example.id for example in examples] == ["rows/1", "rows/2", "own"]


def test_closed_questions_stay_unless_only_open_ones_are_asked_for(folder: Path) -> None:
    file = write(folder, [row(answer="Yes."), row()])
    assert [example.metadata for example in load_generic(file)] == [{"open_ended": False}, {}]
    assert [example.answer for example in load_generic(file, questions="open")] == ["Left lung"]


BROKEN: list[tuple[Any, str]] = [
    ("text", "expected an object, got str"),
    ({"image": "a.png", "answer": "A"}, '"question" (or "problem") is missing'),
    ({"image": "a.png", "question": "A"}, '"answer" (or "solution") is missing'),
    ({"question": "What?", "answer": "A"}, '"image" is missing (null for a question without one)'),
    (row(question="<image>"), '"question" is empty'),
    (row(answer=""), '"answer" is empty'),
    (row(answer=["A"]), '"answer" is ["A"], expected text or an integer'),
    (row(answer="<answer> </answer>"), "nothing inside its tags"),
    (row(id="used"), '"id" used is already used in row 1'),
    (row(id=1.5), '"id" is 1.5'),
    (row(split="holdout"), "\"split\" is 'holdout', expected one of train"),
    (row(image=3), "\"image\" is '3', expected a path, or bytes"),
    (row(image="none.png"), "none.png not found"),
    (row(image="../outside.png"), "'../outside.png' lies outside"),
    (row(images=["a.png", "rows.json"]), "rows.json cannot be decoded"),
]


def test_every_kind_of_bad_row_is_reported_at_once(folder: Path) -> None:
    found = problems(write(folder, [row(id="used"), *(value for value, _ in BROKEN)]))
    assert len(found) == len(BROKEN)
    for number, ((_, expected), problem) in enumerate(zip(BROKEN, found, strict=True), start=2):
        assert problem.startswith(f"row {number}: ")
        assert expected in problem


def test_broken_lines_of_json_lines_are_bad_rows(folder: Path) -> None:
    (folder / "rows.jsonl").write_bytes(json.dumps(row()).encode() + b'\n{"id"\n\xff\n')
    assert [problem.split(":")[0] for problem in problems(folder / "rows.jsonl")] == ["row 2", "row 3"]
    assert len(load_generic(folder / "rows.jsonl", on_error="skip")) == 1


def test_the_root_is_where_images_are(folder: Path, tmp_path: Path) -> None:
    (example,) = load_generic(write(tmp_path, [row()]), root=folder)
    assert example.images == (folder / "a.png",)
    (example,) = load_generic(write(tmp_path, [row(image="none.png")]), root=folder, missing="allow")
    assert example.images == (folder / "none.png",)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rows.json", '{"a": 1}', "expected a list of questions, got dict"),
        ("rows.json", "[]", "no usable row"),
        ("rows.txt", "", r"rows are read from \.json, .* files, not \.txt"),
        ("rows.parquet", "PAR1", "not readable as parquet|needs pyarrow"),
        ("none.json", None, "no such file or folder, and no OWNER/NAME"),
    ],
)
def test_unusable_sources(folder: Path, name: str, content: str | None, expected: str) -> None:
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(UserError, match=expected):
        load_generic(folder / name)


def test_a_folder_of_files_named_after_splits(folder: Path) -> None:
    write(folder, [row(id=1), row(id=2, split="dev")], "train.jsonl")
    write(folder, [row(id=1), row()], "data/test_rows.json")
    write(folder, [row()], ".hidden.json")
    examples = load_generic(folder)
    assert [(e.id, e.split) for e in examples] == [
        ("data/test_rows/1", "test"),
        ("data/test_rows/2", "test"),
        ("train/1", "train"),
        ("train/2", "validation"),
    ]
    assert {image for e in examples for image in e.images} == {folder / "a.png"}


def test_files_that_differ_in_their_format_alone_have_rows_of_different_names(folder: Path) -> None:
    for name in ("train.json", "train.jsonl", "more.json"):
        write(folder, [row()], name)
    assert [example.id for example in load_generic(folder)] == ["more/1", "train.json/1", "train.jsonl/1"]


def test_bad_rows_of_all_files_of_a_folder_are_reported_at_once(folder: Path) -> None:
    write(folder, [row(), row(answer="")], "train.json")
    write(folder, [row(question="")], "test.json")
    with pytest.raises(UserError) as caught:
        load_generic(folder)
    for part in (str(folder / "train.json"), str(folder / "test.json"), "row 2", "row 1"):
        assert part in str(caught.value)
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="holds no rows"):
        load_generic(folder / "empty")


def test_load_dataset_reads_own_data(folder: Path, tmp_path: Path) -> None:
    train = write(tmp_path, [row(id=n) for n in range(3)], "mine.json")
    test = write(tmp_path, [row(id="t")], "my_test.json")
    config = DataConfig.model_validate({"name": "generic", "file": train, "eval_file": test, "root": folder})
    assert [example.id for example in load_dataset(config, "train")] == ["0", "1", "2"]
    assert [example.id for example in load_dataset(config, "test")] == ["t"]


EMBEDDED = [{"bytes": picture(10), "path": "x.png"}, {"bytes": picture(20), "path": None}, {"bytes": picture(10)}]


def test_parquet_with_embedded_images_in_shards(folder: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    shards = tmp_path / "hub" / "data"
    shards.mkdir(parents=True)
    for index, cell in enumerate(EMBEDDED):
        table = pyarrow.Table.from_pylist([row(image=cell), row(image={"path": "a.png", "bytes": None})])
        parquet.write_table(table, shards / f"test-0000{index}-of-00003.parquet")
    examples = load_generic(tmp_path / "hub", root=folder, image_folder=tmp_path / "images")
    assert [e.id for e in examples] == [f"data/test/{n}" for n in range(1, 7)]
    assert {e.split for e in examples} == {"test"}
    assert examples[0].images == examples[4].images != examples[2].images
    assert examples[1].images == (folder / "a.png",)
    assert sorted(file.read_bytes() for file in (tmp_path / "images").iterdir()) == sorted({picture(10), picture(20)})
    in_memory = load_generic(tmp_path / "hub", root=folder)
    assert [e.load_images()[0].getpixel((0, 0)) for e in in_memory[::2]] == [(n, n, n) for n in (10, 20, 10)]


def test_broken_embedded_images_are_bad_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    cells = [picture(1), picture(2)[:40], b"", None]
    parquet.write_table(pyarrow.Table.from_pylist([row(image=cell) for cell in cells]), tmp_path / "rows.parquet")
    found = problems(tmp_path / "rows.parquet")
    assert ['"image" cannot be decoded' in problem for problem in found] == [True, False]
    assert found[1] == 'row 3: "image" holds no image bytes'


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    columns = {"question": ["What?"], "answer": ["A"], "image": [Image.new("L", (8, 6), 30)], "organ": ["CHEST"]}
    features = datasets.Features(
        {name: datasets.Image() if name == "image" else datasets.Value("string") for name in columns}
    )
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_dict(columns, features) for split in ("train", "validation")}
    )


def test_a_folder_that_datasets_saved(saved: Any, tmp_path: Path) -> None:
    saved.save_to_disk(tmp_path / "saved")
    examples = load_generic(tmp_path / "saved", image_folder=tmp_path / "images")
    assert [(e.id, e.split) for e in examples] == [("train/1", "train"), ("validation/1", "validation")]
    assert examples[0].metadata == {"organ": "CHEST"}
    assert examples[0].load_images()[0].getpixel((0, 0)) == (30, 30, 30)
    assert examples[0].images == examples[1].images
    saved["train"].save_to_disk(tmp_path / "one")
    assert [(e.id, e.split) for e in load_generic(tmp_path / "one")] == [("one/1", "train")]


def test_the_hub(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[str] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or saved)
    examples = load_generic(Path("owner/questions"))
    assert asked == ["owner/questions"]
    assert [(e.id, e.split) for e in examples] == [("train/1", "train"), ("validation/1", "validation")]
    assert examples[1].load_images()[0].size == (8, 6)

    def fail(name: str) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"owner/questions: no such file, and .* hub does not give it: no route$"):
        load_generic(Path("owner/questions"))


@pytest.mark.parametrize("module", ["pyarrow", "datasets"])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    module: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (folder / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"pip install mrpo\[data\]"):
        load_generic(folder / "rows.parquet" if module == "pyarrow" else Path("owner/questions"))


@pytest.mark.parametrize("name", ["prepared", "generic"])
def test_what_is_missing_for_an_evaluation_is_said(folder: Path, name: str) -> None:
    file, held = write(folder, [row()], "rows.jsonl"), folder / "held.jsonl"
    if name == "prepared":
        write_prepared(load_generic(file), file, dataset="mine", root=folder)
    held.write_bytes(file.read_bytes())
    config = DataConfig.model_validate({"name": name, "file": file, "root": folder})
    assert len(load_dataset(config, "train")) == 1
    with pytest.raises(UserError, match=r"name other questions in data\.eval_file, or .* eval\.at_start=false"):
        load_dataset(config, "test")
    # Who has named them is not told to name them.
    named = config.model_copy(update={"eval_file": held})
    way = {"generic": r'"split": "test", or name the file test\.jsonl', "prepared": "prepare .* --split test"}[name]
    with pytest.raises(UserError, match=rf"held\.jsonl has no questions .*: .*{way}"):
        load_dataset(named, "test")
