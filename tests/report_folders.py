"""Small runs and evaluations on disk, for tests of the report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from mrpo.evaluated import write_evaluated
from mrpo.records import EvaluatedSample


@contextmanager
def silent(name: str, total: int) -> Iterator[Any]:
    yield lambda count: None


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def trace(number: int, validity: Sequence[bool | None] = (True, True), **fields: Any) -> dict[str, Any]:
    """A trace record of an evaluation whose steps have this validity."""
    steps = [{"text": f"Step {k} of {number}.", "valid": valid, "reason": "why"} for k, valid in enumerate(validity, 1)]
    text = f"<think>{' '.join(step['text'] for step in steps)}</think><answer>yes {number}</answer>"
    return {
        "id": f"q{number}",
        "dataset": "toy",
        "model": "model",
        "question": f"Question {number}?",
        "gold": f"gold {number}",
        "rationale": f"Because {number}.",
        "images": [],
        "sample": 0,
        "text": text,
        "answer": f"yes {number}",
        "correct": True,
        "exact": False,
        "lexical": 0.5,
        "steps": steps,
        "unjudged": "no verdict" if None in validity else None,
        "reward": {"answer": 0.5, "process": 0.25, "length": 0.0},
        "finish_reason": "stop",
        "num_tokens": 12,
        **fields,
    }


def write_evaluation(folder: Path, traces: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """An evaluation folder: model -> its traces. Its figures are made up."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "accuracy": {"value": 0.25, "low": 0.125, "high": 0.5, "n": 8},
        "far": {"value": None, "low": None, "high": None, "n": 0},
    }
    test = {
        "dataset": "average", "metric": "accuracy", "first": "a", "second": "b", "p": 0.03125,
        "difference": {"value": 0.125, "low": -0.25, "high": 0.5, "n": 8},
        "mcnemar": {"first_only": 1, "second_only": 2, "p": 0.75},
    }  # fmt: skip
    summary = {
        "models": {model: {"datasets": {"toy": figures, "average": figures}} for model in traces},
        "metrics": {
            "accuracy": {"name": "accuracy", "over": "first", "percent": True},
            "far": {"name": "failure accumulation rate", "over": "failed", "percent": True},
        },
        "tests": [test],
        "judge": "toy judge",
    }
    (folder / "eval.json").write_text(json.dumps(summary), encoding="utf-8")
    for number, (model, records) in enumerate(traces.items()):
        write_lines(folder / f"{number}.traces.jsonl", [{**record, "model": model} for record in records])
    return folder


def write_run(folder: Path, *, steps: int = 3, config: str = "algorithm: mrpo\noptim:\n  lr: 1.0e-4\n") -> Path:
    """A finished run with one image that its samples share."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), "teal").save(folder / "images" / "scan.png")
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    metrics = [
        {"step": s, "reward": 0.5 * s, "time/step": 2.0}
        | {"time/rollout": 1.0, "time/judge_wait": 0.25, "time/update": 0.5}
        for s in range(1, steps + 1)
    ]
    write_lines(folder / "metrics.jsonl", metrics)
    samples = [
        {
            "step": step,
            "id": f"train/{step}",
            "question": "Which organ?",
            "gold": "liver",
            "rationale": None,
            "images": ["images/scan.png"],
            "text": "<think>It is dark. It is round.</think><answer>liver</answer>",
            "answer": "liver",
            "steps": [
                {"text": "It is dark.", "valid": True, "reason": "", "advantage": 0.5},
                {"text": "It is round.", "valid": False, "reason": "It is not.", "advantage": -1.0},
            ],
            "advantage": -0.5,
            "reward": {"answer": 1.0, "process": 0.5, "length": -0.5},
            "unjudged": None,
        }
        for step in range(1, steps + 1)
    ]
    write_lines(folder / "samples.jsonl", samples)
    for when, correct in (("before", False), ("after", True)):
        evaluated = [EvaluatedSample(f"q{n}", correct, (correct, True, False), 1.0, greedy=True) for n in range(4)]
        write_evaluated(folder / f"evaluation-{when}.json", evaluated)
    return folder
