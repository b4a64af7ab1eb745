"""Rows of completions as `mrpo infer` writes them, made by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def completion_row(answer: str | None, steps: Sequence[str] = (), **changes: Any) -> dict[str, Any]:
    """One completion of `steps` and `answer`, each step of two tokens, with the text that says so."""
    block = f"<think>{' '.join(steps)}</think>"
    return {
        "text": block + ("" if answer is None else f"<answer>{answer}</answer>"),
        "token_ids": list(range(2 * len(steps) + 3)),
        "finish_reason": "stop",
        "steps": [{"text": step, "start": 2 * k + 1, "end": 2 * k + 3} for k, step in enumerate(steps)],
        "answer": answer,
    } | changes


def question_row(id: str, completions: Iterable[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """One question with its completions; the gold answer is "gold" and the model is called "m"."""
    return {
        "id": id,
        "dataset": "set",
        "split": "test",
        "question": f"Question {id}?",
        "answer": "gold",
        "rationale": "why",
        "images": [],
        "metadata": {},
        "model": "m",
        "think_tag": "think",
        "sampling": {"temperature": 0.0, "max_tokens": 64, "seed": 0, "engine": "hf"},
        "completions": list(completions),
    } | changes


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
