"""What a step must have done to count, and what several steps took."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from harness import relative_error
from step_setting import Setting
from way_process import FailedError

if TYPE_CHECKING:
    from mrpo.records import Example

# Tokens that spell text in every tokenizer here.
_PLAIN_TOKENS = 500


def merge(answers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The step of several processes: as long as the slowest, its stages on average, tokens and memory of all."""
    names = dict.fromkeys(name for answer in answers for name in answer)
    found = {name: statistics.fmean(answer.get(name, 0.0) for answer in answers) for name in names}
    found["seconds"] = max(answer["seconds"] for answer in answers)
    return found | {name: sum(answer[name] for answer in answers) for name in ("tokens", "judged", "peak")}


def mean(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What steps took on average."""
    return {name: statistics.fmean(step[name] for step in steps) for name in steps[0]}


def check_counts(step: Mapping[str, float], setting: Setting) -> None:
    """Raises FailedError unless the step had all its tokens and asked the judge once for each completion with steps."""
    tokens = setting.samples * setting.length
    if round(step["tokens"]) != tokens:
        raise FailedError(f"{step['tokens']:.0f} completion tokens instead of {tokens}")
    if step["requests"] != step["judged"]:
        raise FailedError(f"asked the judge {step['requests']:.0f} times about {step['judged']:.0f} completions")


def draw_completions(examples: Sequence[Example], setting: Setting) -> list[dict[str, Any]]:
    """Random tokens and advantages, G completions for each example."""
    draw = random.Random(0)
    return [
        {
            "example": example.id,
            "token_ids": tuple(draw.randrange(_PLAIN_TOKENS) for _ in range(setting.length)),
            "advantage": draw.gauss(0.0, 1.0),
        }
        for example in examples
        for _ in range(setting.group)
    ]


def gradient_error(found: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor]) -> float:
    """The worst relative error of the parameters that both have.

    Raises:
        FailedError: they have none in common.
    """
    names = found.keys() & truth.keys()
    if not names:
        raise FailedError("no gradient to compare with the others'")
    return max(relative_error(found[name], truth[name]) for name in names)


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """An interval of order statistics that holds the true median at least this often, or the whole range if too few."""
    ordered, count = sorted(values), len(values)
    probability = 0.5**count  # that all values lie above the median
    tail, place, term = probability, 0, probability
    while tail <= (1.0 - level) / 2 and place < count // 2:
        place += 1
        term *= (count - place + 1) / place
        tail += term
    place = max(0, place - 1)
    return ordered[place], ordered[count - 1 - place]
