"""Prepared files: what is written is read back, everything wrong with a file shows at once, and runs train on it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_cases import ODD, pixels, write_turned
from PIL import Image, ImageChops

from mrpo.config import DataConfig
from mrpo.data import load_dataset
from mrpo.data.phantom import PhantomDataset
from mrpo.data.prepared import read_prepared, write_prepared
from mrpo.data.reading import BadRows
from mrpo.errors import UserError
from mrpo.judge.phantom import PhantomJudge
from mrpo.records import Example, JudgeRequest, Verdict
from mrpo.run import load_inputs
from mrpo.settings import load_config


def row(name: Any, **changes: Any) -> dict[str, Any]:
    return {
        "id": name,
        "dataset": "mine",
        "split": "train",
        "images": ["a.jpg"],
        "root": None,
        "question": "Where is the mass?",
        "answer": "Left lung",
        "rationale": None,
        "metadata": {},
    } | changes


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in row("without").items() if name != key}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "set"
    inside.mkdir()
    picture = Image.effect_noise((64, 48), 90)
    picture.save(inside / "a.jpg")
    picture.save(tmp_path / "outside.jpg")
    whole = (inside / "a.jpg").read_bytes()
    (inside / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (inside / "text.jpg").write_text("not an image")
    (inside / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    return inside


def write(folder: Path, *rows: Any) -> Path:
    """Rows that are bytes are written as they stand."""
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in rows]
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder / "rows.jsonl"


BROKEN: list[tuple[Any, str]] = [
    (b'{"id": "1", ', "not valid JSON: column 13"),
    (b'{"id": "\xe9"}', "not UTF-8 text at byte 8 of the line"),
    ("{}".encode("utf-16"), "not UTF-8 text at byte 0"),
    (b"", "not valid JSON"),
    (b"[" * 100_000, "not readable as JSON"),
    ([1], "expected an object, got list"),
    (without("question"), '"question" is missing'),
    (without("images"), '"images" is missing'),
    (without("split"), '"split" is missing'),
    (row(7), '"id" is 7, expected text'),
    (row("t", question=None), '"question" is null, expected text'),
    (row("t", question=" "), '"question" is empty'),
    (row("t", answer=4), '"answer" is 4, expected text'),
    (row("t", rationale=["a"]), '"rationale" is ["a"], expected text'),
    (row("t", metadata=[]), '"metadata" is [], expected an object'),
    (row("t", split="dev"), '"split" is "dev", expected one of train, validation, test'),
    (row("t", images="a.jpg"), '"images" is "a.jpg", expected a list of paths'),
    (row("t", images=[1]), '"images" is [1], expected a list of paths'),
    (row("t", root="set"), '"root" is "set", expected an absolute folder or null'),
    (row("t", rational="why"), 'unknown key "rational" (did you mean "rationale"?)'),
    (row("t", question="\ud800"), "half of a surrogate pair"),
    (row("good"), '"id" good is already used in row 1'),
    (row("t", images=["none.jpg"]), "none.jpg not found"),
    (row("t", images=["half.jpg"]), "half.jpg cannot be decoded: image file is truncated"),
    (row("t", images=["text.jpg"]), "text.jpg cannot be decoded: cannot identify image file"),
    (row("t", images=["../outside.jpg"]), "'../outside.jpg' lies outside"),
    (row("t", images=["link.jpg"]), "'link.jpg' lies outside"),
    (row("t", images=["a\0.jpg"]), "null byte"),
    (row("t", images=["none.jpg", "text.jpg"], answer=1), '"answer" is 1, expected text'),
]


def broken_file(folder: Path) -> Path:
    # Rows after the first that are to show another fault need ids of their own.
    rows = [
        value | {"id": f"t{n}"} if isinstance(value, dict) and value.get("id") == "t" else value
        for n, (value, _) in enumerate(BROKEN)
    ]
    return write(folder, row("good"), *rows)


def test_every_kind_of_bad_row_is_reported_at_once(folder: Path) -> None:
    file = broken_file(folder)
    with pytest.raises(BadRows) as caught:
        read_prepared(file)
    assert caught.value.file == file
    assert len(caught.value.problems) == len(BROKEN)
    for number, ((_, expected), problem) in enumerate(zip(BROKEN, caught.value.problems, strict=True), start=2):
        assert problem.startswith(f"row {number}: ")
        assert expected in problem
    assert str(file) in str(caught.value)


def test_all_that_is_wrong_with_one_row_is_told(folder: Path) -> None:
    with pytest.raises(BadRows) as caught:
        read_prepared(write(folder, row("x", images=["none.jpg", "text.jpg"], answer=1, split="dev")))
    for part in ('"split" is "dev"', "none.jpg not found", "text.jpg cannot be decoded", '"answer" is 1'):
        assert part in caught.value.problems[0]


def test_skip_leaves_bad_rows_out_and_logs_their_number(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = broken_file(folder)
    with caplog.at_level(logging.WARNING):
        assert [example.id for example in read_prepared(file, on_error="skip")] == ["good"]
    assert f"skipped {len(BROKEN)} of {len(BROKEN) + 1} rows" in caplog.text


def test_absent_images_are_allowed_on_demand_but_no_broken_or_outlying_ones(folder: Path) -> None:
    (example,) = read_prepared(write(folder, row("x", images=["none.jpg"])), missing="allow")
    assert example.images == (folder.resolve() / "none.jpg",)
    with pytest.raises(BadRows, match="2 bad rows"):
        read_prepared(write(folder, row("x", images=["../none.jpg"]), row("y", images=["half.jpg"])), missing="allow")


@pytest.mark.parametrize(("content", "expected"), [(None, "rows.jsonl not found"), (b"", "no usable row")])
def test_a_file_without_rows_is_refused(folder: Path, content: bytes | None, expected: str) -> None:
    if content is not None:
        (folder / "rows.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=expected):
        read_prepared(folder / "rows.jsonl")


def test_images_are_found_below_the_argument_else_the_row_else_the_file(folder: Path, tmp_path: Path) -> None:
    for name in ("of_row", "of_argument"):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "a.jpg")
    file = write(folder, row("x"), row("y", root=str(tmp_path / "of_row")), row("z", images=[]))
    assert [e.images for e in read_prepared(file)] == [(folder / "a.jpg",), (tmp_path / "of_row" / "a.jpg",), ()]
    argued = tmp_path / "of_argument"
    assert {image for e in read_prepared(file, root=argued) for image in e.images} == {argued / "a.jpg"}


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(folder: Path) -> None:
    content = write(folder, row("x"), row("y")).read_bytes()
    (folder / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    assert [example.id for example in read_prepared(folder / "rows.jsonl")] == ["x", "y"]


plain = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: text == text.strip())
metadata = st.dictionaries(
    plain.filter(lambda key: key != "dataset"), st.none() | st.booleans() | st.integers() | plain
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.builds(
            Example,
            id=plain,
            images=st.just(()),
            question=plain,
            answer=plain,
            rationale=st.none() | plain,
            split=st.sampled_from(["train", "validation", "test"]),
            metadata=metadata,
        ),
        min_size=1,
        unique_by=lambda example: example.id,
    )
)
def test_what_is_written_is_read_back(tmp_path: Path, examples: list[Example]) -> None:
    write_prepared(examples, tmp_path / "rows.jsonl", dataset="mine", root=None)
    back = read_prepared(tmp_path / "rows.jsonl")
    for example, other in zip(examples, back, strict=True):
        assert vars(other) | {"metadata": None} == vars(example) | {"metadata": None}
        assert other.metadata == {**example.metadata, "dataset": "mine"}


def test_image_paths_are_written_relative_to_the_root(folder: Path, tmp_path: Path) -> None:
    example = Example("x", (folder / "a.jpg",), "Where?", "Here", None, "test", {"dataset": "first"})
    file = tmp_path / "deep" / "er" / "rows.jsonl"
    write_prepared([example], file, dataset="mine", root=tmp_path)
    written = json.loads(file.read_text())
    assert (written["images"], written["root"], written["dataset"]) == (["set/a.jpg"], str(tmp_path), "first")
    assert read_prepared(file)[0].images == example.images


def test_an_image_outside_the_root_is_refused_and_leaves_no_file(folder: Path, tmp_path: Path) -> None:
    example = Example("x", (tmp_path / "outside.jpg",), "Where?", "Here", None, "test")
    with pytest.raises(UserError, match=r"x: image .*outside.jpg must lie below"):
        write_prepared([example], folder / "rows.jsonl", dataset="mine", root=folder)
    assert not [file for file in folder.iterdir() if "rows" in file.name]


def test_an_unwritable_file_is_a_user_error(folder: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        write_prepared([], folder / "a.jpg" / "rows.jsonl", dataset="mine", root=folder)


def test_pictures_in_memory_move_with_their_file(folder: Path, tmp_path: Path) -> None:
    phantom = PhantomDataset("train", size=3, seed=5)
    write_prepared(phantom, tmp_path / "first" / "rows.jsonl", dataset="phantom", root=None)
    (tmp_path / "first").rename(tmp_path / "second")
    back = read_prepared(tmp_path / "second" / "rows.jsonl")
    for example, other in zip(phantom, back, strict=True):
        (before,), (after,) = example.load_images(), other.load_images()
        assert after.size == before.size
        assert ImageChops.difference(before, after).getbbox() is None


@pytest.mark.parametrize("name", ["CMYK in memory", "F in memory", "orientation in memory", "RGBA in memory"])
def test_pictures_in_memory_are_written_as_they_are_shown(tmp_path: Path, name: str) -> None:
    picture, _ = ODD[name](tmp_path)
    turned = write_turned(tmp_path / "turned.jpg", pixels(), 6)
    example = Example("x", (picture, turned), "Where?", "Here", None, "test")
    write_prepared([example], tmp_path / "rows.jsonl", dataset="mine", root=None)
    (back,) = read_prepared(tmp_path / "rows.jsonl")
    for before, after in zip(example.load_images(), back.load_images(), strict=True):
        assert after.size == before.size
        assert ImageChops.difference(before, after).getbbox() is None


def test_a_prepared_phantom_is_judged_as_the_original(tmp_path: Path) -> None:
    write_prepared(PhantomDataset("test", size=4, seed=1), tmp_path / "rows.jsonl", dataset="phantom", root=None)
    for example in read_prepared(tmp_path / "rows.jsonl"):
        steps = tuple(f"{sentence}." for sentence in (example.rationale or "").removesuffix(".").split(". "))
        (verdict,) = PhantomJudge().judge([JudgeRequest(example, steps, example.answer)])
        assert isinstance(verdict, Verdict)
        assert all(verdict.validity)


def test_splits_of_a_run(folder: Path, tmp_path: Path) -> None:
    file = write(folder, *(row(f"{split}{n}", split=split) for n in range(3) for split in ("train", "test")))
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(row("v", split="validation", images=[])))

    def names(split: Any, **changes: Any) -> list[str]:
        config = DataConfig.model_validate({"name": "prepared", "file": file} | changes)
        return [example.id for example in load_dataset(config, split)]

    assert names("train", train_size=2) == ["train0", "train1"]
    assert names("test", eval_size=None) == names("validation", eval_size=3) == ["test0", "test1", "test2"]
    assert names("test", eval_file=other) == names("validation", eval_file=other) == ["v"]
    with pytest.raises(UserError, match="no questions of the train split"):
        names("train", file=other)
    write(folder, row("only"))
    with pytest.raises(UserError, match=r"no questions of the test or validation split: .*data\.eval_file"):
        names("test")


def test_a_run_trains_on_a_prepared_phantom_with_the_exact_judge(tmp_path: Path, tiny_policy: Path) -> None:
    splits = [PhantomDataset(split, size=2) for split in ("train", "test")]
    write_prepared([e for split in splits for e in split], tmp_path / "rows.jsonl", dataset="phantom", root=None)
    settings = ["data.name=prepared", f"data.file={tmp_path / 'rows.jsonl'}", f"model.path={tiny_policy}"]
    inputs = load_inputs(load_config(None, settings))
    assert (len(inputs.train_set), len(inputs.eval_set), inputs.judge.name) == (2, 2, PhantomJudge.name)
