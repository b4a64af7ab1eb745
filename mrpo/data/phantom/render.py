"""Scene -> 64 x 64 picture. Each modality shows three signs: how spine and fat look, and the texture.

A look says how hard the signs are to see. `plain` is the easy default. In `hard`, lesions may be faint, organs lie off
the grid of the vision tower's cells, and noise covers everything, so that perception stays imperfect. `shifted` is for
tests only: as hard, from a device with other gray values and on a body whose organs lie and measure otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mrpo.data.phantom.scene import Modality, Organ, Scene

Look = Literal["plain", "hard", "shifted"]
LOOKS: tuple[Look, ...] = get_args(Look)

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


_MEAN_TISSUE = 0.27
_UNSEEN_STYLES: dict[Modality, _Style] = {
    "CT": _Style(tissue=0.36, organ=0.55, fat=0.16, spine=0.90, texture="smooth"),
    "MRI": _Style(tissue=0.27, organ=0.46, fat=0.82, spine=0.08, texture="shaded"),
    "ultrasound": _Style(tissue=0.22, organ=0.44, fat=0.36, spine=None, texture="grainy"),
}


@dataclass(frozen=True)
class _Difficulty:
    """How a look departs from the plain one.

    signs: range of how far fat and spine stand out from the tissue, 1 being fully; jitter: how far an organ may lie
    from its centre, in pixels; contrast: range of a scene's lesion contrast, 1 being full; noise: standard deviation
    of what lies over everything; shift: how far all organs may be moved together, in pixels; sizes: range of an
    organ's scale.
    """

    styles: Mapping[Modality, _Style]
    signs: tuple[float, float]
    jitter: float
    contrast: tuple[float, float]
    noise: float
    shift: float
    sizes: tuple[float, float]


_DIFFICULTIES: dict[Look, _Difficulty] = {
    "plain": _Difficulty(
        _STYLES, signs=(1.0, 1.0), jitter=0.5, contrast=(1.0, 1.0), noise=0.0, shift=0.0, sizes=(0.95, 1.05)
    ),
    "hard": _Difficulty(
        _STYLES, signs=(0.02, 0.4), jitter=1.5, contrast=(0.2, 0.7), noise=0.06, shift=0.0, sizes=(0.95, 1.05)
    ),
    "shifted": _Difficulty(
        _UNSEEN_STYLES, signs=(0.02, 0.4), jitter=1.5, contrast=(0.2, 0.7), noise=0.06, shift=1.0, sizes=(0.85, 1.1)
    ),
}


def render(scene: Scene, look: Look = "plain") -> Image.Image:
    """The RGB picture of `scene`, 64 x 64; equal scenes give equal pixels."""
    difficulty = _DIFFICULTIES[look]
    rng = random.Random(scene.pixel_seed)
    # Its own stream: what a look adds leaves the geometry of the scene as it is.
    extra = random.Random(f"{scene.pixel_seed}/{look}")
    strength = extra.uniform(*difficulty.signs)
    style = _faded(difficulty.styles[scene.modality], strength)
    field, inner = _outlines(scene.modality, height=rng.uniform(23.5, 26))
    pixels = np.where(inner, np.float32(style.tissue), np.float32(style.fat))
    if style.spine is not None:
        pixels[_blob(32 + rng.uniform(-1, 1), 51, 4.5, 3)] = style.spine
    move = (extra.uniform(-difficulty.shift, difficulty.shift), extra.uniform(-difficulty.shift, difficulty.shift))
    lesions = np.zeros((SIZE, SIZE), dtype=bool)
    for organ in scene.organs:
        lesions |= _paint_organ(pixels, organ, style.organ, rng, difficulty, move)
    pixels = _apply_texture(pixels, style.texture, strength, np.random.default_rng(scene.pixel_seed))
    pixels[~field] = 0.0
    # Lesions go on last: texture must not hide what the questions count.
    contrast = np.float32(extra.uniform(*difficulty.contrast))
    pixels[lesions] = (1 - contrast) * pixels[lesions] + contrast * np.float32(_LESION_GRAY[scene.tone])
    if difficulty.noise:
        generator = np.random.default_rng([scene.pixel_seed, 1])
        pixels = pixels + difficulty.noise * generator.standard_normal((SIZE, SIZE), dtype=np.float32)
    gray = (pixels.clip(0, 1) * 255).astype(np.uint8)
    return Image.fromarray(np.repeat(gray[:, :, None], 3, axis=2))


def _faded(style: _Style, strength: float) -> _Style:
    """`style` with its signs blended into tissue, and its tissue into that of all modalities; in full, itself."""
    if strength == 1.0:
        return style
    fat = style.tissue + strength * (style.fat - style.tissue)
    spine = None if style.spine is None else style.tissue + strength * (style.spine - style.tissue)
    return replace(style, fat=fat, spine=spine, tissue=_MEAN_TISSUE + strength * (style.tissue - _MEAN_TISSUE))


def _outlines(modality: Modality, height: float) -> tuple[Mask, Mask]:
    """What the picture shows of the body, with and without the rim of fat. `height` is the half axis of a slice."""
    if modality == "ultrasound":
        return _fan(), _fan(inset=3)
    return _blob(31.5, 32, 32, height, power=4), _blob(31.5, 32, 29.5, height - 2.5, power=4)


def _paint_organ(
    pixels: Gray, organ: Organ, gray: float, rng: random.Random, difficulty: _Difficulty, move: tuple[float, float]
) -> Mask:
    """Paints the organ's tissue and returns where its lesions are."""
    x, y = (
        centre + rng.uniform(-difficulty.jitter, difficulty.jitter) + moved
        for centre, moved in zip(_CENTRES[organ.place], move, strict=True)
    )
    half_x, half_y, shift, offset = _SHAPES[organ.name]
    scale = rng.uniform(*difficulty.sizes)
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


def _apply_texture(pixels: Gray, texture: str, strength: float, rng: np.random.Generator) -> Gray:
    noise = rng.standard_normal((SIZE, SIZE), dtype=np.float32)
    if texture == "grainy":
        return pixels * (1 + 0.25 * noise)
    if texture == "shaded":
        shade = 0.7 + 0.5 * _X / SIZE
        pixels = pixels * (shade if strength == 1.0 else 1 + strength * (shade - 1))
    return pixels + 0.02 * noise
