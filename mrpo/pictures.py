"""The one way from an image to the RGB picture that everybody sees: policy, sampler, judge, samples and report.

A picture is as a viewer shows it. It stands upright (EXIF orientation) and lies on white where it is transparent.
Greyscale of 16 or 32 bits, and of floats, goes linearly from its own least value, 0, to its largest, 255: the window of
a medical image is not guessed, and who wants one exports the image with it.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
from PIL import ExifTags, Image

Picture = Path | Image.Image

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDES_SWAPPED = (5, 6, 7, 8)
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
# Entries of `Image.info` that a reader would apply to the pixels.
_APPLIED = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp", "transparency"}
_LATE_TEXT = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")


def shown_picture(image: Picture) -> Image.Image:
    """`image` as it is shown, in mode RGB, with nothing beside it that a reader could apply once more.

    A picture in memory that is so already is returned as it is. Of several frames the first is taken.

    Raises:
        OSError: a file is missing, broken or no image, or pixels are NaN or infinite.
    """
    if isinstance(image, Path):
        with open_image(image) as opened:
            return _rgb(opened)
    image.load()
    is_so = image.mode == "RGB" and not _APPLIED & image.info.keys() and _orientation(image) == 1
    return image if is_so else _rgb(image)


def shown_size(image: Picture) -> tuple[int, int]:
    """(width, height) of `shown_picture(image)`; a file's pixels are decoded only as `open_image` says.

    Raises:
        OSError: a file is missing or is not an image.
    """
    if isinstance(image, Path):
        with open_image(image) as opened:
            return shown_size(opened)
    width, height = image.size
    return (height, width) if _orientation(image) in _SIDES_SWAPPED else (width, height)


def is_plain(image: Image.Image) -> bool:
    """Whether decoding alone shows `image`: it is stored upright and opaque, and is no greyscale of 16 or 32 bits.

    Raises:
        OSError: its pixels have to be looked at, and are broken.
    """
    if image.mode in _DEEP_MODES or _orientation(image) != 1:
        return False
    # Programs write an alpha channel that hides nothing into many files.
    return not image.has_transparency_data or image.convert("RGBA").getchannel("A").getextrema() == (255, 255)


def open_image(file: Path | BinaryIO) -> Image.Image:
    """`file`, opened with all that stands beside its pixels, which are decoded on first use.

    Only a PNG file that tells its orientation behind its pixels is decoded at once.

    Raises:
        OSError: the file is missing or is not an image.
    """
    image = Image.open(file)
    if image.format == "PNG" and image.fp is not None and _tells_orientation_late(image.fp):
        image.load()
    return image


def _rgb(image: Image.Image) -> Image.Image:
    """A new picture, without metadata."""
    image.load()  # Pillow may learn here how the image is turned, and turns a TIFF file itself
    if image.mode in _DEEP_MODES:
        picture = _stretched(image).convert("RGB")
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        picture = Image.new("RGB", image.size, "white")
        picture.paste(rgba, mask=rgba)
    else:
        picture = image.convert("RGB")
    picture.info = {}
    turn = _TURNS.get(_orientation(image))
    return picture if turn is None else picture.transpose(turn)


def _stretched(image: Image.Image) -> Image.Image:
    """Greyscale of any depth in 8 bits, from the least to the largest value; one value alone becomes black.

    A value that stands for transparent pixels becomes white, and does not count among the others.
    """
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        name = getattr(image, "filename", "") or "a picture in memory"
        raise OSError(f"{name}: pixels are NaN or infinite; replace them by the value that they should be shown with")
    hidden = values == image.info.get("transparency", np.nan)
    seen = values[~hidden]
    low, high = (seen.min(), seen.max()) if seen.size else (0.0, 0.0)
    grey = np.rint((values - low) * (255 / ((high - low) or 1.0)))
    return Image.fromarray(np.where(hidden, 255, grey).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that is still to be applied, 1 to 8."""
    if image.format == "TIFF":
        return 1  # Pillow applies it where it decodes, and gives the size after that
    try:
        # The method of PNG files would decode them first.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # PIL's parsers raise SyntaxError, ValueError, struct.error, ... on broken metadata
        return 1
    return orientation if orientation in _TURNS else 1


def _tells_orientation_late(png: IO[bytes]) -> bool:
    """Whether EXIF or XMP stands behind the pixels of a PNG file, where some programs write it; decodes nothing."""
    start = png.tell()
    png.seek(8)  # behind the signature
    behind = found = False
    while not found and len(head := png.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        behind = behind or kind == b"IDAT"
        text = png.read(min(length, 32)) if kind in (b"iTXt", b"tEXt", b"zTXt") else b""
        found = behind and (kind == b"eXIf" or text.startswith(_LATE_TEXT))
        png.seek(length - len(text) + 4, os.SEEK_CUR)  # 4: the checksum
    png.seek(start)
    return found
