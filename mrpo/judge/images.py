"""Images as a judge's endpoint takes them: data URLs, encoded once for all completions of a prompt."""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from mrpo.pictures import Picture, is_plain, open_image, shown_picture


class PerPicture:
    """What `compute` makes of a picture, kept for the last `size` of them; for one thread.

    Files count by path, size and time of change. Pictures in memory count by identity, as the completions of a prompt
    share their example; a kept one is held, so that no other can take its id.
    """

    def __init__(self, compute: Callable[[Picture], str], *, size: int = 64) -> None:
        self._compute, self._size = compute, size
        self._kept: OrderedDict[object, tuple[Picture, str]] = OrderedDict()

    def __call__(self, picture: Picture) -> str:
        """
        Raises:
            OSError: the picture is a file that cannot be read.
        """
        key = _identity(picture)
        if key not in self._kept:
            self._kept[key] = (picture, self._compute(picture))
            if len(self._kept) > self._size:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key][1]


def _identity(picture: Picture) -> object:
    if not isinstance(picture, Path):
        return id(picture)
    status = picture.stat()
    return picture, status.st_size, status.st_mtime_ns


def image_url(image: Picture, max_pixels: int | None = None) -> str:
    """A data URL of the picture that the policy sees, scaled down to at most `max_pixels`.

    The bytes of a JPEG or PNG file that any reader shows alike travel as they are, anything else as PNG.

    Raises:
        OSError: the image cannot be read.
    """
    with _unreadable_is_os_error(image):
        if isinstance(image, Path):
            with open_image(image) as opened:
                if _may_travel_as_it_is(opened) and not _is_larger(opened, max_pixels):
                    return _data_url(Image.MIME[opened.format or ""], image.read_bytes())
        picture = shown_picture(image)
    if max_pixels is not None and _is_larger(picture, max_pixels):
        scale = math.sqrt(max_pixels / (picture.width * picture.height))
        width, height = (max(1, int(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return _data_url("image/png", buffer.getvalue())


def image_digest(image: Picture) -> str:
    """A digest of the file's bytes, or of the picture's mode, size and pixels.

    Where it takes more than decoding to show the image, of the shown picture: how it is shown is then a part of it.

    Raises:
        OSError: the image cannot be read.
    """
    with _unreadable_is_os_error(image):
        if isinstance(image, Path):
            with open_image(image) as opened:
                if is_plain(opened):
                    return hashlib.sha256(image.read_bytes()).hexdigest()
        picture = image if isinstance(image, Image.Image) and is_plain(image) else shown_picture(image)
        content = hashlib.sha256(f"{picture.mode} {picture.size} ".encode())
        content.update(picture.tobytes())
        return content.hexdigest()


@contextmanager
def _unreadable_is_os_error(image: Picture) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # PIL's decoders raise SyntaxError, ValueError, DecompressionBombError, ...
        raise OSError(f"{image}: {error}") from error


def _may_travel_as_it_is(opened: Image.Image) -> bool:
    """Readers make different colours of CMYK, and of 16 bits a channel, of which Pillow keeps the upper 8."""
    if opened.format == "PNG":
        raw_modes = [str(tile[3]) for tile in getattr(opened, "tile", ())]
        return not any("16" in mode for mode in raw_modes) and is_plain(opened)
    return opened.format == "JPEG" and opened.mode != "CMYK" and is_plain(opened)


def _is_larger(image: Image.Image, max_pixels: int | None) -> bool:
    return max_pixels is not None and image.width * image.height > max_pixels


def _data_url(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"
