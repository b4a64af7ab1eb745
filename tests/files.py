"""Small files for the tests of data sets: pictures and tables."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def image_bytes(seed: int, format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    picture(seed).save(stream, format)
    return stream.getvalue()


def write_images(folder: Path, *names: str) -> None:
    """Pictures that differ by name, in the format of the name's suffix."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(sum(name.encode())).save(folder / name)


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
