"""Misreadings: the habits of a careless reader, whose reasoning starts from a scene that is not there.

A habit that strikes changes the reading before any sentence is written, so what follows from it is wrong too: a
failure cascade. Habits are fixed maps (MRI is taken for CT, never the reverse) because random errors would leave the
truth the likeliest sentence, and a policy trained on them would still answer rightly when it decodes greedily.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mrpo.data.phantom.language import DIAGNOSES
from mrpo.data.phantom.questions import Question, Reading
from mrpo.data.phantom.scene import ORGANS, PLACES, Organ, Scene

Habit = Callable[[Reading, Question], Reading | None]


def misread(scene: Scene, question: Question, corruption: float, rng: random.Random) -> tuple[Reading, list[str]]:
    """The careless reading of `scene`: each habit that applies strikes with probability `corruption`.

    Returns the reading and the names of the habits that struck. A higher corruption keeps the habits that a lower one
    gives, since every habit has its own draw.
    """
    reading, struck = Reading(scene), []
    for name, habit in HABITS.items():
        strikes = rng.random() < corruption
        if strikes and (changed := habit(reading, question)) is not None:
            reading = changed
            struck.append(name)
    return reading, struck


def _takes_mri_for_ct(reading: Reading, _: Question) -> Reading | None:
    return _see(reading, modality="CT") if reading.scene.modality == "MRI" else None


def _takes_bright_for_dark(reading: Reading, _: Question) -> Reading | None:
    """Speckle drowns the bright lesions of an ultrasound image."""
    scene = reading.scene
    return _see(reading, tone="dark") if (scene.modality, scene.tone) == ("ultrasound", "bright") else None


def _confuses_sides(reading: Reading, _: Question) -> Reading | None:
    """What lies in one kidney is seen in the other."""
    left, right = (_lesions(reading.scene, name) for name in ("left kidney", "right kidney"))
    if left == right:
        return None
    return _see(reading, organs=_with_lesions(reading.scene, {"left kidney": right, "right kidney": left}))


def _takes_spleen_for_stomach(reading: Reading, question: Question) -> Reading | None:
    """The organ in the spleen's place is called stomach and the other way round."""
    spleen, stomach = (_lesions(reading.scene, name) for name in ("spleen", "stomach"))
    if not spleen and question.organ != "spleen":
        return None
    organs = _with_lesions(reading.scene, {"spleen": stomach, "stomach": spleen})
    swap = {"spleen": PLACES["stomach"], "stomach": PLACES["spleen"]}
    return _see(reading, organs=tuple(replace(o, place=swap.get(o.name, o.place)) for o in organs))


def _misses_third_lesion(reading: Reading, _: Question) -> Reading | None:
    crowded = {organ.name: 2 for organ in reading.scene.organs if organ.lesions == 3}
    return _see(reading, organs=_with_lesions(reading.scene, crowded)) if crowded else None


def _forgets_hemorrhage(reading: Reading, question: Question) -> Reading | None:
    if question.kind != "diagnosis" or (reading.scene.modality, reading.scene.tone) != ("CT", "bright"):
        return None
    return replace(reading, diagnoses={**DIAGNOSES, ("CT", "bright"): DIAGNOSES["CT", "dark"]})


def _adds_one_short(reading: Reading, question: Question) -> Reading | None:
    if question.kind != "total" or reading.scene.total_lesions < 3:
        return None
    return replace(reading, sum_error=-1)


# In the order in which they act: early ones change what later ones find.
HABITS: dict[str, Habit] = {
    "modality": _takes_mri_for_ct,
    "tone": _takes_bright_for_dark,
    "side": _confuses_sides,
    "organ": _takes_spleen_for_stomach,
    "count": _misses_third_lesion,
    "rule": _forgets_hemorrhage,
    "sum": _adds_one_short,
}


def _see(reading: Reading, **changes: Any) -> Reading:
    return replace(reading, scene=replace(reading.scene, **changes))


def _lesions(scene: Scene, name: str) -> int:
    organ = scene.find(name)
    return organ.lesions if organ else 0


def _with_lesions(scene: Scene, lesions: dict[str, int]) -> tuple[Organ, ...]:
    """The scene's organs with these lesion counts; an organ that was not seen is added."""
    seen = {organ.name: organ for organ in scene.organs}
    for name, count in lesions.items():
        seen[name] = Organ(name, seen[name].place if name in seen else PLACES[name], count)
    return tuple(seen[name] for name in ORGANS if name in seen)
