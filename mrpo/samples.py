"""One judged completion as a plain record, for samples.jsonl and for reading."""

from __future__ import annotations

from typing import Any

import torch

from mrpo.records import Example, ScoredCompletion, Verdict


def sample_record(example: Example, item: ScoredCompletion, advantages: torch.Tensor | None = None) -> dict[str, Any]:
    """A JSON-able record; `advantages` (T,) are the shaped per-token advantages, of which each step shows its first."""
    judged = isinstance(item.verdict, Verdict)
    steps = []
    for k, step in enumerate(item.steps):
        record: dict[str, Any] = {"text": step.text, "valid": None, "reason": ""}
        if isinstance(item.verdict, Verdict):
            verdict = item.verdict.steps[k]
            record |= {"valid": verdict.valid, "reason": verdict.reason}
        if advantages is not None:
            record["advantage"] = round(advantages[step.start].item(), 4)
        steps.append(record)
    rewards = item.rewards
    return {
        "id": example.id,
        "question": example.question,
        "gold": example.answer,
        "rationale": example.rationale,
        "answer": item.answer,
        "text": item.completion.text,
        "steps": steps,
        "reward": {"answer": rewards.answer, "process": rewards.process, "length": rewards.length},
        "unjudged": None if judged else getattr(item.verdict, "reason", ""),
    }
