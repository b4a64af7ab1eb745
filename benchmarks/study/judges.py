"""A judge that errs: verdicts flipped, or no verdict at all, at random but always alike for the same words."""

from __future__ import annotations

import random
from dataclasses import replace

from mrpo.judge import EmbeddedJudge, Judge
from mrpo.records import JudgeRequest, StepVerdict, Unjudged, Verdict


class ErringJudge(EmbeddedJudge):
    """`judge` with the validity of each step flipped with probability `flipped`, and with whole completions left
    unjudged with probability `missing`. What becomes of a request depends on `seed` and its content alone."""

    def __init__(self, judge: Judge, *, flipped: float, missing: float, seed: int) -> None:
        self.name = f"{judge.name}, {flipped:.0%} flipped, {missing:.0%} missing"
        self._judge, self._flipped, self._missing, self._seed = judge, flipped, missing, seed

    def judge_one(self, request: JudgeRequest) -> Verdict | Unjudged:
        (verdict,) = self._judge.judge([request])
        rng = random.Random(f"{self._seed}/{request.example.id}/{request.steps}/{request.answer}")
        if isinstance(verdict, Unjudged):
            return verdict
        if rng.random() < self._missing:
            return Unjudged("left unjudged by the study")
        return Verdict(tuple(_flip(s) if rng.random() < self._flipped else s for s in verdict.steps))


def _flip(step: StepVerdict) -> StepVerdict:
    return replace(step, gold_alignment=not step.valid, answer_contribution=False, reason=f"flipped: {step.reason}")
