"""One judged completion of an evaluation, and its record in the trace file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mrpo.records import Completion, Example, ScoredCompletion, Unjudged, Verdict
from mrpo.samples import sample_record


@dataclass(frozen=True)
class Assessed:
    """Completion number `sample` (from 0) of a question, scored, and the verdict on its answer."""

    dataset: str
    example: Example
    sample: int
    scored: ScoredCompletion
    answer_verdict: bool | Unjudged
    well_formed: bool

    @property
    def question_id(self) -> str:
        """Different for equal ids of two data sets."""
        return question_key(self.dataset, self.example.id)

    @property
    def correct(self) -> bool | None:
        return None if isinstance(self.answer_verdict, Unjudged) else self.answer_verdict

    @property
    def validity(self) -> tuple[bool, ...] | None:
        verdict = self.scored.verdict
        return verdict.validity if isinstance(verdict, Verdict) else None

    @property
    def exact(self) -> bool:
        return self.scored.rewards.answer_parts["symbolic"] == 1.0

    @property
    def lexical(self) -> float:
        return self.scored.rewards.answer_parts["lexical"]


def question_key(dataset: str, example_id: str) -> str:
    return f"{dataset}\0{example_id}"


def trace_record(item: Assessed, model: str) -> dict[str, Any]:
    """A JSON-able record: that of a training run's samples, and what only an evaluation knows."""
    record = sample_record(item.example, item.scored, images=[str(path) for path in _paths(item.example)])
    verdicts = (item.scored.verdict, item.answer_verdict)
    reasons = [verdict.reason for verdict in verdicts if isinstance(verdict, Unjudged)]
    return record | {
        "dataset": item.dataset,
        "model": model,
        "sample": item.sample,
        "correct": item.correct,
        "exact": item.exact,
        "lexical": item.lexical,
        "unjudged": "; ".join(dict.fromkeys(reasons)) or None,
    }


def _paths(example: Example) -> list[Path]:
    return [image.absolute() for image in example.images if isinstance(image, Path)]


def follows_format(completion: Completion, think_tag: str) -> bool:
    """Whether a completion ended by itself and is a think block that says something, then a closed answer that does.

    The opening think tag may be missing: some chat templates end the prompt with it.
    """
    return completion.finish_reason == "stop" and _form(think_tag).match(completion.text) is not None


@lru_cache(maxsize=8)
def _form(think_tag: str) -> re.Pattern[str]:
    tag = re.escape(think_tag)
    inside = rf"(?:(?!</?{tag}>|</?answer>).)*"  # no tag of either kind
    return re.compile(rf"\s*(?:<{tag}>)?(?!\s*</){inside}</{tag}>{inside}<answer>(?!\s*</){inside}</answer>", re.DOTALL)
