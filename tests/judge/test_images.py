"""What a judge is shown is what the policy sees, and kept verdicts go with it."""

from __future__ import annotations

import base64
import hashlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_cases import ODD, exif, pixels, write_turned
from PIL import Image

from mrpo.judge.images import image_digest, image_url
from mrpo.pictures import shown_picture


def sent(url: str) -> tuple[str, bytes]:
    prefix, _, content = url.partition(";base64,")
    return prefix.removeprefix("data:"), base64.b64decode(content)


@pytest.mark.parametrize("name", ODD)
def test_the_judge_is_sent_the_picture_that_the_policy_sees(tmp_path: Path, name: str) -> None:
    image, _ = ODD[name](tmp_path)
    mime, content = sent(image_url(image))
    assert mime == "image/png"
    with Image.open(io.BytesIO(content)) as received:
        # Nothing is left to how the endpoint reads it.
        assert received.mode in ("RGB", "L", "P")
        assert received.getexif().get(274, 1) == 1
        assert not received.has_transparency_data
        assert np.array_equal(np.asarray(received.convert("RGB")), np.asarray(shown_picture(image)))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_plain_files_travel_as_they_are(tmp_path: Path, mode: str, format: str) -> None:
    picture = Image.fromarray(pixels()).convert(mode if format == "PNG" or mode == "L" else "RGB")
    picture.save(tmp_path / "plain", format)
    assert sent(image_url(tmp_path / "plain")) == (f"image/{format.lower()}", (tmp_path / "plain").read_bytes())


def write_16_bit_colours(file: Path) -> None:
    """A PNG file of 16 bits a channel, which Pillow does not write."""
    rows = np.random.default_rng(3).integers(0, 65_536, (12, 20 * 3)).astype(">u2")
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", 20, 12, 16, 2, 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + content, b"IEND"]
    framed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(framed))


def test_colours_that_readers_disagree_on_are_sent_as_shown(tmp_path: Path) -> None:
    Image.fromarray(pixels()).convert("CMYK").save(tmp_path / "print.jpg")
    write_16_bit_colours(tmp_path / "deep.png")
    for file in (tmp_path / "print.jpg", tmp_path / "deep.png"):
        mime, content = sent(image_url(file))
        assert mime == "image/png"
        assert content != file.read_bytes()
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), np.asarray(shown_picture(file)))


def test_a_turned_image_is_scaled_down_upright(tmp_path: Path) -> None:
    file = write_turned(tmp_path / "tall.jpg", pixels(height=100, width=50), 6)
    _, content = sent(image_url(file, max_pixels=200))
    assert Image.open(io.BytesIO(content)).size == (10, 20)


@pytest.mark.parametrize("name", ["plain.png", "plain.jpg", "plain.bmp", "opaque.png"])
def test_verdicts_on_plain_files_are_found_by_their_bytes(tmp_path: Path, name: str) -> None:
    Image.fromarray(pixels()).convert("RGBA" if "opaque" in name else "RGB").save(tmp_path / name)
    assert image_digest(tmp_path / name) == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_verdicts_on_plain_pictures_are_found_by_their_pixels() -> None:
    expected = hashlib.sha256(b"RGB (20, 12) " + pixels().tobytes()).hexdigest()
    assert image_digest(Image.fromarray(pixels())) == expected


@pytest.mark.parametrize("name", ["orientation 6.png", "16 bits, PNG", "RGBA, PNG", "colour key, PNG"])
def test_verdicts_on_images_that_used_to_be_shown_otherwise_are_not_found(tmp_path: Path, name: str) -> None:
    image, _ = ODD[name](tmp_path)
    assert isinstance(image, Path)
    shown = shown_picture(image)
    assert image_digest(image) == hashlib.sha256(f"RGB {shown.size} ".encode() + shown.tobytes()).hexdigest()


def test_a_picture_in_memory_counts_by_how_it_is_turned() -> None:
    digests = set()
    for orientation in (1, 6, 8):
        stored = Image.fromarray(pixels())
        stored.info["exif"] = exif(orientation).tobytes()
        digests.add(image_digest(stored))
    assert len(digests) == 3


@pytest.mark.parametrize("content", [b"no image", b"\x89PNG\r\n\x1a\nnothing"])
def test_what_is_no_image_is_an_os_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.png").write_bytes(content)
    for read in (image_url, image_digest):
        with pytest.raises(OSError, match=r"broken\.png"):
            read(tmp_path / "broken.png")
