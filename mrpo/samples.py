"""One judged completion as a plain record, for samples.jsonl and for reading."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mrpo.pictures import shown_picture
from mrpo.records import Example, ScoredCompletion, Verdict


def sample_record(
    example: Example, item: ScoredCompletion, advantages: torch.Tensor | None = None, images: Sequence[str] = ()
) -> dict[str, Any]:
    """A JSON-able record.

    Args:
        advantages: (T,) shaped per-token advantages: each step shows its first, the record that of the first token
            outside every step.
        images: where a reader finds the example's images, as `save_images` gives them.
    """
    verdict = item.verdict if isinstance(item.verdict, Verdict) else None
    steps = []
    for k, step in enumerate(item.steps):
        record: dict[str, Any] = {"text": step.text, "valid": None, "reason": ""}
        if verdict is not None:
            bits = verdict.steps[k]
            record |= {"valid": bits.valid, "reason": bits.reason}
            record |= {"gold_alignment": bits.gold_alignment, "answer_contribution": bits.answer_contribution}
        if advantages is not None:
            record["advantage"] = round(advantages[step.start].item(), 4)
        steps.append(record)
    rewards, parts = item.rewards, item.rewards.answer_parts
    outside = _first_outside(item)
    return {
        "id": example.id,
        "dataset": example.metadata.get("dataset"),
        "question": example.question,
        "gold": example.answer,
        "rationale": example.rationale,
        "images": list(images),
        "answer": item.answer,
        "correct": parts["symbolic"] == 1.0 if "symbolic" in parts else None,
        "text": item.completion.text,
        "finish_reason": item.completion.finish_reason,
        "num_tokens": len(item.completion.token_ids),
        "steps": steps,
        "advantage": None if advantages is None or outside is None else round(advantages[outside].item(), 4),
        "reward": {"answer": rewards.answer, "process": rewards.process, "length": rewards.length},
        "unjudged": None if verdict is not None else getattr(item.verdict, "reason", ""),
    }


def save_images(example: Example, run_dir: Path) -> list[str]:
    """Where the example's images are: the absolute path of a file; a picture in memory is first saved as PNG
    under RUN_DIR/images, as it is shown and once, and named relative to RUN_DIR."""
    digest = hashlib.sha256(example.id.encode()).hexdigest()[:8]
    name = f"{re.sub(r'[^A-Za-z0-9]+', '-', example.id).strip('-')[:80]}-{digest}"
    places = []
    for index, image in enumerate(example.images):
        if isinstance(image, Image.Image):
            place = f"images/{name}{f'-{index + 1}' if index else ''}.png"
            _save_once(image, run_dir / place)
            places.append(place)
        else:
            places.append(str(image.absolute()))
    return places


def _save_once(image: Image.Image, path: Path) -> None:
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        # A run may be killed in mid-write, and a resumed one must not take half a file for a whole one.
        partial = path.with_suffix(".partial")
        shown_picture(image).save(partial, format="PNG")
        partial.rename(path)


def _first_outside(item: ScoredCompletion) -> int | None:
    """The first token that belongs to no step, or None."""
    inside = {token for step in item.steps for token in range(step.start, step.end)}
    return next((token for token in range(len(item.completion.token_ids)) if token not in inside), None)
