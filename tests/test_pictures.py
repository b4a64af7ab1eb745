"""What a picture shows, whatever it is stored as."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from image_cases import ODD, STORED, behind_the_pixels, exif, pixels, scan, write_turned
from PIL import Image, PngImagePlugin

from mrpo.pictures import is_plain, shown_picture, shown_size


def greys(image: Path | Image.Image) -> np.ndarray:
    shown = np.asarray(shown_picture(image))
    assert shown.shape[2] == 3
    assert (shown == shown[..., :1]).all()
    return shown[..., 0].astype(int)


@pytest.mark.parametrize("name", ODD)
def test_what_is_shown(tmp_path: Path, name: str) -> None:
    image, expected = ODD[name](tmp_path)
    size = shown_size(image)
    shown = shown_picture(image)
    assert shown.mode == "RGB"
    assert size == shown.size == expected.shape[1::-1]
    # Blending and ink are rounded once or twice.
    assert np.abs(np.asarray(shown).astype(int) - expected).max() <= 1
    assert not shown.info
    assert shown.getexif().get(274, 1) == 1
    assert np.array_equal(np.asarray(shown_picture(shown)), np.asarray(shown))
    assert shown_size(image) == size  # decoded by now


@pytest.mark.parametrize("orientation", STORED)
def test_a_photograph_stands_upright(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:8, :8, 0] = upright[-8:, :8, 1] = upright[:8, -8:, 2] = 250
    file = write_turned(tmp_path / "photograph.jpg", upright, orientation)
    assert shown_size(file) == (48, 32)
    assert np.abs(np.asarray(shown_picture(file)).astype(int) - upright).max() < 12  # JPEG


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_a_deep_scan_keeps_its_order_and_contrast(tmp_path: Path, suffix: str) -> None:
    values = scan(np.uint16, 300, 4_095)
    Image.fromarray(values).save(tmp_path / f"scan{suffix}")
    found = greys(tmp_path / f"scan{suffix}").ravel()[np.argsort(values, axis=None)]
    assert (np.diff(found) >= 0).all()
    assert (found[0], found[-1]) == (0, 255)
    assert len(np.unique(found)) > 200


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_one_value_alone_is_black(mode: str) -> None:
    assert not greys(Image.new(mode, (3, 2), 900)).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_float_image_without_a_largest_value_is_refused_by_name(tmp_path: Path, value: float) -> None:
    values = scan(np.float32, 0, 1)
    values[3, 4] = value
    Image.fromarray(values).save(tmp_path / "map.tiff")
    with pytest.raises(OSError, match=r"map\.tiff: pixels are NaN or infinite"):
        shown_picture(tmp_path / "map.tiff")
    with pytest.raises(OSError, match="a picture in memory: pixels are NaN or infinite"):
        shown_picture(Image.fromarray(values))


def test_a_black_drawing_on_nothing_can_be_seen() -> None:
    drawing = np.zeros((9, 9, 4), np.uint8)
    drawing[4, :, 3] = 255
    assert greys(Image.fromarray(drawing))[:, 0].tolist() == [255] * 4 + [0] + [255] * 4


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff"])
def test_ordinary_images_are_converted_and_no_more(tmp_path: Path, mode: str, suffix: str) -> None:
    picture = Image.fromarray(pixels(5)).convert(mode)
    picture.save(tmp_path / f"plain{suffix}")
    with Image.open(tmp_path / f"plain{suffix}") as opened:
        assert is_plain(opened)
        converted = opened.convert("RGB")
    for image in (tmp_path / f"plain{suffix}", picture):
        assert np.array_equal(np.asarray(shown_picture(image)), np.asarray(converted))


def test_an_rgb_picture_in_memory_is_not_copied(tmp_path: Path) -> None:
    picture = Image.fromarray(pixels())
    assert shown_picture(picture) is picture
    picture.save(tmp_path / "a.png", dpi=(72, 72))
    opened = Image.open(tmp_path / "a.png")
    assert shown_picture(opened) is opened


@pytest.mark.parametrize("tags", [b"Exif\0\0nothing of use", b"", exif(0).tobytes(), exif(9).tobytes()])
def test_broken_metadata_turns_nothing(tmp_path: Path, tags: bytes) -> None:
    Image.fromarray(pixels()).save(tmp_path / "odd.png", exif=tags)
    assert shown_size(tmp_path / "odd.png") == (20, 12)
    opened = Image.open(tmp_path / "odd.png")
    for image in (tmp_path / "odd.png", opened):
        shown = shown_picture(image)
        assert np.array_equal(np.asarray(shown), pixels())
        assert "exif" not in shown.info  # readers after us might stumble over it


def test_an_orientation_told_in_xmp_counts_wherever_it_stands(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_itxt("Comment", "long before" * 20)
    text.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>')
    stored = Image.fromarray(np.ascontiguousarray(STORED[6](pixels())))
    stored.save(tmp_path / "early.png", pnginfo=text)
    stored.save(tmp_path / "late.png", pnginfo=text)
    behind_the_pixels(tmp_path / "late.png", b"iTXt")
    for file in (tmp_path / "early.png", tmp_path / "late.png"):
        assert shown_size(file) == (20, 12)
        assert np.array_equal(np.asarray(shown_picture(file)), pixels())


def test_the_size_of_a_torn_file_is_known_and_its_pixels_are_not(tmp_path: Path) -> None:
    file = write_turned(tmp_path / "torn.png", pixels(), 8)
    file.write_bytes(file.read_bytes()[:150])
    assert shown_size(file) == (20, 12)
    with pytest.raises(OSError, match=r"(?i)truncated"):
        shown_picture(file)


def test_of_several_frames_the_first_is_shown(tmp_path: Path) -> None:
    frames = [Image.fromarray(pixels(seed)) for seed in range(3)]
    frames[0].save(tmp_path / "stack.tiff", save_all=True, append_images=frames[1:])
    assert np.array_equal(np.asarray(shown_picture(tmp_path / "stack.tiff")), pixels(0))


def test_an_opaque_alpha_channel_changes_nothing(tmp_path: Path) -> None:
    Image.fromarray(pixels()).convert("RGBA").save(tmp_path / "opaque.png")
    assert np.array_equal(np.asarray(shown_picture(tmp_path / "opaque.png")), pixels())
    with Image.open(tmp_path / "opaque.png") as opened:
        assert is_plain(opened)
