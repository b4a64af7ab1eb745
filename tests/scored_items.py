"""Scored completions and a process that is alone, made by hand."""

from __future__ import annotations

from typing import Any

import torch

from mrpo.records import Completion, Rewards, ScoredCompletion, Step, StepVerdict, Unjudged, Verdict
from mrpo.runtime import Runtime


def scored(
    validity: list[bool] | None, *, answer: float = 0.0, tokens: int = 10, finish: Any = "stop"
) -> ScoredCompletion:
    """A completion whose step k holds tokens [1 + 2k, 3 + 2k)."""
    count = 2 if validity is None else len(validity)
    return ScoredCompletion(
        completion=Completion(tuple(range(tokens)), "text", finish),
        answer="a",
        steps=tuple(Step(f"s{k}", 1 + 2 * k, 3 + 2 * k) for k in range(count)),
        verdict=Unjudged("no") if validity is None else Verdict(tuple(StepVerdict(v, False) for v in validity)),
        rewards=Rewards(answer, None if validity is None else sum(validity) / len(validity), -0.25, {"rouge1": 0.5}),
    )


class OneProcess(Runtime):
    """Collectives of a process that is alone, without a process group."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values.clone()


def alone() -> OneProcess:
    return OneProcess(0, 1, torch.device("cpu"))
