"""What is on a phantom image, as facts: modality, lesion tone, and the organs with their places and lesion counts.

The geometry below these facts (sizes, offsets, noise) is drawn from `Scene.pixel_seed`, so a scene fixes its image. A
hash of the whole scene decides which split it belongs to: no scene, hence no image, can stand in two splits.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Modality = Literal["CT", "MRI", "ultrasound"]
Tone = Literal["bright", "dark"]
Split = Literal["train", "validation", "test"]

MODALITIES: tuple[Modality, ...] = get_args(Modality)
TONES: tuple[Tone, ...] = get_args(Tone)
SPLITS: tuple[Split, ...] = get_args(Split)

# Where each organ lies on the image. The patient's right kidney is on the left of the picture, as radiologists show it.
PLACES: dict[str, str] = {
    "liver": "upper left",
    "stomach": "upper middle",
    "spleen": "upper right",
    "right kidney": "lower left",
    "pancreas": "lower middle",
    "left kidney": "lower right",
}
ORGANS: tuple[str, ...] = tuple(PLACES)

MAX_LESIONS_PER_ORGAN = 3
# Lesions of two affected organs: at most four in all, so that every count stays visible at 64 x 64.
_LESION_PAIRS = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1))
_MODALITY_WEIGHTS = (3, 4, 3)
# Of ten hash buckets, validation and test own one each and train the other eight.
_BUCKETS = 10
_HELD_OUT: dict[int, Split] = {0: "validation", 1: "test"}


@dataclass(frozen=True)
class Organ:
    """A visible organ: its name, its place on the image and how many lesions it holds."""

    name: str
    place: str
    lesions: int


@dataclass(frozen=True)
class Scene:
    """The facts of one image. `organs` are the visible ones in the order of `ORGANS`."""

    modality: Modality
    tone: Tone
    organs: tuple[Organ, ...]
    pixel_seed: int

    @property
    def affected(self) -> tuple[Organ, ...]:
        """The organs that hold lesions."""
        return tuple(organ for organ in self.organs if organ.lesions)

    @property
    def total_lesions(self) -> int:
        return sum(organ.lesions for organ in self.organs)

    def find(self, name: str) -> Organ | None:
        """The visible organ of this name."""
        return next((organ for organ in self.organs if organ.name == name), None)

    def to_facts(self) -> dict[str, Any]:
        """The scene as plain JSON values; `from_facts` turns them back."""
        return {**vars(self), "organs": [asdict(organ) for organ in self.organs]}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Scene:
        return cls(
            modality=facts["modality"],
            tone=facts["tone"],
            organs=tuple(Organ(**organ) for organ in facts["organs"]),
            pixel_seed=facts["pixel_seed"],
        )

    @property
    def split(self) -> Split:
        """The split that owns this scene, whatever seed or index drew it."""
        text = json.dumps(self.to_facts(), sort_keys=True)
        return _HELD_OUT.get(zlib.crc32(text.encode()) % _BUCKETS, "train")


def draw_scene(rng: random.Random, split: Split, *, num_affected: int) -> Scene:
    """Draws a scene of `split` with lesions in one or two organs.

    Only the pixels are redrawn until the hash falls into the split: the facts are distributed alike in every split.
    """
    modality = rng.choices(MODALITIES, _MODALITY_WEIGHTS)[0]
    tone = rng.choice(TONES)
    names = rng.sample(ORGANS, rng.randint(3, len(ORGANS)))
    counts = rng.choice(_LESION_PAIRS) if num_affected == 2 else (rng.randint(1, MAX_LESIONS_PER_ORGAN),)
    lesions = dict(zip(names, counts, strict=False))
    organs = tuple(Organ(name, PLACES[name], lesions.get(name, 0)) for name in ORGANS if name in names)
    while True:
        scene = Scene(modality, tone, organs, pixel_seed=rng.getrandbits(32))
        if scene.split == split:
            return scene
