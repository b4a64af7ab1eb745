"""Thumbnails of the images that traces refer to: one file each, however many traces share it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from mrpo.pictures import open_image, shown_picture

LONGEST_SIDE = 512
# Below this a picture is kept to the pixel; JPEG saves nothing there and blurs what little there is.
_LOSSLESS_SIDE = 128


@dataclass(frozen=True)
class Thumbnail:
    """A file below the report's folder and its size in pixels."""

    file: str
    width: int
    height: int


def write_thumbnails(
    images: Iterable[Path], out: Path, *, advance: Callable[[], None] = lambda: None
) -> dict[Path, Thumbnail | None]:
    """Write OUT/images/*.jpg or .png, at most 512 pixels long; None for an image that is missing or broken.

    Args:
        images: absolute paths; repeated ones are read once.
        advance: called after each image.
    """
    (out / "images").mkdir(parents=True, exist_ok=True)
    distinct = list(dict.fromkeys(images))
    thumbnails: dict[Path, Thumbnail | None] = {}
    # Decoding and scaling release the interpreter lock.
    with ThreadPoolExecutor() as pool:
        for image, thumbnail in zip(distinct, pool.map(partial(_write, out=out), distinct), strict=True):
            thumbnails[image] = thumbnail
            advance()
    return thumbnails


def _write(path: Path, *, out: Path) -> Thumbnail | None:
    try:
        with open_image(path) as opened:
            opened.draft("RGB", (LONGEST_SIDE, LONGEST_SIDE))
            picture = shown_picture(opened)
            picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    except Exception:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        return None
    lossless = max(picture.size) <= _LOSSLESS_SIDE
    name = f"images/{hashlib.sha256(str(path).encode()).hexdigest()[:16]}.{'png' if lossless else 'jpg'}"
    picture.save(out / name, quality=85)
    return Thumbnail(name, *picture.size)


def shown(path: Path, thumbnails: Mapping[Path, Thumbnail | None]) -> dict[str, object]:
    """What the browser is told of one image: its thumbnail, or the name of what could not be read."""
    thumbnail = thumbnails.get(path)
    if thumbnail is None:
        return {"missing": path.name}
    return {"src": thumbnail.file, "width": thumbnail.width, "height": thumbnail.height}
