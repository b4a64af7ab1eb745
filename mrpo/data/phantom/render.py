"""Scene -> 64 x 64 picture. Each modality shows three signs: how spine and fat look, and the texture."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mrpo.data.phantom.scene import Modality, Organ, Scene

SIZE = 64
Gray = NDArray[np.float32]  # (SIZE, SIZE), 0 black to 1 white
Mask = NDArray[np.bool_]  # (SIZE, SIZE)

_Y, _X = np.mgrid[:SIZE, :SIZE].astype(np.float32)
# Half axes (x, y), shift of the outline to the right, and gray offset, by which an eye may tell organs apart.
_SHAPES = {
    "liver": (12.5, 7.5, 6.0, 0.05),
    "stomach": (7.0, 7.5, -0.5, -0.05),
    "spleen": (6.5, 7.5, 0.0, 0.02),
    "right kidney": (6.5, 7.0, 0.0, 0.08),
    "pancreas": (8.5, 6.5, 1.5, 0.0),
    "left kidney": (6.5, 7.0, 0.0, 0.08),
}
# Centre (x, y) of the lesions of each place. Every place lies in one 16 x 16 cell of the picture, and its four lesion
# spots in the 8 x 8 quarters of that cell: a vision tower with patches of 8 pixels, merged two by two, can count them.
_CENTRES = {
    "upper left": (9, 24),
    "upper middle": (40, 24),
    "upper right": (55, 24),
    "lower left": (9, 40),
    "lower middle": (24, 40),
    "lower right": (55, 40),
}
_SPOTS = ((-3.4, -3.4), (3.4, -3.4), (-3.4, 3.4), (3.4, 3.4))
_LESION_RADIUS = 2.3
_LESION_GRAY = {"bright": 1.0, "dark": 0.04}


@dataclass(frozen=True)
class _Style:
    """Gray of tissue, organs, fat rim and spine (None: not seen), and the texture over all of it."""

    tissue: float
    organ: float
    fat: float
    spine: float | None
    texture: str


_STYLES: dict[Modality, _Style] = {
    "CT": _Style(tissue=0.30, organ=0.48, fat=0.12, spine=0.95, texture="smooth"),
    "MRI": _Style(tissue=0.22, organ=0.50, fat=0.90, spine=0.04, texture="shaded"),
    "ultrasound": _Style(tissue=0.28, organ=0.50, fat=0.42, spine=None, texture="grainy"),
}


def render(scene: Scene) -> Image.Image:
    """The RGB picture of `scene`, 64 x 64; equal scenes give equal pixels."""
    rng = random.Random(scene.pixel_seed)
    style = _STYLES[scene.modality]
    field, inner = _outlines(scene.modality, height=rng.uniform(23.5, 26))
    pixels = np.where(inner, np.float32(style.tissue), np.float32(style.fat))
    if style.spine is not None:
        pixels[_blob(32 + rng.uniform(-1, 1), 51, 4.5, 3)] = style.spine
    lesions = np.zeros((SIZE, SIZE), dtype=bool)
    for organ in scene.organs:
        lesions |= _paint_organ(pixels, organ, style.organ, rng)
    pixels = _apply_texture(pixels, style.texture, np.random.default_rng(scene.pixel_seed))
    pixels[~field] = 0.0
    # Lesions go on last: texture must not hide what the questions count.
    pixels[lesions] = _LESION_GRAY[scene.tone]
    gray = (pixels.clip(0, 1) * 255).astype(np.uint8)
    return Image.fromarray(np.repeat(gray[:, :, None], 3, axis=2))


def _outlines(modality: Modality, height: float) -> tuple[Mask, Mask]:
    """What the picture shows of the body, with and without the rim of fat. `height` is the half axis of a slice."""
    if modality == "ultrasound":
        return _fan(), _fan(inset=3)
    return _blob(31.5, 32, 32, height, power=4), _blob(31.5, 32, 29.5, height - 2.5, power=4)


def _paint_organ(pixels: Gray, organ: Organ, gray: float, rng: random.Random) -> Mask:
    """Paints the organ's tissue and returns where its lesions are."""
    x, y = (centre + rng.uniform(-0.5, 0.5) for centre in _CENTRES[organ.place])
    half_x, half_y, shift, offset = _SHAPES[organ.name]
    scale = rng.uniform(0.95, 1.05)
    pixels[_blob(x + shift, y, half_x * scale, half_y * scale, power=4)] = gray + offset
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    for dx, dy in rng.sample(_SPOTS, organ.lesions):
        mask |= _blob(x + dx + rng.uniform(-0.4, 0.4), y + dy + rng.uniform(-0.4, 0.4), _LESION_RADIUS, _LESION_RADIUS)
    return mask


def _blob(x: float, y: float, half_x: float, half_y: float, power: int = 2) -> Mask:
    """A filled ellipse; a higher power gives squarer corners."""
    return np.abs((_X - x) / half_x) ** power + np.abs((_Y - y) / half_y) ** power <= 1


def _fan(inset: float = 0.0) -> Mask:
    """The sector that a curved ultrasound probe sees."""
    dx, dy = _X - 32, _Y + 20
    radius = np.hypot(dx, dy)
    return (radius >= 24 + inset) & (radius <= 82 - inset) & (np.abs(dx) <= 0.95 * dy - inset)


def _apply_texture(pixels: Gray, texture: str, rng: np.random.Generator) -> Gray:
    noise = rng.standard_normal((SIZE, SIZE), dtype=np.float32)
    if texture == "grainy":
        return pixels * (1 + 0.25 * noise)
    if texture == "shaded":
        pixels = pixels * (0.7 + 0.5 * _X / SIZE)
    return pixels + 0.02 * noise
