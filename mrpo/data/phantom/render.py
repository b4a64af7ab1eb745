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
_CENTRES = {
    "upper left": (14, 21),
    "upper middle": (32, 20),
    "upper right": (50, 21),
    "lower left": (14, 44),
    "lower middle": (32, 43),
    "lower right": (50, 44),
}
# Half axes (x, y) and gray offset: enough to tell the organs apart for an eye that knows them.
_SHAPES = {
    "liver": (9.0, 9.0, 0.05),
    "stomach": (8.0, 8.5, -0.05),
    "spleen": (8.0, 9.0, 0.02),
    "right kidney": (8.0, 8.5, 0.08),
    "pancreas": (8.5, 8.0, 0.0),
    "left kidney": (8.0, 8.5, 0.08),
}
# Four spots on a cross: whatever three of them are taken, lesions stay apart by at least two pixels.
_SPOTS = ((0, -5), (5, 0), (0, 5), (-5, 0))
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
    field = _fan() if scene.modality == "ultrasound" else _blob(32, 32, 30 + rng.uniform(-1, 1), 29, power=3)
    inner = _fan(inset=3) if scene.modality == "ultrasound" else _blob(32, 32, 27, 26, power=3)
    pixels = np.where(inner, np.float32(style.tissue), np.float32(style.fat))
    if style.spine is not None:
        pixels[_blob(32 + rng.uniform(-1, 1), 57, 5, 3.5)] = style.spine
    lesions = np.zeros((SIZE, SIZE), dtype=bool)
    for organ in scene.organs:
        lesions |= _paint_organ(pixels, organ, style.organ, rng)
    pixels = _apply_texture(pixels, style.texture, np.random.default_rng(scene.pixel_seed))
    # Lesions go on last: texture must not hide what the questions count.
    pixels[lesions] = _LESION_GRAY[scene.tone]
    pixels[~field] = 0.0
    gray = (pixels.clip(0, 1) * 255).astype(np.uint8)
    return Image.fromarray(np.repeat(gray[:, :, None], 3, axis=2))


def _paint_organ(pixels: Gray, organ: Organ, gray: float, rng: random.Random) -> Mask:
    """Paints the organ's tissue and returns where its lesions are."""
    x, y = (centre + rng.randint(-1, 1) for centre in _CENTRES[organ.place])
    half_x, half_y, offset = _SHAPES[organ.name]
    pixels[_blob(x, y, half_x * rng.uniform(0.95, 1.1), half_y * rng.uniform(0.95, 1.1), power=3)] = gray + offset
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    for dx, dy in rng.sample(_SPOTS, organ.lesions):
        mask |= _blob(x + dx + rng.uniform(-0.5, 0.5), y + dy + rng.uniform(-0.5, 0.5), _LESION_RADIUS, _LESION_RADIUS)
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
