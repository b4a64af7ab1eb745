"""The open-ended questions about a scene, and the reasoning that leads from a reading of the scene to the answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from mrpo.data.phantom.language import DIAGNOSES, NUMBERS, SIGNS, Statement
from mrpo.data.phantom.scene import Scene, Split, draw_scene

QuestionKind = Literal["modality", "organ", "count", "total", "diagnosis"]
KINDS: tuple[QuestionKind, ...] = get_args(QuestionKind)

WORDINGS: dict[QuestionKind, tuple[str, ...]] = {
    "modality": ("Which modality is this?", "Which kind of scan is this?"),
    "organ": ("Which organ holds the lesions?", "Where are the lesions?"),
    "count": ("How many lesions are in the {organ}?", "How many lesions does the {organ} hold?"),
    "total": ("How many lesions are there in total?", "How many lesions does the scan show?"),
    "diagnosis": ("What is the diagnosis?", "What do the lesions suggest?"),
}

# Steps that set the scene without bearing on the answer: in the gold rationale, but no part of the derivation.
_CONTEXT: dict[QuestionKind, frozenset[str]] = {
    "modality": frozenset(),
    "organ": frozenset({"modality"}),
    "count": frozenset({"modality", "tone"}),
    "total": frozenset({"modality", "tone"}),
    "diagnosis": frozenset({"holds"}),
}


@dataclass(frozen=True)
class Question:
    """A question: its kind, its wording, and the organ that a `count` question asks about."""

    kind: QuestionKind
    text: str
    organ: str | None = None

    def needs(self, statement: Statement) -> bool:
        """Whether a step of this question's rationale bears on the answer, rather than setting the context."""
        return statement.kind not in _CONTEXT[self.kind]


@dataclass(frozen=True)
class Reading:
    """A reader's view of an image: the scene as seen, the diagnoses as remembered, and a slip in addition."""

    scene: Scene
    diagnoses: Mapping[tuple[str, str], str] = field(default_factory=lambda: DIAGNOSES)
    sum_error: int = 0


def draw_case(rng: random.Random, split: Split) -> tuple[Scene, Question]:
    """Draws a question kind, a scene of `split` that the question can be asked about, and the wording."""
    kind = rng.choice(KINDS)
    num_affected = {"organ": 1, "total": 2}.get(kind) or rng.randint(1, 2)
    scene = draw_scene(rng, split, num_affected=num_affected)
    organ = None
    if kind == "count":
        healthy = [organ for organ in scene.organs if not organ.lesions]
        organ = rng.choice(healthy if healthy and rng.random() < 0.15 else scene.affected).name
    return scene, Question(kind, rng.choice(WORDINGS[kind]).format(organ=organ), organ)


def reason(reading: Reading, question: Question) -> tuple[list[Statement], str]:
    """The rationale (4 to 8 statements) and the answer that follow from `reading`; read rightly, they are the gold."""
    findings, answer = _REASONING[question.kind](reading, question)
    return [*findings, Statement("answer", (answer,))], answer


def _reason_modality(reading: Reading, _: Question) -> tuple[list[Statement], str]:
    modality = reading.scene.modality
    signs = zip(("spine", "fat", "texture"), SIGNS[modality], strict=True)
    return [*(Statement(kind, (value,)) for kind, value in signs), Statement("signs", (modality,))], modality


def _reason_organ(reading: Reading, _: Question) -> tuple[list[Statement], str]:
    scene = reading.scene
    (organ,) = scene.affected
    findings = [
        Statement("modality", (scene.modality,)),
        Statement("site", (organ.place,)),
        Statement("owner", (organ.place, organ.name)),
        Statement("holds", (organ.name, organ.lesions)),
        Statement("others", (0,)),
    ]
    return findings, organ.name


def _reason_count(reading: Reading, question: Question) -> tuple[list[Statement], str]:
    scene = reading.scene
    organ = scene.find(question.organ or "")
    if organ is None:
        raise ValueError(f"the scene shows no {question.organ!r}")
    findings = [
        Statement("modality", (scene.modality,)),
        Statement("position", (organ.name, organ.place)),
        Statement("tone", (scene.tone,)),
        Statement("holds", (organ.name, organ.lesions)),
    ]
    return findings, NUMBERS[organ.lesions]


def _reason_total(reading: Reading, _: Question) -> tuple[list[Statement], str]:
    scene = reading.scene
    first, second = (organ.lesions for organ in scene.affected)
    total = first + second + reading.sum_error
    findings = [*_survey(scene), Statement("sum", (first, second, total))]
    return findings, NUMBERS[total]


def _reason_diagnosis(reading: Reading, _: Question) -> tuple[list[Statement], str]:
    scene = reading.scene
    diagnosis = reading.diagnoses[scene.modality, scene.tone]
    return [*_survey(scene), Statement("rule", (scene.modality, scene.tone, diagnosis))], diagnosis


def _survey(scene: Scene) -> list[Statement]:
    """Modality, tone, and what each affected organ holds."""
    return [
        Statement("modality", (scene.modality,)),
        Statement("tone", (scene.tone,)),
        *(Statement("holds", (organ.name, organ.lesions)) for organ in scene.affected),
    ]


_REASONING: dict[QuestionKind, Callable[[Reading, Question], tuple[list[Statement], str]]] = {
    "modality": _reason_modality,
    "organ": _reason_organ,
    "count": _reason_count,
    "total": _reason_total,
    "diagnosis": _reason_diagnosis,
}
