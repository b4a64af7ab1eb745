"""Judged completions of an evaluation, made by hand."""

from __future__ import annotations

from typing import Any

from mrpo.assessment import Assessed
from mrpo.records import Completion, Example, Rewards, ScoredCompletion, Step, StepVerdict, Unjudged, Verdict


def item(
    id: str,
    validity: str | None = "v",
    *,
    correct: bool | None = False,
    dataset: str = "set",
    sample: int = 0,
    exact: bool = False,
    lexical: float = 0.0,
    tokens: int = 10,
    finish: Any = "stop",
    well_formed: bool = True,
) -> Assessed:
    """`validity` has a letter a step, v for valid and x for invalid; None: three steps that were not judged."""
    letters = "???" if validity is None else validity
    verdict = Verdict(tuple(StepVerdict(letter == "v", False, f"is {letter}") for letter in letters))
    scored = ScoredCompletion(
        completion=Completion(tuple(range(tokens)), "text", finish),
        answer="answer",
        steps=tuple(Step(f"step {k}", k, k + 1) for k in range(len(letters))),
        verdict=Unjudged("steps: no word") if validity is None else verdict,
        rewards=Rewards(lexical, None, 0.0, {"symbolic": float(exact), "lexical": lexical}),
    )
    example = Example(id, (), "question", "gold", None, "test", {"dataset": dataset})
    answer_verdict = Unjudged("answer: no word") if correct is None else correct
    return Assessed(dataset, example, sample, scored, answer_verdict, well_formed)
