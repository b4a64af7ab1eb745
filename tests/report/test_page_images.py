from __future__ import annotations

from pathlib import Path

import numpy as np
from image_cases import pixels, scan, spread, write_turned
from PIL import Image

from mrpo.report.page.images import LONGEST_SIDE, Thumbnail, shown, write_thumbnails


def test_large_images_are_scaled_and_small_ones_kept_to_the_pixel(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "small.png")
    Image.new("L", (2000, 500), 90).save(tmp_path / "large.png")
    thumbnails = write_thumbnails([tmp_path / "small.png", tmp_path / "large.png"], tmp_path / "out")
    small, large = thumbnails.values()
    assert small is not None
    assert large is not None
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / small.file)), pixels)
    assert (large.width, large.height) == (LONGEST_SIDE, LONGEST_SIDE // 4)
    assert Image.open(tmp_path / "out" / large.file).size == (large.width, large.height)


def test_a_thumbnail_stands_upright_and_keeps_the_contrast(tmp_path: Path) -> None:
    write_turned(tmp_path / "small.png", pixels(), 6)
    write_turned(tmp_path / "large.jpg", pixels(height=600, width=1200), 8)
    values = scan(np.uint16, 0, 60_000)
    Image.fromarray(values).save(tmp_path / "deep.png")
    files = [tmp_path / name for name in ("small.png", "large.jpg", "deep.png")]
    small, large, deep = write_thumbnails(files, tmp_path / "out").values()
    assert small is not None
    assert large is not None
    assert deep is not None
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / small.file)), pixels())
    assert (large.width, large.height) == (512, 256)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / deep.file)), spread(values))


def test_an_image_is_written_once_however_often_it_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    told = []
    write_thumbnails([tmp_path / "a.png"] * 5, tmp_path / "out", advance=lambda: told.append(1))
    assert len(list((tmp_path / "out" / "images").iterdir())) == len(told) == 1


def test_names_do_not_come_from_the_data(tmp_path: Path) -> None:
    odd = tmp_path / 'x" onerror="alert(1).png'
    Image.new("RGB", (8, 8)).save(odd)
    (thumbnail,) = write_thumbnails([odd], tmp_path / "out").values()
    assert thumbnail is not None
    assert thumbnail.file.removeprefix("images/").removesuffix(".png").isalnum()


def test_missing_and_broken_images_have_a_placeholder(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    paths = [tmp_path / "broken.png", tmp_path / "gone.png"]
    thumbnails = write_thumbnails(paths, tmp_path / "out")
    assert [shown(path, thumbnails) for path in paths] == [{"missing": "broken.png"}, {"missing": "gone.png"}]
    assert shown(Path("a"), {Path("a"): Thumbnail("images/a.png", 3, 2)}) == {
        "src": "images/a.png", "width": 3, "height": 2,
    }  # fmt: skip
