"""CSV, Parquet and Arrow: what is written is read back, what is broken is named, equal images are kept once."""

from __future__ import annotations

import builtins
import hashlib
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from files import image_bytes, picture, write_parquet
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops

from mrpo.data.reading import BadRow
from mrpo.data.tables import ImageStore, find_shards, first_file, read_csv, read_shards
from mrpo.errors import UserError


@given(st.lists(st.lists(st.text(st.characters(exclude_characters="\0\r", codec="utf-8")), min_size=2, max_size=2)))
def test_quoted_csv_fields_are_read_back(tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]) -> None:
    file = tmp_path_factory.mktemp("csv") / "rows.csv"
    lines = ["a,b", *(",".join('"' + field.replace('"', '""') + '"' for field in row) for row in rows)]
    file.write_bytes("\r\n".join(lines).encode())
    assert read_csv(file, "a", "b") == [{"a": first, "b": second} for first, second in rows]


def test_a_csv_row_of_another_length_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n\n1,2,3\n1\n3,4\n")
    first, long, short, last = read_csv(tmp_path / "rows.csv")
    assert (first, last) == ({"a": "1", "b": "2"}, {"a": "3", "b": "4"})
    assert isinstance(long, BadRow)
    assert str(long) == "3 fields, the first line names 2"
    assert isinstance(short, BadRow)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "no column 'a'"), ("b,c\n1,2\n", "no column 'a'; it has 'b', 'c'"), ('a\n"x" y\n', "not valid CSV: line 2")],
)
def test_an_unusable_csv_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        read_csv(tmp_path / "rows.csv", "a")


def test_the_first_file_there_is_taken(tmp_path: Path) -> None:
    (tmp_path / "b.csv").touch()
    (tmp_path / "c.csv").touch()
    assert first_file(tmp_path, "a.csv", "b.csv", "c.csv") == tmp_path / "b.csv"
    with pytest.raises(UserError, match=r"holds none of x\.csv, y\.csv"):
        first_file(tmp_path, "x.csv", "y.csv")


def rows(start: int, stop: int) -> list[dict[str, Any]]:
    return [{"question": f"Q{number}", "answer": str(number)} for number in range(start, stop)]


@pytest.mark.parametrize(
    "layout", ["data/train-{:05}-of-00002-ab.parquet", "train/{:04}.parquet", "default/train/{:04}.parquet"]
)
def test_shards_are_read_in_order(tmp_path: Path, layout: str) -> None:
    write_parquet(tmp_path / layout.format(1), rows(100, 150))
    write_parquet(tmp_path / layout.format(0), rows(0, 100))
    write_parquet(tmp_path / layout.replace("train", "test").format(0), rows(900, 901))
    assert list(read_shards(find_shards(tmp_path, "train"), "question", "answer")) == rows(0, 150)
    assert find_shards(tmp_path, "validation") == []


def test_arrow_as_datasets_saves_it(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(rows(0, 10))
    (tmp_path / "train").mkdir()
    file = tmp_path / "train/data-00000-of-00001.arrow"
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=3)
    assert list(read_shards(find_shards(tmp_path, "train"), "question")) == rows(0, 10)


def test_unusable_shards_are_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", rows(0, 3))
    with pytest.raises(UserError, match=r"train\.parquet: no column 'image'; it has 'question', 'answer'"):
        next(read_shards([tmp_path / "train.parquet"], "image"))
    for suffix in ("parquet", "arrow"):
        (tmp_path / f"broken.{suffix}").write_bytes(b"no table")
        with pytest.raises(UserError, match=rf"broken\.{suffix}: not readable as {suffix}"):
            next(read_shards([tmp_path / f"broken.{suffix}"]))


def test_without_pyarrow_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"pip install mrpo\[data\]"):
        next(read_shards([tmp_path / "train.parquet"]))


@pytest.mark.parametrize("folder", [None, "stored/images"])
def test_equal_images_are_stored_once(tmp_path: Path, folder: str | None) -> None:
    store = ImageStore(None if folder is None else tmp_path / folder)
    first, digest = store({"image": {"bytes": image_bytes(1), "path": None}})
    assert digest == hashlib.md5(image_bytes(1)).hexdigest()
    assert store({"image": image_bytes(1)})[0] is first
    other, _ = store({"image": image_bytes(2, "JPEG")})
    shown = Image.open(first) if isinstance(first, Path) else first
    assert ImageChops.difference(shown.convert("RGB"), picture(1)).getbbox() is None
    if folder is not None:
        assert first == tmp_path.resolve() / folder / f"{digest}.png"
        assert first.read_bytes() == image_bytes(1)
        assert isinstance(other, Path)
        assert other.suffix == ".jpeg"


@pytest.mark.parametrize(
    "cell", [None, b"", "a.png", {"bytes": None, "path": "a.png"}, b"no image", image_bytes(1)[:50]]
)
def test_a_cell_without_a_whole_image_is_a_bad_row(cell: Any) -> None:
    with pytest.raises(BadRow, match=r'"image" (holds no image bytes|cannot be decoded)'):
        ImageStore()({"image": cell})
