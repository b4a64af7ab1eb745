"""Writing that a kill or a full disk cannot leave half done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mrpo.whole_files import partial_path, remove_path, replace_folder, write_whole


def test_the_old_content_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def parts() -> Iterator[str]:
        yield "n" * 100_000  # more than a buffer holds
        assert path.read_text() == "old"
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write_whole(path, parts())
    assert path.read_text() == "old"
    write_whole(path, ["ne", "w"])
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"file": "new"}


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    for folder, name in ((tmp_path / "policy", "old"), (partial_path(tmp_path / "policy"), "new")):
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / name).touch()
    replace_folder(partial_path(tmp_path / "policy"), tmp_path / "policy")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == ["policy/inner/new"]


def test_a_link_is_removed_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "there" / "inner").mkdir(parents=True)
    for name, target in (("folder", "there"), ("nowhere", "gone")):
        (tmp_path / name).symlink_to(tmp_path / target)
        remove_path(tmp_path / name)
    remove_path(tmp_path / "not there")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there" / "inner").is_dir()
    remove_path(tmp_path / "there")
    assert not list(tmp_path.iterdir())
