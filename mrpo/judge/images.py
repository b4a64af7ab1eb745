"""Images as a judge's endpoint takes them: data URLs, encoded once for all completions of a prompt."""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from PIL import Image

Picture = Path | Image.Image


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
    """A data URL: the bytes of a JPEG or PNG file as they are, anything else, or larger than `max_pixels`, as PNG.

    Raises:
        OSError: the image cannot be read.
    """
    if isinstance(image, Path):
        try:
            with Image.open(image) as opened:
                if opened.format in ("JPEG", "PNG") and not _is_larger(opened, max_pixels):
                    return _data_url(Image.MIME[opened.format], image.read_bytes())
                return image_url(opened.convert("RGB"), max_pixels)
        except OSError:
            raise
        except Exception as error:  # PIL's decoders raise SyntaxError, ValueError, DecompressionBombError, ...
            raise OSError(f"{image}: {error}") from error
    picture = image.convert("RGB")
    if max_pixels is not None and _is_larger(picture, max_pixels):
        scale = math.sqrt(max_pixels / (picture.width * picture.height))
        width, height = (max(1, int(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return _data_url("image/png", buffer.getvalue())


def image_digest(image: Picture) -> str:
    """A digest of the file's bytes, or of the picture's mode, size and pixels.

    Raises:
        OSError: the image cannot be read.
    """
    if isinstance(image, Path):
        with image.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    content = hashlib.sha256(f"{image.mode} {image.size} ".encode())
    content.update(image.tobytes())
    return content.hexdigest()


def _is_larger(image: Image.Image, max_pixels: int | None) -> bool:
    return max_pixels is not None and image.width * image.height > max_pixels


def _data_url(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"
