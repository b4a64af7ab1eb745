"""The closed language of phantom rationales: sentence templates that both write statements and read them back.

Each template is the single source of its sentence: `Statement.text` fills it, `parse` matches it exactly (case, spaces
and final period included), and `is_true` says what the sentence claims about a scene.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from mrpo.data.phantom.scene import MODALITIES, ORGANS, PLACES, TONES, Scene

Value = str | int

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
DIAGNOSES: dict[tuple[str, str], str] = {
    ("CT", "dark"): "cyst",
    ("CT", "bright"): "hemorrhage",
    ("MRI", "dark"): "fibrosis",
    ("MRI", "bright"): "hemangioma",
    ("ultrasound", "dark"): "abscess",
    ("ultrasound", "bright"): "lipoma",
}
# (spine, fat, texture) as each modality shows them.
SIGNS: dict[str, tuple[str, str, str]] = {
    "CT": ("bright", "dark", "smooth"),
    "MRI": ("dark", "bright", "shaded"),
    "ultrasound": ("hidden", "gray", "grainy"),
}
ANSWERS: tuple[str, ...] = (*MODALITIES, *ORGANS, *NUMBERS, *DIAGNOSES.values())


def _same(words: tuple[str, ...]) -> dict[str, Value]:
    return {word: word for word in words}


# Slot type -> what may be written there -> the value it stands for.
_PHRASES: dict[str, dict[str, Value]] = {
    "scan": {"a CT scan": "CT", "an MRI scan": "MRI", "an ultrasound scan": "ultrasound"},
    "modality": _same(MODALITIES),
    "tone": _same(TONES),
    "organ": _same(ORGANS),
    "place": _same(tuple(PLACES.values())),
    "lesions": {f"{word} lesion{'' if n == 1 else 's'}": n for n, word in enumerate(NUMBERS)},
    "number": {word: n for n, word in enumerate(NUMBERS)},
    "diagnosis": _same(tuple(DIAGNOSES.values())),
    "spine": _same(tuple(signs[0] for signs in SIGNS.values())),
    "fat": _same(tuple(signs[1] for signs in SIGNS.values())),
    "texture": _same(tuple(signs[2] for signs in SIGNS.values())),
    "answer": _same(ANSWERS),
}


@dataclass(frozen=True)
class Template:
    """A sentence with slots `{name:type}`. `subject` is the slot that the sentence is about: two sentences of one
    template and subject speak of the same finding."""

    sentence: str
    truth: Callable[..., bool]
    subject: str | None = None

    @property
    def slots(self) -> list[tuple[str, str]]:
        """(name, type) of each slot, in order."""
        return re.findall(r"\{(\w+):(\w+)\}", self.sentence)

    def fill(self, values: tuple[Value, ...]) -> str:
        text = self.sentence
        for (name, kind), value in zip(self.slots, values, strict=True):
            phrase = next(phrase for phrase, meaning in _PHRASES[kind].items() if meaning == value)
            text = text.replace(f"{{{name}:{kind}}}", phrase)
        return text

    def instances(self) -> Iterator[str]:
        """Every sentence that the template can write."""
        for values in product(*(_PHRASES[kind].values() for _, kind in self.slots)):
            yield self.fill(values)

    def compile(self) -> re.Pattern[str]:
        # Odd pieces are slot types: a split keeps what its group captured.
        pieces = re.split(r"\{\w+:(\w+)\}", self.sentence)
        return re.compile(
            "".join(
                f"({'|'.join(map(re.escape, _PHRASES[piece]))})" if i % 2 else re.escape(piece)
                for i, piece in enumerate(pieces)
            )
        )


def _holds(scene: Scene, organ: str, lesions: int) -> bool:
    found = scene.find(organ)
    return (found.lesions if found else 0) == lesions


def _lies_in(scene: Scene, organ: str, place: str) -> bool:
    found = scene.find(organ)
    return found is not None and found.place == place


# Truth is asked with (scene, gold answer, *slot values).
TEMPLATES: dict[str, Template] = {
    "modality": Template("The image is {scan:scan}.", lambda s, _, scan: s.modality == scan),
    "spine": Template("The spine is {spine:spine}.", lambda s, _, spine: SIGNS[s.modality][0] == spine),
    "fat": Template("The fat is {fat:fat}.", lambda s, _, fat: SIGNS[s.modality][1] == fat),
    "texture": Template("The texture is {texture:texture}.", lambda s, _, texture: SIGNS[s.modality][2] == texture),
    "signs": Template("These signs suggest {modality:modality}.", lambda s, _, modality: s.modality == modality),
    "tone": Template("Each lesion is {tone:tone}.", lambda s, _, tone: s.tone == tone),
    "site": Template(
        "Each lesion is in the {place:place}.", lambda s, _, place: all(o.place == place for o in s.affected)
    ),
    "owner": Template(
        "The {place:place} belongs to the {organ:organ}.",
        lambda s, _, place, organ: _lies_in(s, organ, place),
        subject="place",
    ),
    "position": Template(
        "The {organ:organ} is in the {place:place}.",
        lambda s, _, organ, place: _lies_in(s, organ, place),
        subject="organ",
    ),
    "holds": Template(
        "The {organ:organ} holds {lesions:lesions}.",
        lambda s, _, organ, lesions: _holds(s, organ, lesions),
        subject="organ",
    ),
    "others": Template(
        "The other organs hold {lesions:lesions}.",
        lambda s, _, lesions: lesions == s.total_lesions - max(o.lesions for o in s.organs),
    ),
    "sum": Template(
        "Adding {first:number} and {second:number} makes {total:number}.",
        lambda _scene, _, first, second, total: first + second == total,
    ),
    "rule": Template(
        "On {modality:modality} {tone:tone} lesions suggest {diagnosis:diagnosis}.",
        lambda _scene, _, modality, tone, diagnosis: DIAGNOSES[modality, tone] == diagnosis,
    ),
    "answer": Template("So the answer is {answer:answer}.", lambda _scene, gold, answer: answer == gold),
}


@dataclass(frozen=True)
class Statement:
    """One sentence: the name of its template and the values of its slots, in order."""

    kind: str
    values: tuple[Value, ...]

    @property
    def text(self) -> str:
        return TEMPLATES[self.kind].fill(self.values)

    @property
    def topic(self) -> tuple[Value, ...]:
        """What the sentence is about: its template and, where that has one, its subject."""
        template = TEMPLATES[self.kind]
        slots = zip(template.slots, self.values, strict=True)
        return (self.kind, *(value for (name, _), value in slots if name == template.subject))

    def is_true(self, scene: Scene, gold_answer: str) -> bool:
        return TEMPLATES[self.kind].truth(scene, gold_answer, *self.values)


_PATTERNS = {kind: template.compile() for kind, template in TEMPLATES.items()}


@lru_cache(maxsize=65536)
def parse(text: str) -> Statement | None:
    """The statement that `text` writes, or None when it is not exactly a sentence of the language."""
    for kind, pattern in _PATTERNS.items():
        if match := pattern.fullmatch(text):
            types = (slot_type for _, slot_type in TEMPLATES[kind].slots)
            return Statement(kind, tuple(_PHRASES[t][phrase] for t, phrase in zip(types, match.groups(), strict=True)))
    return None
