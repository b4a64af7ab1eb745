"""Images whose pixels do not say by themselves how they are shown, each with the picture that a reader should see."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

Array = np.ndarray
Case = Callable[[Path], tuple[Path | Image.Image, Array]]

# How an upright picture is stored, from the standard's words: which side of it the first row and the first column show.
STORED: dict[int, Callable[[Array], Array]] = {
    1: lambda upright: upright,  # top, left
    2: lambda upright: upright[:, ::-1],  # top, right
    3: lambda upright: upright[::-1, ::-1],  # bottom, right
    4: lambda upright: upright[::-1],  # bottom, left
    5: lambda upright: upright.swapaxes(0, 1),  # left, top
    6: lambda upright: upright[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda upright: upright[::-1].swapaxes(0, 1),  # left, bottom
}


def pixels(seed: int = 0, height: int = 12, width: int = 20) -> Array:
    """(H, W, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    return tags


def write_turned(file: Path, upright: Array, orientation: int) -> Path:
    """Stores `upright` as `orientation` says, and says so; without loss where the format can."""
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    options = {".webp": {"lossless": True}, ".jpg": {"quality": 100, "subsampling": 0}}.get(file.suffix, {})
    stored.save(file, exif=exif(orientation), **options)
    return file


def behind_the_pixels(file: Path, kind: bytes) -> Path:
    """The same PNG file with its chunks of this kind in front of its end."""
    content = file.read_bytes()
    chunks, place = [], 8
    while place < len(content):
        (length,) = struct.unpack_from(">I", content, place)
        chunks.append(content[place : place + length + 12])
        place += length + 12
    moved = [chunk for chunk in chunks if chunk[4:8] == kind]
    assert moved
    *others, end = (chunk for chunk in chunks if chunk[4:8] != kind)
    file.write_bytes(content[:8] + b"".join([*others, *moved, end]))
    return file


def spread(values: Array) -> Array:
    """(H, W, 3) greys of (H, W) values, their least black and their largest white."""
    levels = np.interp(values.astype(np.float64), [values.min(), values.max()], [0, 255])
    return np.round(levels).astype(np.uint8)[..., None].repeat(3, axis=2)


def scan(dtype: type, low: float, high: float) -> Array:
    """(12, 20) values from `low` to `high`, all distinct, in random order."""
    values = np.linspace(low, high, 240)
    return np.random.default_rng(1).permutation(values).reshape(12, 20).astype(dtype)


def on_white(colors: Array, alpha: Array) -> Array:
    """(H, W, 3) colours and (H, W) alpha, 0 to 255, over white."""
    share = alpha[..., None] / 255
    return np.round(colors * share + 255 * (1 - share)).astype(np.uint8)


def _alpha() -> Array:
    alpha = np.random.default_rng(2).integers(0, 256, (12, 20), dtype=np.uint8)
    alpha[:4], alpha[4:8] = 0, 255
    return alpha


def _turned(suffix: str, orientation: int) -> Case:
    return lambda folder: (write_turned(folder / f"turned{suffix}", pixels(), orientation), pixels())


def _deep(suffix: str, dtype: type, low: float, high: float) -> Case:
    def write(folder: Path) -> tuple[Path, Array]:
        values = scan(dtype, low, high)
        Image.fromarray(values).save(folder / f"scan{suffix}")
        return folder / f"scan{suffix}", spread(values)

    return write


def _in_memory(mode: str) -> Case:
    colors, alpha = pixels(), _alpha()
    if mode == "CMYK":
        inks = np.concatenate([colors, alpha[..., None] // 2], axis=2)
        paper = (255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255
        return lambda folder: (Image.fromarray(inks, "CMYK"), np.round(paper).astype(np.uint8))
    if mode in ("I", "F", "I;16"):
        values = scan({"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode], 100, 30_000)
        return lambda folder: (Image.fromarray(values), spread(values))
    if mode == "1":
        bits = colors[..., 0] > 127
        return lambda folder: (Image.fromarray(bits), np.where(bits, 255, 0)[..., None].repeat(3, 2).astype(np.uint8))
    if mode == "PA":
        picture = Image.fromarray(colors[..., 0]).convert("P").convert("PA")
        picture.putalpha(Image.fromarray(alpha))
        return lambda folder: (picture, on_white(colors[..., :1].repeat(3, axis=2), alpha))
    bands = {"RGBA": colors, "LA": colors[..., :1]}[mode]
    picture = Image.fromarray(np.concatenate([bands, alpha[..., None]], axis=2))
    return lambda folder: (picture, on_white(bands + np.zeros_like(colors), alpha))


def _alpha_file(mode: str) -> Case:
    def write(folder: Path) -> tuple[Path, Array]:
        picture, expected = _in_memory(mode)(folder)
        assert isinstance(picture, Image.Image)
        picture.save(folder / "drawing.png")
        return folder / "drawing.png", expected

    return write


def _colour_key(suffix: str) -> Case:
    def write(folder: Path) -> tuple[Path, Array]:
        grey = np.arange(240, dtype=np.uint8).reshape(12, 20)
        palette = Image.fromarray(grey).convert("P")
        palette.save(folder / f"key{suffix}", transparency=7)
        return folder / f"key{suffix}", np.where(grey == 7, 255, grey)[..., None].repeat(3, axis=2)

    return write


def _deep_colour_key(folder: Path) -> tuple[Path, Array]:
    values = scan(np.uint16, 1_000, 5_000)
    hidden = np.zeros(values.shape, bool)
    hidden[:, :3] = True
    Image.fromarray(np.where(hidden, 65_535, values).astype(np.uint16)).save(folder / "key.png", transparency=65_535)
    levels = np.interp(values, [values[~hidden].min(), values[~hidden].max()], [0, 255])
    return folder / "key.png", np.where(hidden, 255, np.round(levels)).astype(np.uint8)[..., None].repeat(3, axis=2)


def _late(folder: Path) -> tuple[Path, Array]:
    return behind_the_pixels(write_turned(folder / "late.png", pixels(), 6), b"eXIf"), pixels()


def _turned_in_memory(folder: Path) -> tuple[Image.Image, Array]:
    return Image.open(write_turned(folder / "memory.png", pixels(), 6)), pixels()


ODD: dict[str, Case] = {
    **{f"orientation {n}{suffix}": _turned(suffix, n) for suffix in (".png", ".tiff", ".webp") for n in STORED},
    **{f"{mode} in memory": _in_memory(mode) for mode in ("CMYK", "I", "F", "I;16", "1", "RGBA", "LA", "PA")},
    "orientation behind the pixels": _late,
    "orientation in memory": _turned_in_memory,
    "16 bits, PNG": _deep(".png", np.uint16, 1_000, 5_000),
    "16 bits, TIFF": _deep(".tiff", np.uint16, 0, 65_535),
    "32 bits, TIFF": _deep(".tif", np.int32, -100_000, 2_000_000_000),
    "float, TIFF": _deep(".tif", np.float32, -0.25, 0.5),
    "RGBA, PNG": _alpha_file("RGBA"),
    "LA, PNG": _alpha_file("LA"),
    "colour key, PNG": _colour_key(".png"),
    "colour key, GIF": _colour_key(".gif"),
    "16 bits with a colour key": _deep_colour_key,
}
