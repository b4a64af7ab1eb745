"""What all loaders share: text of a row, files that cannot be read, and where images are looked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from files import write_images
from PIL import Image

from mrpo.data.reading import BadRow, ImageFinder, is_open_ended, read_json, read_text, text
from mrpo.errors import UserError


@pytest.mark.parametrize(
    ("answer", "open_ended"),
    [
        ("yes", False),
        (" No. ", False),
        ("YES", False),
        ("no mass", True),
        ("none", True),
        ("", True),
        ("yes, left", True),
    ],
)
def test_open_ended_is_neither_yes_nor_no(answer: str, open_ended: bool) -> None:
    assert is_open_ended(answer) is open_ended


def test_text_of_a_row() -> None:
    assert text({"a": "  two words "}, "a") == "two words"
    assert text({"a": 12}, "a", integer_ok=True) == "12"
    assert text({"a": " "}, "a", empty_ok=True) == ""


@pytest.mark.parametrize(
    ("row", "integer_ok", "message"),
    [
        ({}, False, '"a" is missing'),
        ({"a": 3}, False, '"a" is 3, expected text'),
        ({"a": True}, True, '"a" is true, expected text or an integer'),
        ({"a": 1.5}, True, '"a" is 1.5, expected text or an integer'),
        ({"a": b"x"}, False, "expected text"),
        ({"a": "\t"}, False, '"a" is empty'),
        ({"a": "lung \ud800"}, False, '"a" is not valid Unicode'),
    ],
)
def test_a_bad_value_is_named(row: dict[str, object], integer_ok: bool, message: str) -> None:
    with pytest.raises(BadRow, match=message):
        text(row, "a", integer_ok=integer_ok)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": "\xe9"}', "not UTF-8 text at byte 7"),
        (b'{"a": 1,\n}', "not valid JSON: line 2, column 1"),
        (b"[" * 100_000, "not readable as JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not readable as JSON"),
    ],
)
def test_an_unreadable_file_is_named_with_the_place(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "rows.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_json(file)
    assert str(file) in str(caught.value)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b"\xef\xbb\xbfTumeur \xc3\xa0 droite")
    assert read_text(tmp_path / "rows") == "Tumeur à droite"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}"):
        read_text(tmp_path)
    with pytest.raises(UserError, match="not found: here should be rows"):
        read_text(tmp_path / "none", hint="here should be rows")


def test_images_are_looked_for_in_each_folder_in_turn(tmp_path: Path) -> None:
    write_images(tmp_path, "first/a.png", "second/a.png", "second/b.png")
    find = ImageFinder(tmp_path, "first", "second")
    assert find("a.png") == tmp_path.resolve() / "first/a.png"
    assert find("b.png") == tmp_path.resolve() / "second/b.png"
    with pytest.raises(BadRow, match=r"first/c\.png not found"):
        find("c.png")


def test_an_image_that_cannot_be_shown_is_found_with_the_rows(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.5, np.nan]], np.float32)).save(tmp_path / "map.tiff")
    with pytest.raises(BadRow, match=r"map\.tiff cannot be decoded: .*NaN or infinite"):
        ImageFinder(tmp_path)("map.tiff")


def test_a_missing_image_may_be_allowed_but_never_a_broken_or_outlying_one(tmp_path: Path) -> None:
    write_images(tmp_path, "outside.png", "set/whole.png")
    (tmp_path / "set/broken.png").write_bytes((tmp_path / "set/whole.png").read_bytes()[:100])
    (tmp_path / "set/link.png").symlink_to(tmp_path / "outside.png")
    (tmp_path / "set/loop.png").symlink_to(tmp_path / "set/loop.png")
    find = ImageFinder(tmp_path / "set", "images", ".", missing="allow")
    assert find("none.png") == (tmp_path / "set").resolve() / "images/none.png"
    assert find("whole.png") == (tmp_path / "set").resolve() / "whole.png"
    for name in ("broken.png", "link.png", "../outside.png", "../none.png", str(tmp_path / "none.png")):
        with pytest.raises(BadRow, match=r"cannot be decoded|lies outside"):
            find(name)
    with pytest.raises(BadRow, match="loop"):
        ImageFinder(tmp_path / "set")("loop.png")
